"""Bytes between ranks, the end of a rank, and the mpirun above them. Only ``transport.mpi`` imports mpi4py."""
