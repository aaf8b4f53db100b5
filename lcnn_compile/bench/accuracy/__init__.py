"""Benchmarks of accuracy: the error of networks at a budget of multiply-adds, beside pruning and low rank.

May import what ``bench`` may; not its two siblings.
"""
