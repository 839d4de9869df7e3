"""The iPad's end of the connection, in Python: what stands in for the Swift app."""
