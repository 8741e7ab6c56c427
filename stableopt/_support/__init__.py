"""Checks of arguments, deprecated names, and torch internals, for all packages."""
