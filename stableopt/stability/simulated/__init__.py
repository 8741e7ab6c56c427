"""Thresholds that have no closed form, from copies of the linear dynamics of SGD near a minimum."""
