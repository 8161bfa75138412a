"""Benchmark of everything that needs a GPU, in one run of at most ten minutes."""
