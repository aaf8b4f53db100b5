"""Conversion: which layers of a model are replaced, with which sizes, and the walk that replaces them.

``survey`` runs the model and sees what it has, ``plan`` decides about each layer, ``convert`` fits and replaces; ``calls`` and ``intercept`` are
for convolutions called as functions. May import ``report`` and the rooms below it.
"""
