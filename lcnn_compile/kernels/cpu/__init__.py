"""The C++ kernels: building them, calling them, and whole programs of them."""

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
    "multiplies_pairs",
    "packed_weight",
    "takes",
    "usable",
]
