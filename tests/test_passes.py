"""Each FX pass alone, on traced, exported and randomly generated graphs."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from nets import Functional, SmallResNet, pictures, randomise
from torch import fx, nn
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.fx.passes.shape_prop import ShapeProp

from lcnn_compile import LcnnError, LookupConv2d, LookupWeight, passes
from lcnn_compile.kernels import cpu
from lcnn_compile.kernels.cpu import program
from lcnn_compile.passes.find import is_lookup
from lcnn_compile.passes.programs import programs
from lcnn_compile.testing import assert_equivalent, networks
from lcnn_compile.testing.cases import laid_out
from lcnn_compile.torch_private import FakeTensorMode

ORDER = (
    "lift_functional_convolutions",
    "to_functional",
    "fold_batch_norm",
    "fold_factors",
    "narrow_convolutions",
    "choose_lowerings",
    "fuse_epilogues",
)


def with_lookups(model):
    """The model with a random lookup convolution in every place, computing another function than before."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Conv2d) and child.in_channels > 3:
                sizes = (child.in_channels, child.out_channels, child.kernel_size, child.stride, child.padding)
                setattr(module, name, LookupConv2d(*sizes, groups=child.groups, bias=child.bias is not None, group_size=3))
    return model


def traced(model, x):
    gm = fx.symbolic_trace(model)
    ShapeProp(gm).propagate(x)
    return gm


def targets(gm):
    return [node.target for node in gm.graph.nodes if node.op == "call_function"]


@given(networks())
def test_no_pass_changes_the_outputs(case):
    for model in (case.model, with_lookups(case.model)):
        gm = traced(model, case.inputs)
        for name in ORDER:
            getattr(passes, name)(gm)
            assert_equivalent(model, gm, case.inputs, factor=32)


def gathered(model, x):
    """The whole line of passes with every lookup convolution as such, ``gather_programs`` last."""
    for module in model.modules():
        if isinstance(module, LookupConv2d):
            module.lowering = "lookup"
    gm = traced(model, x)
    for name in (
        "lift_functional_convolutions",
        "to_functional",
        "fold_batch_norm",
        "fold_factors",
        "choose_lowerings",
        "fuse_epilogues",
    ):
        getattr(passes, name)(gm)
    FakeTensorProp(gm, FakeTensorMode(allow_non_fake_inputs=True)).propagate(x)
    return passes.gather_programs(gm)


@pytest.mark.skipif(not cpu.is_available(), reason="the C++ kernels are unavailable")
@pytest.mark.parametrize(
    ("pool", "taken"),
    [
        (lambda y: F.max_pool2d(y, 3, 2, 1), True),
        (lambda y: F.max_pool2d(y, (2, 3), (3, 1), (1, 0)), True),
        (lambda y: F.max_pool2d(y, 2), True),
        (lambda y: F.max_pool2d(y, 3, 2, 1, ceil_mode=True), True),
        (lambda y: F.max_pool2d(y, 2, 1, dilation=2), True),
        (lambda y: F.max_pool2d(y, 3, 4, dilation=2), True),
        (lambda y: F.avg_pool2d(y, (3, 2), (1, 2)), True),
        (lambda y: F.avg_pool2d(y, 3, 2, 1), True),
        (lambda y: F.avg_pool2d(y, 3, 2, 1, count_include_pad=False), True),
        (lambda y: F.avg_pool2d(y, 3, 2, count_include_pad=False), True),
        (lambda y: F.avg_pool2d(y, 3, 2, 0, True), True),
        (lambda y: F.avg_pool2d(y, 3, (2, 1), 1, True), True),
        (lambda y: F.avg_pool2d(y, 2, divisor_override=3), True),
        (lambda y: F.adaptive_avg_pool2d(y, 1), True),
        (lambda y: F.adaptive_avg_pool2d(y, (3, 2)), True),
        (lambda y: F.adaptive_avg_pool2d(y, (4, 3)), True),
        (lambda y: y.mean((2, 3)), True),
        (lambda y: y.mean((3, -2), True), True),
        (lambda y: y.mean((1, 2)), True),
        (lambda y: y.mean((2, 3), dtype=torch.float64), False),
        (lambda y: y.amax((-1, -2)), True),
        (lambda y: y.amax((1, 3)), False),
        (lambda y: F.dropout(y, 0.5, False), True),
        (lambda y: y.flatten(2).unflatten(1, (3, 2)), True),
    ],
)
def test_poolings_in_programs(pool, taken):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = LookupConv2d(4, 6, 3, padding=1, dictionary_size=2, lowering="lookup")

        def forward(self, x):
            return pool(self.conv(x))

    model, x = Net().eval(), torch.randn(2, 4, 9, 14)
    gm = gathered(model, x)
    assert (len(programs(gm)[0].recipe.steps) > 1) == taken
    assert_equivalent(model, gm, x, factor=16)


