"""Lookup modules: drop-in, trainable layers whose weight is a lookup weight, one for each kind of dense layer.

``base`` is what they share, ``conv``, ``linear`` and ``transposed`` are the layers, ``weight`` what reads their dense weight, ``tables`` and ``tabled`` the index
tables. ``functional`` takes the place of a parameter that convolutions called as functions read (``calls``); ``swap`` puts a module in a dense layer's place.
May import ``fitting`` and the rooms below it.
"""

from lcnn_compile.modules.base import FACTORS, LookupModule
from lcnn_compile.modules.conv import LookupConv, LookupConv1d, LookupConv2d, LookupConv3d
from lcnn_compile.modules.functional import FunctionalWeight
from lcnn_compile.modules.initial import random_weight
from lcnn_compile.modules.linear import LookupLinear
from lcnn_compile.modules.swap import LOOKUP_KINDS, dense_layer, lookup_layer, lookup_modules, replace_module
from lcnn_compile.modules.transposed import LookupConvTranspose, LookupConvTranspose1d, LookupConvTranspose2d

__all__ = [
    "FACTORS",
    "LOOKUP_KINDS",
    "FunctionalWeight",
    "LookupConv",
    "LookupConv1d",
    "LookupConv2d",
    "LookupConv3d",
    "LookupConvTranspose",
    "LookupConvTranspose1d",
    "LookupConvTranspose2d",
    "LookupLinear",
    "LookupModule",
    "dense_layer",
    "lookup_layer",
    "lookup_modules",
    "random_weight",
    "replace_module",
]
