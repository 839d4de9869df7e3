"""What one rank computes, from a model's files to a token."""