@pytest.mark.skipif(not cpu.is_available(), reason="the C++ kernels are unavailable")
@given(networks(), st.sampled_from(["contiguous", "channels_last", "strided", "broadcast"]), st.integers(1, 2), st.booleans())
def test_programs_of_random_networks(case, layout, threads, pool_early):
    before, pool_from = torch.get_num_threads(), program.POOL_FROM
    torch.set_num_threads(threads)
    program.POOL_FROM = 0 if pool_early else pool_from
    try:
        model, x = with_lookups(case.model), case.inputs
        gm = gathered(model, x)
        assert programs(gm)
        with torch.no_grad():
            gm(torch.full_like(x, torch.nan))  # what a call leaves in the arena must not matter to the next
        assert_equivalent(model, gm, laid_out(x, layout), factor=32)
        assert_equivalent(model, gm, x, factor=32)
    finally:
        torch.set_num_threads(before)
        program.POOL_FROM = pool_from


def test_passes_on_an_exported_graph():
    model = randomise(with_lookups(SmallResNet(8)))
    for module in model.modules():
        if isinstance(module, LookupConv2d):
            module.lowering = "lookup"
    x = pictures(2)
    gm = torch.export.export(model, (x,)).module()
    for name in ORDER:
        getattr(passes, name)(gm)
        assert_equivalent(model, gm, x, factor=32)
    fused = [node for node in gm.graph.nodes if is_lookup(node)]
    kinds = [(node.kwargs.get("activation"), node.kwargs.get("residual") is not None) for node in fused]
    # The first convolution is narrow, which makes a lookup of it that may be turned back.
    assert kinds[-5:] == [("relu", False), ("relu", True), (None, False), ("relu", False), ("relu", True)]
    assert not any("batch_norm" in str(t) for t in targets(gm))


def test_find():
    gm = fx.symbolic_trace(with_lookups(Functional()))
    found = passes.find_convolutions(gm)
    assert [(c.name, c.lookup) for c in found] == [("first", False), ("kernel", False), ("kernel", False)]
    gm = fx.symbolic_trace(with_lookups(SmallResNet(8)))
    assert sum(c.lookup for c in passes.find_convolutions(gm)) == 5


def test_lift_shares_a_module_between_calls_of_the_same_geometry():
    model = Functional().eval()
    gm = passes.lift_functional_convolutions(fx.symbolic_trace(model))
    convs = {name: m for name, m in gm.named_modules() if isinstance(m, nn.Conv2d)}
    assert sorted(convs) == ["first", "kernel_conv2d", "kernel_conv2d_1"]
    assert convs["kernel_conv2d"].weight is convs["kernel_conv2d_1"].weight
    assert_equivalent(model, gm, pictures(2))


def test_lift_makes_a_module_for_each_geometry():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(4, 4, 3, 3))

        def forward(self, x):
            return F.conv2d(x, self.kernel, padding=1) + F.conv2d(x, self.kernel, padding=2, dilation=2)

    model, x = Twice().eval(), pictures(2, 9, 4)
    gm = passes.lift_functional_convolutions(fx.symbolic_trace(model))
    convs = [m for m in gm.modules() if isinstance(m, nn.Conv2d)]
    assert [conv.dilation for conv in convs] == [(1, 1), (2, 2)]
    assert_equivalent(model, gm, x)


