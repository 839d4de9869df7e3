"""The computation of one rank, from a model's files to a token."""
