"""The C++ kernels (``src``): building them, calling them (``forward``, ``backward``), and whole programs of them.

A ``program`` runs ``steps`` whose values lie in one ``arena``; a file for each kind of step. May import of ``kernels`` what knows no device: its
arguments, checks and caches, and the reference.
"""

from lcnn_compile.kernels.cpu.forward import (
    ACTIVATION_CODES,
    DTYPES,
    PLANS,
    POSITIONS,
    PRECISIONS,
    Handle,
    PackedWeight,
    Pooling,
    address_of,
    is_available,
    keep_sources,
    multiplies_pairs,
    packed_weight,
    takes,
    usable,
)

__all__ = [
    "ACTIVATION_CODES",
    "DTYPES",
    "PLANS",
    "POSITIONS",
    "PRECISIONS",
    "Handle",
    "PackedWeight",
    "Pooling",
    "address_of",
    "is_available",
    "keep_sources",
    "multiplies_pairs",
    "packed_weight",
    "takes",
    "usable",
]