def test_lift_of_a_weight_that_two_convolutions_of_an_exported_graph_share():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(F.relu(self.a(x)))

    model, x = Tied().eval(), pictures(2, 9, 4)
    gm = passes.lift_functional_convolutions(torch.export.export(model, (x,)).module())
    convs = [name for name, m in gm.named_modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == 2
    assert not any(other.startswith(f"{name}.") for name in convs for other in convs)
    assert_equivalent(model, gm, x)


def test_lift_leaves_computed_weights_alone():
    class Hyper(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 3, 3, 3))

        def forward(self, x):
            return F.conv2d(x, self.w * 2)

    gm = passes.lift_functional_convolutions(fx.symbolic_trace(Hyper()))
    assert F.conv2d in targets(gm)


def test_functional_leaves_writes_that_others_see():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x):
            x = x + 1
            return self.relu(x) + 3 * x

    model, x = Net().eval(), torch.randn(2, 4, 5, 5) - 1
    assert_equivalent(model, passes.to_functional(fx.symbolic_trace(model)), x)


@pytest.mark.parametrize("layer", [nn.Conv2d, LookupConv2d])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_functional_pads_as_the_module_does(layer, mode):
    model = nn.Sequential(layer(4, 6, (3, 4), padding=(1, 2), padding_mode=mode)).eval()
    gm = passes.to_functional(fx.symbolic_trace(model))
    assert not list(gm.graph.find_nodes(op="call_module"))
    assert_equivalent(model, gm, torch.randn(2, 4, 7, 6))


def test_fold_leaves_what_it_may_not_fold():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.conv(x)
            return y + self.norm(y)

    model, x = randomise(Net()), pictures(2)
    gm = passes.fold_batch_norm(fx.symbolic_trace(model))
    assert F.batch_norm in targets(gm)
    assert_equivalent(model, gm, x)
    training = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train())
    assert [n.op for n in passes.fold_batch_norm(training).graph.nodes].count("call_module") == 1


@pytest.mark.parametrize(
    ("layer", "after", "folded"),
    [
        (nn.Conv2d(4, 4, 3, padding=1), lambda y: y * 0.3, True),
        (nn.Conv2d(4, 4, 3, padding=1, bias=False), lambda y: torch.mul(-2, y), True),
        (LookupConv2d(4, 4, 3, padding=1, dictionary_size=2, sparsity=1), lambda y: y / 3, True),
        (LookupConv2d(4, 4, 3, padding=1, dictionary_size=2, sparsity=1, bias=False), lambda y: 0.25 * y, True),
        (nn.Linear(6, 4), lambda y: y.mul(0.125), True),
        (nn.Linear(6, 4, bias=False), lambda y: y.div(8), True),
        (nn.Linear(6, 4), lambda y: y * y.mean() * 2, False),
        (nn.Linear(6, 4), lambda y: 2 * y + y, False),
        (nn.Linear(6, 4), lambda y: 2 / y, False),
        (nn.Linear(6, 4), lambda y: torch.div(y, 2, rounding_mode="floor"), False),
        (nn.Linear(6, 4), lambda y: y * float("inf"), False),
    ],
)
def test_factors(layer, after, folded):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return after(F.linear(x, self.layer.weight, self.layer.bias) if isinstance(self.layer, nn.Linear) else self.layer(x))

    model, x = randomise(Net()), torch.randn(2, 4, 5, 6)
    for gm in (traced(model, x), torch.export.export(model.eval(), (x,)).module(check_guards=False)):
        passes.fold_factors(gm)
        left = [node for node in gm.graph.nodes if any(word in str(node.target) for word in ("mul", "div"))]
        assert bool(left) != folded
        assert_equivalent(model, gm, x)


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 3), LookupConv2d(3, 4, 3, dictionary_size=2, sparsity=1)])
def test_factors_on_any_device(layer):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x) * 2

    gm = passes.fold_factors(fx.symbolic_trace(Net().to("meta")))
    assert len([node for node in gm.graph.nodes if node.op == "call_function"]) == 1


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        (lambda y, x: F.relu(y), ("relu", False, False)),
        (lambda y, x: torch.relu_(y), ("relu", False, False)),
        (lambda y, x: y.relu(), ("relu", False, False)),
        (lambda y, x: y.clamp(0, 6), ("relu6", False, False)),
        (lambda y, x: F.hardtanh(y, 0.0, 6.0), ("relu6", False, False)),
        (lambda y, x: F.silu(y) + x, ("silu", True, True)),
        (lambda y, x: F.hardswish(x + y), ("hardswish", True, False)),
        (lambda y, x: x + y, ("none", True, False)),
        (lambda y, x: F.hardtanh(y), None),
        (lambda y, x: y.clamp(1, 6), None),
        (lambda y, x: torch.add(y, x, alpha=2), None),
        (lambda y, x: y + x.mean(), None),
        (lambda y, x: y + x[:, :, :1], None),
        (lambda y, x: y + 1, None),
        (lambda y, x: y * F.relu(y), None),
        (lambda y, x: F.relu(y) * y, None),
    ],
)
def test_fuse(tail, expected):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = LookupConv2d(4, 4, 3, padding=1, dictionary_size=2, lowering="lookup")

        def forward(self, x):
            return tail(self.conv(x), x)

    model, x = Net().eval(), torch.randn(2, 4, 7, 5)
    gm = passes.fuse_epilogues(traced(model, x))
    node = next(n for n in gm.graph.nodes if is_lookup(n))
    found = tuple(node.kwargs.get(k) for k in ("activation", "residual", "residual_last"))
    if expected is None:
        assert found == (None, None, None)
    else:
        assert (found[0], found[1] is not None, bool(found[2])) == expected
    assert_equivalent(model, gm, x, factor=16)


