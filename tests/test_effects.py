"""What graphs write, read and alias; what may be computed out of place; what may be deleted, moved and gathered."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from lcnn_compile import LcnnError, LookupConv2d, freeze
from lcnn_compile.export import export_program
from lcnn_compile.passes import fuse_epilogues, gather_programs, lift_functional_convolutions, to_functional, to_out_of_place
from lcnn_compile.passes.effects import Effects, eliminate_dead_code, sort, written_inputs
from lcnn_compile.passes.find import is_lookup
from lcnn_compile.passes.programs import programs
from lcnn_compile.passes.targets import is_get_attr


@torch.library.custom_op("lcnn_tests::halve", mutates_args={"x"})
def halve(x: torch.Tensor) -> None:
    x.mul_(0.5)


@halve.register_fake
def _(x: torch.Tensor) -> None:
    return None


def captured(function, *inputs):
    """The graph that Dynamo makes of a function."""
    graphs = []

    def keep(gm, example_inputs):
        graphs.append(gm)
        return gm

    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(function, backend=keep, fullgraph=True)(*[x.clone() for x in inputs])
    [gm] = graphs
    return gm


def image():
    return torch.randn(2, 4, 6, 6)


def named(gm, name):
    return next(node for node in gm.graph.nodes if node.name == name)


def set_item(y, key):
    y[key] = 0.0


WRITES = {
    "method": lambda y: y.add_(1),
    "function": lambda y: torch.relu_(y),
    "function of nn": lambda y: torch.nn.functional.hardtanh_(y),
    "flag": lambda y: F.silu(y, inplace=True),
    "flag by position": lambda y: F.leaky_relu(y, 0.1, True),
    "out": lambda y: torch.mul(y, 3, out=y),
    "view by an operator that says nothing of views": lambda y: torch.ops.aten.atleast_1d.default(y).mul_(2),
    "view by a dispatched operator": lambda y: torch.ops.aten.dropout.default(y, 0.5, False).mul_(2),
    "augmented": lambda y: operator.iadd(y, y),
    "item": lambda y: set_item(y, (slice(None), 0)),
    "item by mask": lambda y: set_item(y, y > 1),
    "slice": lambda y: y[:, :2].mul_(2),
    "view": lambda y: y.view(2, -1).clamp_(0),
    "chunk": lambda y: y.chunk(2, 1)[1].zero_(),
    "transpose": lambda y: y.transpose(1, 2).neg_(),
    "copy": lambda y: y.copy_(torch.ones(6)),
    "indices": lambda y: y.index_fill_(1, torch.tensor([0]), 5.0),
    "scatter": lambda y: y.scatter_(1, torch.zeros(2, 1, 6, 6, dtype=torch.long), 2.0),
    "random": lambda y: y.uniform_(),
    "masked": lambda y: y.masked_fill_(y > 0, -1.0),
    "foreach": lambda y: torch._foreach_mul_([y], 2.0),
    "custom operator": lambda y: halve(y),
    "detached": lambda y: y.detach().mul_(2),
    "through dropout that does nothing": lambda y: F.dropout(y, 0.5, False).mul_(2),
}
READS = {
    "method": lambda y: y.add(1),
    "function": lambda y: torch.relu(y),
    "flag": lambda y: F.silu(y, inplace=False),
    "item": lambda y: y[:, 0],
    "convolution": lambda y: F.conv2d(y, torch.ones(3, 4, 1, 1)),
    "pooling": lambda y: F.max_pool2d(y, 2),
    "norm": lambda y: F.batch_norm(y, torch.zeros(4), torch.ones(4)),
    "to": lambda y: y.double(),
    "sizes": lambda y: y.new_zeros(y.size(0), y.shape[1]),
    "list": lambda y: torch.cat(torch.split(y, 2, 1), 1),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_write_is_seen_and_its_order_kept(name):
    def function(x):
        y = x * 2
        before = y.sum()
        WRITES[name](y)
        return before, y + 1

    gm = captured(function, image())
    effects = Effects(gm)
    y, before, after = named(gm, "y"), named(gm, "before"), named(gm, "add")
    writers = [node for node in effects.writers() if effects.written(node) & effects.memory(y)]
    assert writers
    assert all(effects.has_effect(node) for node in writers)
    assert not effects.movable(before, gm.graph.output_node())
    assert any((before, writer) in effects.order_edges() for writer in writers)
    assert all(effects.memory(y) & effects.touched(node) for node in (before, after))


@pytest.mark.parametrize("name", READS)
def test_what_only_reads_is_no_write(name):
    gm = captured(lambda x: READS[name](x * 2), image())
    effects = Effects(gm)
    assert not effects.writers()
    assert not effects.order_edges()


def test_batch_norm_in_training_writes_its_statistics():
    for training in (True, False):
        norm = nn.BatchNorm2d(4).train(training)
        gm = captured(lambda x: norm(x), image())  # noqa: B023
        effects = Effects(gm)
        written = [n for n in gm.graph.nodes if n.op == "placeholder" and any(effects.written(w) for w in effects.writers())]
        assert bool(written) == training
        mode = fx.symbolic_trace(nn.Sequential(norm))
        assert bool(Effects(mode).writers()) == training


def test_written_inputs_are_found_through_shared_memory():
    state = torch.zeros(8)

    def function(x, first, second):
        first[:2].copy_(x.flatten()[:2])
        return x + second.sum()

    x = torch.randn(3)
    gm = captured(function, x, state[:4].clone(), torch.ones(4))
    places = gm.graph.find_nodes(op="placeholder")
    values = {"x": x, "first": state[:4], "second": state[4:]}
    inputs = [next(v for k, v in values.items() if k in str(node.target)) for node in places]
    found = {str(places[i].target) for i in written_inputs(gm, inputs)}
    assert {name for name in values if any(name in target for target in found)} == {"first", "second"}
    apart = [v.clone() for v in inputs]
    found = {str(places[i].target) for i in written_inputs(gm, apart)}
    assert {name for name in values if any(name in target for target in found)} == {"first"}


def mystery(x):
    return x


def test_out_of_a_function_without_a_schema_is_written():
    graph = fx.Graph()
    x, target = graph.placeholder("x"), graph.placeholder("target")
    norm = graph.call_function(torch.norm, (x,), {"dim": 1, "out": target})
    graph.output(graph.call_function(torch.add, (target, 1)))
    effects = Effects(fx.GraphModule(nn.Module(), graph))
    assert effects.written(norm) == effects.memory(target)
    assert effects.memory(norm) >= effects.memory(target)
    assert effects.has_effect(norm)


def test_unknown_calls_are_fences():
    graph = fx.Graph()
    x = graph.placeholder("x")
    a = graph.call_function(torch.add, (x, 1))
    unknown = graph.call_function(mystery, (a,))
    b = graph.call_function(torch.add, (unknown, a))
    graph.output(b)
    effects = Effects(fx.GraphModule(nn.Module(), graph))
    assert effects.is_fence(unknown)
    assert effects.has_effect(unknown)
    assert not effects.movable(a, b)


def test_autocast_regions_are_fences():
    def function(x):
        y = x + 1
        with torch.autocast("cpu", torch.bfloat16):
            z = y * 2
        return y.relu() + z

    gm = captured(function, image())
    effects = Effects(gm)
    assert sum(effects.is_fence(node) for node in gm.graph.nodes) == 2
    assert not effects.movable(named(gm, "y"), gm.graph.output_node())


def test_shapes_changed_in_place_are_refused():
    gm = captured(lambda x: (x + 1).unsqueeze_(0).relu(), image())
    with pytest.raises(LcnnError, match="unsqueeze_ changes a tensor's shape"):
        Effects(gm)


def test_dead_code_goes_and_effects_stay():
    def function(x, state):
        x * 3
        torch.rand(2)
        state.add_(1)
        y = x + 1
        F.relu(y, inplace=True)
        halve(y)
        return y

    gm = captured(function, image(), torch.zeros(()))
    with gm.graph.inserting_before(gm.graph.output_node()):
        gm.graph.call_function(torch.mul, (named(gm, "y"), 2))
    eliminate_dead_code(gm)
    calls = [node.name for node in gm.graph.nodes if node.op.startswith("call")]
    assert not any("mul" in name for name in calls)
    assert len([n for n in calls if "rand" in n or "add_" in n or "relu" in n or "halve" in n]) == 4


def test_assertions_and_modes_stay_though_nobody_reads_them():
    graph = fx.Graph()
    x = graph.placeholder("x")
    positive = graph.call_method("all", (graph.call_function(operator.gt, (x, 0)),))
    graph.call_function(torch._assert, (positive, "x is not positive"))
    graph.call_function(torch.mul, (x, 3))
    graph.output(graph.call_function(torch.add, (x, 1)))
    gm = fx.GraphModule(nn.Module(), graph)
    eliminate_dead_code(gm)
    gm.recompile()
    assert [n.name for n in gm.graph.nodes if n.op == "call_function"] == ["gt", "_assert", "add"]
    assert torch.equal(gm(torch.ones(2)), torch.full((2,), 2.0))
    with pytest.raises(AssertionError, match="x is not positive"):
        gm(torch.zeros(2))


OUT_OF_PLACE = {
    "relu_": (lambda y: y.relu_(), True),
    "a statement": (lambda y: (F.relu(y, inplace=True), y)[1], True),
    "a number is added": (lambda y: y.add_(1), True),
    "augmented by a tensor": (lambda y: operator.iadd(y, y.mean()), True),
    "augmented by a row": (lambda y: operator.imul(y, y.mean((2, 3), keepdim=True)), True),
    "two in a row": (lambda y: y.relu_().mul_(2), True),
    "out=": (lambda y: torch.sub(y, 2, out=y), True),
    "of another dtype": (lambda y: y.add_(torch.ones(6, 6, dtype=torch.float64)), False),
    "of integers": (lambda y: y.int().add_(1).float(), False),
    "of a slice": (lambda y: (y[:, :1].add_(1), y)[1], False),
    "a view is read later": (lambda y: (y.view(-1), y.relu_())[0], False),
    "a view was read before": (lambda y: (y.view(-1).sum(), y.relu_())[0] + y, True),
    "copied into": (lambda y: y.copy_(y.flip(3)), False),
    "rounded": (lambda y: y.div_(0.3, rounding_mode="floor"), False),
}


@pytest.mark.parametrize("name", OUT_OF_PLACE)
def test_out_of_place_where_nothing_can_tell(name):
    change, rewritten = OUT_OF_PLACE[name]

    def function(x):
        return change(x * 2)

    x = image()
    gm = captured(function, x)
    before = len(Effects(gm).writers())
    assert before
    to_out_of_place(gm)
    gm.graph.lint()
    gm.recompile()
    assert (len(Effects(gm).writers()) == 0) == rewritten
    result = gm(x)
    assert torch.equal(result[0] if isinstance(result, tuple) else result, function(x))


def test_inputs_and_attributes_stay_written():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))
            self.act = nn.ReLU(inplace=True)

        def forward(self, x):
            self.seen += 1
            return self.act(x) * self.seen

    gm = to_functional(torch.export.export(Net(), (image(),)).module(check_guards=False))
    x = image()
    want = x.relu()
    for calls in (1, 2):
        given = x.clone()
        assert torch.equal(gm(given), want * calls)
        assert torch.equal(given, want)
    assert not any(is_get_attr(node) for node in gm.graph.nodes if "seen" in str(node.target))


def test_written_statistics_are_not_folded():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = LookupConv2d(4, 8, 3, dictionary_size=2, lowering="lookup")
            self.norm = nn.BatchNorm2d(8)

        def forward(self, x):
            self.norm.running_mean.mul_(0.5).add_(1)
            return self.norm(self.conv(x))

    model, x = Net().eval(), image()
    frozen = freeze(model, x)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(frozen(x), model(x), atol=1e-5, rtol=1e-5)


def test_sort_keeps_pairs_and_groups_together():
    graph = fx.Graph()
    x = graph.placeholder("x")
    a, b, c, d = (graph.call_function(torch.add, (x, i)) for i in range(4))
    graph.output((a, b, c, d))
    gm = fx.GraphModule(nn.Module(), graph)
    assert sort(gm, [(b, c)], [[a, c]])
    order = list(gm.graph.nodes)
    assert order.index(c) == order.index(a) + 1
    assert order.index(b) < order.index(a)
    assert not sort(gm, [(a, b), (b, c)], [[a, c]])
    assert list(gm.graph.nodes) == order
    gm.graph.lint()


class Chain(nn.Module):
    """Lookup convolutions with something done in between: [N, 4, H, W] to [N, 4, H, W] and what ``between`` returns."""

    def __init__(self, between):
        super().__init__()
        sizes = {"padding": 1, "dictionary_size": 3, "lowering": "lookup"}
        self.convs = nn.ModuleList([LookupConv2d(4, 4, 3, **sizes) for _ in range(4)])
        self.between = between
        self.register_buffer("state", torch.zeros(2, 4, 6, 6))

    def forward(self, x):
        a, b, c, d = self.convs
        y = b(a(x).relu())
        z, more = self.between(self, y)
        return d(c(z).relu() + y), more


def written_twice(model, y):
    y.clamp_(-1, 1)
    early = y.sum()
    y[:, 1] = 0
    return y, early


def statistic_then_counted(model, y):
    early = y.std() * model.state.sum()
    model.state.add_(1)
    return y, early


BETWEEN = {
    "a slice": lambda model, y: (y.index_fill(1, torch.tensor([0]), 0.0), y[:, :1].mul_(0.5)),
    "a stream": lambda model, y: (y + model.state, model.state.copy_(y)),
    "a counter": lambda model, y: (y, model.state.add_(1)),
    "a statistic, then counted": statistic_then_counted,
    "a view kept": lambda model, y: (y.relu(), y.view(-1).mul_(2)),
    "written twice": written_twice,
    "shortcut, then written": lambda model, y: (model.convs[0](y), y.neg_()),
    "written, then read through a view": lambda model, y: (y.view(2, 4, 36).add_(1).view(2, 4, 6, 6), y * 2),
    "the input's memory": lambda model, y: (halve(y), (y, y))[1],
}


@pytest.mark.parametrize("name", BETWEEN)
@pytest.mark.parametrize("tracer", ["dynamo", "export"])
def test_regions_and_epilogues_respect_writes(name, tracer):
    model, x = Chain(BETWEEN[name]).eval(), image()
    state = model.state.clone()
    with torch.no_grad():
        wants = [[t.clone() for t in model(x.clone())] for _ in range(3)]
        after = model.state.clone()
        model.state.copy_(state)
        if tracer == "export":
            gm = torch.export.export(model, (x,)).module(check_guards=False)
            run = lambda x: gm(x)  # noqa: E731
            for node in gm.graph.nodes:
                assert node.op != "call_module"
            gm = gather_programs(fuse_epilogues(to_functional(gm)))
            assert programs(gm)
        else:
            run = torch.compile(model, backend="lcnn")
        for want in wants:
            found = run(x.clone())
            for a, b in zip(found, want, strict=True):
                torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
        held = model.state if tracer == "dynamo" else dict(gm.named_buffers())["state"]
        torch.testing.assert_close(held, after, atol=1e-4, rtol=1e-4)


def relu_after_a_write(conv, x):
    y = conv(x)
    x.add_(1)
    return y.relu()


def sum_after_a_write(conv, x):
    y = conv(x)
    x.add_(1)
    return y + x


def relu_of_a_copy(conv, x):
    y = conv(x)
    flat = y.flatten(1)  # channels_last: a copy, which does not see what is written
    y.mul_(2)
    return flat.relu(), y


@pytest.mark.parametrize("function", [relu_after_a_write, sum_after_a_write, relu_of_a_copy])
def test_epilogues_do_not_cross_a_write(function):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = LookupConv2d(4, 4, 3, padding=1, dictionary_size=3, lowering="lookup")

        def forward(self, x):
            return function(self.conv, x)

    net, x = Net().eval(), image().to(memory_format=torch.channels_last)
    gm = fuse_epilogues(to_functional(fx.symbolic_trace(net)))
    assert any(is_lookup(node) for node in gm.graph.nodes)
    with torch.no_grad():
        torch.testing.assert_close(gm(x.clone()), net(x.clone()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_random_layers_keep_their_place_in_training(training):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Dropout(), nn.Dropout2d()

        def forward(self, x):
            self.first(x)
            return self.second(x)

    gm = fx.symbolic_trace(Net().train(training))
    first, second = (n for n in gm.graph.nodes if n.op == "call_module")
    effects = Effects(gm)
    assert effects.conflict(first, second) == training
    eliminate_dead_code(gm)
    assert [n.target for n in gm.graph.nodes if n.op == "call_module"] == (["first", "second"] if training else ["second"])


def test_a_write_elsewhere_does_not_part_a_region():
    def between(model, y):
        model.state.mul_(0.5)
        return F.max_pool2d(y, 3, 1, 1), model.state.sum()

    model, x = Chain(between).eval(), image()
    gm = torch.export.export(model, (x,)).module(check_guards=False)
    gm = gather_programs(fuse_epilogues(to_functional(gm)))
    assert len(programs(gm)) == 1


def test_a_weight_that_is_written_stays_dense():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 4, 3, 3))

        def forward(self, x):
            with torch.no_grad():
                self.weight.clamp_(-1, 1)
            return F.conv2d(x, self.weight)

    gm = torch.export.export(Net(), (image(),)).module(check_guards=False)
    lift_functional_convolutions(gm)
    assert not any(node.op == "call_module" for node in gm.graph.nodes)
    assert not any(is_lookup(node) for node in gm.graph.nodes)


@pytest.mark.parametrize(
    "write",
    [
        lambda weight: weight.data.mul_(2),
        lambda weight: weight.detach()[0].fill_(0),
        lambda weight: weight.view(-1).clamp_(-1, 1),
        lambda weight: torch.nn.init.zeros_(weight.data),
        lambda weight: weight.swapaxes(0, 1).mul_(2),
        lambda weight: torch._foreach_mul_([weight.detach()], 2.0),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_write_to_a_dense_weight_is_refused_in_compiled_code_too(write):
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = LookupConv2d(4, 8, 3, dictionary_size=2, lowering="lookup")

        def forward(self, x):
            write(self.conv.weight)
            return self.conv(x)

    torch.compiler.reset()
    model, x = Writes().eval(), image()
    with torch.no_grad():
        with pytest.raises(LcnnError, match="write to its weight"):
            model(x)
        with pytest.raises(Exception, match="write to its weight"):
            torch.compile(model, backend="lcnn")(x)
        with pytest.raises(LcnnError, match="write to its weight"):
            freeze(model, x)
        with pytest.raises(LcnnError, match="write to its weight"):
            export_program(model, x, lowering="dense")


@pytest.mark.filterwarnings("ignore")
def test_code_that_is_not_traced_gets_the_guarded_weight():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = LookupConv2d(4, 8, 3, dictionary_size=2, lowering="lookup")

        def forward(self, x):
            exec("self.conv.weight[0].mul_(2)")
            return self.conv(x)

    torch.compiler.reset()
    with torch.no_grad(), pytest.raises(LcnnError, match="write to its weight"):
        torch.compile(Writes().eval(), backend="lcnn")(image())


def test_values_of_a_dense_weight_are_read_in_compiled_code():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = LookupConv2d(4, 8, 3, dictionary_size=2, lowering="lookup")

        def forward(self, x):
            scaled = self.conv.weight / self.conv.weight.norm()
            scaled += 1
            return F.conv2d(x, scaled) + self.conv(x)

    torch.compiler.reset()
    model, x = Reads().eval(), image()
    fast = torch.compile(model, backend="lcnn", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), atol=1e-5, rtol=1e-5)
    model(x).sum().backward()
    wanted = model.conv.dictionary.grad.clone()
    model.conv.dictionary.grad = None
    fast(x).sum().backward()
    torch.testing.assert_close(model.conv.dictionary.grad, wanted, atol=1e-4, rtol=1e-4)
