"""Margins along the step that an optimizer took or would take: no reader, no eigen-solver."""
