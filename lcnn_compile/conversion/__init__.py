"""Conversion: which layers of a model are replaced, with which sizes, and the walk that replaces them."""
