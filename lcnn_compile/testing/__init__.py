"""Hypothesis strategies and assertions of numerical equivalence, for our kernels and for users' own models::

    from hypothesis import given
    from lcnn_compile import LookupConfig, LookupConv2d
    from lcnn_compile.testing import assert_equivalent, conv_layers

    @given(conv_layers())
    def test_lookup_layer(case):
        lookup = LookupConv2d.from_conv(case.conv, LookupConfig(dictionary_size=1.0, sparsity=None))
        assert_equivalent(case.conv, lookup, case.inputs)

The rule everywhere: the result may not be farther from a float64 reference than PyTorch's own result, times a small factor.
Whatever a strategy draws is described by a few plain values, so a failure prints a program that makes it again.
Networks that write in place, keep state and take inputs of every kind come from :func:`source_networks`, as source text;
:func:`assert_same_calls` compares all that several calls leave behind.

Needs the ``testing`` extra (hypothesis), so that nothing that serves a model imports it. May import ``passes`` and the rooms below it.
"""

from lcnn_compile.testing.calls import assert_same_calls
from lcnn_compile.testing.cases import ConvCase, NetworkCase, RandomNetwork, random_lookup_weight
from lcnn_compile.testing.compare import FACTOR, assert_close, assert_equivalent, error, tolerance
from lcnn_compile.testing.drawing import source_networks
from lcnn_compile.testing.source import Call, SourceCase, minimise
from lcnn_compile.testing.strategies import (
    PADDING_MODES,
    conv_layers,
    geometries,
    images,
    lookup_layers,
    lookup_weights,
    networks,
    random_tensor,
)

__all__ = [
    "FACTOR",
    "PADDING_MODES",
    "Call",
    "ConvCase",
    "NetworkCase",
    "RandomNetwork",
    "SourceCase",
    "assert_close",
    "assert_equivalent",
    "assert_same_calls",
    "conv_layers",
    "error",
    "geometries",
    "images",
    "lookup_layers",
    "lookup_weights",
    "minimise",
    "networks",
    "random_lookup_weight",
    "random_tensor",
    "source_networks",
    "tolerance",
]
