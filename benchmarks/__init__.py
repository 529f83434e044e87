"""Benchmarks: our backends beside the eager reference and torch.compile of it, in one run."""
