"""What the README and the documentation of version 0.1 name is still there: code that was written from them goes on running."""

import importlib

import pytest

SHOWN = {
    "lcnn_compile": "LayerConfig LcnnError LcnnWarning LookupConfig LookupConv1d LookupConv2d LookupConv3d LookupConvTranspose1d LookupConvTranspose2d LookupLinear LookupWeight backend batches bench convert errors explain export freeze geometry kernels learning load modules passes report save testing",
    "lcnn_compile.LookupWeight": "balanced",
    "lcnn_compile.aot": "AotModel",
    "lcnn_compile.backend": "lcnn parse_options",
    "lcnn_compile.checkpoint": "Header read_header",
    "lcnn_compile.errors": "LcnnError LcnnWarning",
    "lcnn_compile.export": "check_onnx export_aot export_onnx export_pt2 load_aot to_dense",
    "lcnn_compile.kernels": "choose reference",
    "lcnn_compile.kernels.choose": "Problem cheapest estimate",
    "lcnn_compile.kernels.reference": "apply_epilogue dense_weight lookup_tensor lower_factored lower_lookup output_size",
    "lcnn_compile.modules": "FunctionalWeight",
    "lcnn_compile.learning": "carry_dictionaries distill freeze_dictionaries harden soften sparsity_penalty sweep",
    "lcnn_compile.lookup": "filter_table",
    "lcnn_compile.passes": "find_convolutions fuse_epilogues to_functional to_out_of_place",
    "lcnn_compile.passes.effects": "Effects",
    "lcnn_compile.report": "Report",
    "lcnn_compile.testing": "assert_close assert_equivalent assert_same_calls images lookup_weights networks source_networks",
}


@pytest.mark.parametrize("place", SHOWN)
def test_names_of_version_0_1(place):
    home = importlib.import_module(".".join(part for part in place.split(".") if part.islower()))
    for name in place.split(".")[home.__name__.count(".") + 1 :]:
        home = getattr(home, name)
    for name in SHOWN[place].split():
        if not hasattr(home, name):
            importlib.import_module(f"{place}.{name}")


def test_the_reference_takes_what_it_took_in_version_0_1():
    """Its functions are in the documentation with flat arguments."""
    import torch
    import torch.nn.functional as F

    from lcnn_compile import LookupWeight
    from lcnn_compile.kernels import reference

    torch.manual_seed(0)
    lookups = torch.randn(7, 3, 3, 2) * (torch.rand(7, 3, 3, 2) < 0.4)
    weight = LookupWeight.from_lookup_tensor(torch.randn(1, 3, 5), lookups, group_size=3).to(torch.float64)
    x, stride, padding, dilation = torch.randn(2, 5, 9, 8, dtype=torch.float64), [2, 1], [1, 0, 2, 1], [1, 2]
    truth = F.conv2d(F.pad(x, (2, 1, 1, 0)), weight.dense_weight(), None, (2, 1), 0, (1, 2))
    found = [
        reference.lower_lookup(x, *weight.tensors().values(), 7, (3, 2), stride, padding, dilation),
        reference.lower_factored(x, weight.dictionary, lookups.double(), stride, padding, dilation),
    ]
    for y in found:
        torch.testing.assert_close(y, truth)
    made = reference.lookup_tensor(*list(weight.tensors().values())[1:], 7, 3, [3, 2])
    torch.testing.assert_close(made, lookups.double())
    fused = reference.apply_epilogue(truth, torch.ones(7).double(), truth, "relu", True)
    torch.testing.assert_close(fused, (truth + 1).relu() + truth)


@pytest.mark.parametrize("kind", ["Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "Linear"])
def test_constructors_can_be_read_and_take_the_dense_layers_positions(kind):
    import inspect

    from torch import nn

    import lcnn_compile

    dense, ours = (inspect.signature(getattr(nn, kind)), inspect.signature(getattr(lcnn_compile, f"Lookup{kind}")))
    positional = [p for p in ours.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [(p.name, p.default) for p in positional] == [(p.name, p.default) for p in dense.parameters.values()]
    named = {p.name: p.default for p in ours.parameters.values() if p.kind is p.KEYWORD_ONLY}
    sizes = {"dictionary_size": 0.25, "sparsity": 6, "group_size": 8, "lowering": "auto", "precision": "float32"}
    assert named == sizes
