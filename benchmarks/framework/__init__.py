"""The parts of an experiment: settings, cases, tables, claims, figures and published results."""
