"""FX passes, each usable on any GraphModule: symbolically traced, captured by Dynamo, or exported and unlifted.

A usual order: ``lift_functional_convolutions``, ``find_convolutions``, ``replace_convolutions``, then for inference
``fold_batch_norm``, ``fold_factors``, ``narrow_convolutions``, ``choose_lowerings``, ``fuse_epilogues``,
``chain_lookups`` and ``pool_first`` on a GPU, ``gather_programs``. Each changes the GraphModule in place and returns it.
``effects`` knows what a graph writes, ``targets`` and ``find`` what its nodes are. May import ``modules`` and the rooms below it.
"""

from lcnn_compile.passes.chains import chain_lookups
from lcnn_compile.passes.decompose import decompose_lookups
from lcnn_compile.passes.find import Convolution, find_convolutions
from lcnn_compile.passes.fold import fold_batch_norm, fold_factors
from lcnn_compile.passes.functional import to_functional
from lcnn_compile.passes.fuse import fuse_epilogues
from lcnn_compile.passes.in_place import to_out_of_place
from lcnn_compile.passes.lift import lift_functional_convolutions
from lcnn_compile.passes.lower import choose_lowerings
from lcnn_compile.passes.narrow import narrow_convolutions
from lcnn_compile.passes.pool import pool_first
from lcnn_compile.passes.precision import set_precision
from lcnn_compile.passes.programs import gather_programs
from lcnn_compile.passes.replace import replace_convolutions

__all__ = [
    "Convolution",
    "chain_lookups",
    "choose_lowerings",
    "decompose_lookups",
    "find_convolutions",
    "fold_batch_norm",
    "fold_factors",
    "fuse_epilogues",
    "gather_programs",
    "lift_functional_convolutions",
    "narrow_convolutions",
    "pool_first",
    "replace_convolutions",
    "set_precision",
    "to_functional",
    "to_out_of_place",
]
