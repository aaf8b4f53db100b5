"""Chains: the operator by its reference, the pass that forms them, and pooling before bias and ReLU."""

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from lcnn_compile import LcnnError, LookupConv2d
from lcnn_compile.kernels.triton.chain_operator import chain
from lcnn_compile.kernels.triton.chain_pack import pack_bias, pack_next, pack_weight
from lcnn_compile.passes import chain_lookups, fold_batch_norm, fuse_epilogues, pool_first, to_functional

LAST = torch.channels_last


def lookup(channels, filters, stride=1, vectors=None, kernel=3, padding=1, taps=4):
    """A random lookup convolution."""
    sizes = {"dictionary_size": vectors or channels // 4, "sparsity": taps, "group_size": 8, "lowering": "lookup"}
    return LookupConv2d(channels, filters, kernel, stride, padding, **sizes)


class Block(nn.Module):
    """Of a ResNet; ``shortcut``: a dense convolution with stride."""

    def __init__(self, channels, filters, shortcut=False):
        super().__init__()
        stride = 2 if shortcut else 1
        self.first, self.second = lookup(channels, filters, stride), lookup(filters, filters)
        self.norms = nn.ModuleList(nn.BatchNorm2d(filters) for _ in range(2))
        for norm in self.norms:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
        self.shortcut = nn.Conv2d(channels, filters, 1, stride) if shortcut else nn.Identity()

    def forward(self, x):
        y = F.relu(self.norms[0](self.first(x)))
        return F.relu(self.norms[1](self.second(y)) + self.shortcut(x))


class Noting(fx.Interpreter):
    """Leaves examples on the nodes."""

    def run_node(self, n):
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            n.meta["example_value"] = value
        return value


def chained(model, x):
    """The model's graph with its chains; examples as a tracer leaves them."""
    gm = to_functional(fx.symbolic_trace(model))
    with torch.no_grad():
        Noting(gm).run(x)
        gm = fuse_epilogues(fold_batch_norm(gm))
        Noting(gm).run(x)
        return chain_lookups(gm, "cpu")


def calls(gm):
    """Of the operator: (forms a product, keeps its output) for each."""
    found = [node for node in gm.graph.nodes if node.target is chain]
    return [(node.args[4] is not None, node.args[13]) for node in found]


def check(model, *inputs):
    """The chained graph; its values are as near to float64 as the model's own in bfloat16."""
    model = model.eval().requires_grad_(False)
    inputs = [x.bfloat16().contiguous(memory_format=LAST) for x in inputs]
    half = torch.nn.Module.bfloat16(model)
    with torch.no_grad():
        gm = chained(half, inputs[0])
        found, own = gm(*(x.clone() for x in inputs)), half(*(x.clone() for x in inputs))
        truth = half.double()(*(x.double() for x in inputs))
        half.bfloat16()
    apart = [float((y.double() - truth).norm() / truth.norm()) for y in (found, own)]
    assert apart[0] <= 2 * apart[1] + 0.004, apart
    return gm


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def image(channels=32, size=9, batch=2):
    return torch.randn(batch, channels, size, size)


def test_a_block_hands_on_the_next_dictionarys_product():
    """The first layer's S is formed alone, its output never written; the block's output is written, for it is the shortcut too."""
    gm = check(nn.Sequential(Block(32, 32), Block(32, 32)), image())
    assert calls(gm) == [(False, True), (True, False), (True, True), (True, False), (False, True)]


def test_a_strided_shortcut_gives_its_bias_to_the_sum():
    gm = check(nn.Sequential(Block(32, 48, True)), image())
    assert calls(gm) == [(False, True), (True, False), (False, True), (False, True)]
    [shortcut] = [node for node in gm.graph.nodes if node.target is chain and node.args[7:9] == ((1, 1), (2, 2))]
    assert shortcut.args[2] is None


def test_a_dense_layer_hands_on_too():
    class Bottleneck(nn.Module):
        def __init__(self):
            super().__init__()
            self.reduce, self.middle, self.widen = nn.Conv2d(32, 16, 1), lookup(16, 16), nn.Conv2d(16, 32, 1)

        def forward(self, x):
            return F.relu(self.widen(F.relu(self.middle(F.relu(self.reduce(x))))) + x)

    gm = check(Bottleneck(), image())
    assert calls(gm) == [(True, False), (False, True), (False, True)]
    assert not [node for node in gm.graph.nodes if node.target in (F.relu, torch.add)]


@pytest.mark.parametrize("write", [True, False])
def test_a_write_in_between_keeps_them_apart(write):
    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = lookup(32, 32), lookup(32, 32)

        def forward(self, x):
            y = self.first(x)
            if write:
                y[:, :, 0].mul_(2)
            return self.second(y) + y

    gm = check(Written(), image())
    assert calls(gm) == ([(False, True)] * 4 if write else [(False, True), (True, True), (False, True)])


def test_a_write_through_a_view_after_both_changes_the_output_only():
    class After(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = lookup(32, 32), lookup(32, 32)

        def forward(self, x):
            y = self.first(x)
            z = self.second(y)
            y[:, 1:3].zero_()
            return z + y

    assert calls(check(After(), image())) == [(False, True), (True, True), (False, True)]


def test_two_layers_that_read_the_same_output():
    """One of them takes its S from the layer before."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.left, self.right = lookup(32, 32), lookup(32, 16), lookup(32, 16, kernel=1, padding=0)

        def forward(self, x):
            y = torch.relu(self.first(x))
            return self.left(y) * self.right(y)

    assert sorted(calls(check(Two(), image()))) == [(False, True)] * 4 + [(True, True)]


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(lookup(32, 32), nn.SiLU(), lookup(32, 24, 2), nn.Hardswish()),
        nn.Sequential(lookup(32, 33, vectors=5), nn.ReLU6(), lookup(33, 8, vectors=17, padding=(0, 2))),
        nn.Sequential(lookup(32, 16), nn.MaxPool2d(2), lookup(16, 16)),
        nn.Sequential(nn.Conv2d(32, 16, 1), nn.ReLU(), lookup(16, 16)),
        nn.Sequential(lookup(32, 32, padding="same"), lookup(32, 16)),
    ],
)
def test_values(model):
    assert calls(check(model, image()))


@pytest.mark.parametrize("what", ["float32", "contiguous", "grouped", "many vectors", "factored", "other device", "autocast"])
def test_what_stays_as_it_is(what):
    model = nn.Sequential(lookup(32, 32), lookup(32, 32)).eval().requires_grad_(False)
    if what == "grouped":
        model = nn.Sequential(LookupConv2d(32, 32, 3, groups=2, group_size=8, lowering="lookup")).eval().requires_grad_(False)
    if what == "many vectors":
        model = nn.Sequential(lookup(160, 32, vectors=160)).eval().requires_grad_(False)
    if what == "factored":
        for layer in model:
            layer.lowering = "auto"
    x = image(160 if what == "many vectors" else 32).contiguous(memory_format=LAST)
    if what != "float32":
        model, x = model.bfloat16(), x.bfloat16()
    if what == "contiguous":
        x = x.contiguous()
    gm = to_functional(fx.symbolic_trace(model))
    Noting(gm).run(x)
    gm = fuse_epilogues(gm)
    Noting(gm).run(x)
    before = gm.code
    with torch.autocast("cpu", torch.bfloat16, enabled=what == "autocast"):
        assert chain_lookups(gm, None if what == "other device" else "cpu").code == before


@pytest.mark.parametrize("inplace", [True, False])
def test_pooling_comes_before_bias_and_relu(inplace):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace), nn.MaxPool2d(3, 2, 1)).eval()
    nn.init.normal_(model[1].bias)
    x = image(3, 11)
    gm = to_functional(fx.symbolic_trace(model))
    for node in gm.graph.nodes:
        if node.op == "call_module":
            with gm.graph.inserting_before(node):
                new = gm.graph.call_function(F.max_pool2d, (node.args[0], 3, 2, 1))
            node.replace_all_uses_with(new)
            gm.graph.erase_node(node)
    gm.recompile()
    with torch.no_grad():
        gm = fold_batch_norm(gm)
        Noting(gm).run(x)
        gm = pool_first(gm, "cpu")
        names = [getattr(node.target, "__name__", "") for node in gm.graph.nodes if node.op == "call_function"]
        assert names[-2:] == ["add", "relu"]
        torch.testing.assert_close(gm(x), model(x))


def test_the_operator_names_what_does_not_fit():
    x = image(16).contiguous(memory_format=LAST)
    weight, bias, matrix = torch.randn(24, 16, 3, 3), torch.randn(24), torch.randn(5, 24)
    packed = [pack_weight(weight), pack_bias(bias), None, pack_next(matrix)]
    rest = [24, 5, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), "relu", False, True]
    y, s = chain(x, *packed, *rest)
    wanted = F.relu(F.conv2d(x, weight, bias, 1, 1))
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(s, F.conv2d(wanted, matrix[:, :, None, None]))
    torch.library.opcheck(chain, (x, *packed, *rest), test_utils=("test_schema", "test_faketensor"))
    for place, value, text in (
        (0, x[0], "input"), (1, packed[0][1:], "weight"), (2, bias, "bias"), (3, x, "residual"), (4, packed[3][:, 1:], "next"),
        (6, 300, "next"), (8, (0, 1), "stride"), (9, (1, 1), "padding"), (11, "tanh", "activation"), (2, bias.double(), "bias"),
    ):  # fmt: skip
        arguments = [x, *packed, *rest]
        arguments[place] = value
        with pytest.raises(LcnnError, match=text):
            chain(*arguments)
    with pytest.raises(LcnnError, match="wanted"):
        chain(x, *packed[:3], None, *rest[:-1], False)
