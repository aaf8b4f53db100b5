"""Benchmarks of layers and networks on processors: times, memory, starts, scaling, training.

May import what ``bench`` may; not its two siblings.
"""
