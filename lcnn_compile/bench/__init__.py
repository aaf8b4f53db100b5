"""Benchmarks: lookup layers and networks against the dense engines a user would pick instead."""