def test_fuse_does_not_move_a_read_past_a_write():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = LookupConv2d(4, 4, 3, padding=1, dictionary_size=2, lowering="lookup")

        def forward(self, x):
            x = x + 1
            y = self.conv(x)
            x.mul_(2)
            return F.relu(y + x)

    model, x = Net().eval(), torch.randn(2, 4, 7, 5)
    assert_equivalent(model, passes.fuse_epilogues(traced(model, x)), x, factor=16)


@pytest.mark.parametrize("lowering", ["lookup", "factored", "dense", "auto"])
@pytest.mark.parametrize("padding", [1, "same", (2, 0)])
def test_choose(lowering, padding):
    model = nn.Sequential(LookupConv2d(8, 16, (4, 2), padding=padding, groups=2, lowering=lowering)).eval()
    x = torch.randn(2, 8, 12, 9)
    gm = passes.choose_lowerings(traced(model, x))
    convolutions = targets(gm).count(F.conv2d)
    if lowering != "auto":
        assert convolutions == {"lookup": 0, "factored": 2, "dense": 1}[lowering]
    assert_equivalent(model, gm, x, factor=16)


@pytest.mark.parametrize("bias", [True, False])
def test_narrow_convolutions_are_the_same_function(bias):
    model = nn.Sequential(nn.Conv2d(3, 12, (5, 3), (2, 1), (2, 0), (1, 2), bias=bias), nn.ReLU(), nn.Conv2d(12, 4, 3)).eval()
    x = torch.randn(2, 3, 17, 13)
    gm = passes.narrow_convolutions(traced(model, x))
    assert [c.lookup for c in passes.find_convolutions(gm)] == [True, False]
    assert_equivalent(model, gm, x)
    assert_equivalent(model, passes.fuse_epilogues(gm), x)


def test_replace():
    model, x = Functional().eval(), pictures(2)
    gm = passes.lift_functional_convolutions(fx.symbolic_trace(model))
    weights = {
        name: (LookupWeight.lossless(gm.get_submodule(name).weight), gm.get_submodule(name).bias)
        for name in ("first", "kernel_conv2d")
    }
    passes.replace_convolutions(gm, weights)
    assert isinstance(gm.get_submodule("kernel_conv2d"), LookupConv2d)
    assert_equivalent(model, gm, x)
    with pytest.raises(LcnnError, match="'nothing'"):
        passes.replace_convolutions(gm, {"nothing": weights["first"]})


@pytest.mark.parametrize("lowering", ["factored", "dense"])
def test_weights_are_not_rounded_where_a_graph_is_rewritten_under_autocast(lowering):
    model, x = nn.Sequential(LookupConv2d(6, 8, 3, dictionary_size=4)).eval(), torch.randn(2, 6, 9, 9)
    gm = traced(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        passes.decompose_lookups(gm, lowering)
    assert all(value.dtype == torch.float32 for value in gm.state_dict().values() if value.is_floating_point())
    assert_equivalent(model, gm, x, factor=32)
