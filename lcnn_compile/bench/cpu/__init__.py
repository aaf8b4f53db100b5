"""Benchmarks of layers and networks on processors."""
