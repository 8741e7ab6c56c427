"""Checks of arguments, deprecated names and torch internals that every package uses."""
