"""Core ML's program format: written, read back, checked and run without Core ML."""
