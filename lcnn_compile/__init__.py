"""lcnn_compile: convolutional networks made faster by learned lookup convolutions (LCNN, CVPR 2017)."""

from lcnn_compile.checkpoint.archive import load, save
from lcnn_compile.config import LayerConfig, LookupConfig
from lcnn_compile.conversion.convert import convert, explain
from lcnn_compile.errors import LcnnError, LcnnWarning
from lcnn_compile.export.frozen import Frozen, freeze
from lcnn_compile.lookup import LookupWeight
from lcnn_compile.modules import (
    LookupConv1d,
    LookupConv2d,
    LookupConv3d,
    LookupConvTranspose1d,
    LookupConvTranspose2d,
    LookupLinear,
)

__version__ = "0.1.0"

__all__ = [
    "Frozen",
    "LayerConfig",
    "LcnnError",
    "LcnnWarning",
    "LookupConfig",
    "LookupConv1d",
    "LookupConv2d",
    "LookupConv3d",
    "LookupConvTranspose1d",
    "LookupConvTranspose2d",
    "LookupLinear",
    "LookupWeight",
    "convert",
    "explain",
    "freeze",
    "load",
    "save",
]
