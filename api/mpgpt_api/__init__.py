"""The HTTP API of rank 0, and the page that it serves."""
