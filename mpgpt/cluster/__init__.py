"""All ranks together: the start of a run, probing, the ring, a session in it."""
