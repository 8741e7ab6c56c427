"""`measure`: sharpness, non-uniformity and the other quantities at one point."""
