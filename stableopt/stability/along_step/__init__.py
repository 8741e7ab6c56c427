"""Quantities along the step that an optimizer took or would take."""
