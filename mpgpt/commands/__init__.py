"""The command line: the only package that knows every kind of part."""
