"""Compiled kernels: a player of programs in C++, built at install where there is a compiler."""
