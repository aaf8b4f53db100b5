"""Benchmarks on a GPU: one session on a device, resumable."""
