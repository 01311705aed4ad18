"""Benchmarks that are made for a GPU and only tested on a CPU."""
