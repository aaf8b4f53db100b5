"""Benchmarks on a GPU: one session on a device, resumable.

May import what ``bench`` may; not its two siblings.
"""
