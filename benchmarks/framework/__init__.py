"""What an experiment is: settings, jobs, tables, claims, figures and published results."""
