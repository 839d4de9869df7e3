"""Measurements of rings, and comparisons with other programs on the same cores."""
