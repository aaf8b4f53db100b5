"""Element-wise steps of programs, against PyTorch in float64."""

import copy
import math

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from program_runs import assert_one_program, on_threads, same_on_threads
from torch import nn

from lcnn_compile import LookupConfig, convert
from lcnn_compile.errors import KernelError
from lcnn_compile.kernels import cpu
from lcnn_compile.kernels.cpu.elementwise import FUNCTIONS, Map, coalesced, merged
from lcnn_compile.kernels.cpu.program import Program
from lcnn_compile.kernels.cpu.steps import Concat, Recipe, View

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason="the C++ kernels are unavailable")

INF, NAN = math.inf, math.nan
SPECIAL = [
    0.0,
    -0.0,
    1e-38,
    -1e-38,
    1e-6,
    -1e-6,
    0.3,
    -0.3,
    1.0,
    -1.0,
    3.0,
    -3.0,
    15.0,
    -15.0,
    30.0,
    -30.0,
    80.0,
    -80.0,
    INF,
    -INF,
    NAN,
]
ONE = {
    "neg": torch.neg,
    "abs": torch.abs,
    "square": torch.square,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal,
    "exp": torch.exp,
    "log": torch.log,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "erf": torch.erf,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "mish": F.mish,
    "logsigmoid": F.logsigmoid,
    "softsign": F.softsign,
    "leaky_relu": lambda x, slope: F.leaky_relu(x, slope),
    "elu": lambda x, alpha, scale: scale * F.elu(x, alpha),
    "clamp": torch.clamp,
    "softplus": F.softplus,
}
TWO = {
    "add": lambda x, y, a: torch.add(x, y, alpha=a),
    "sub": lambda x, y, a: torch.sub(x, y, alpha=a),
    "mul": torch.mul,
    "div": torch.div,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "prelu": lambda x, y: torch.where(x > 0, x, x * y),
}
PARAMETERS = {
    "leaky_relu": (0.125,),
    "elu": (1.5, 0.75),
    "clamp": (-0.5, 2.0),
    "softplus": (1.5, 20.0),
    "add": (-0.5,),
    "sub": (2.0,),
}


def test_every_function_is_tested():
    assert {**ONE, **TWO}.keys() == FUNCTIONS.keys()


@pytest.mark.parametrize("name", ONE)
def test_functions_of_one_operand(name):
    torch.manual_seed(0)
    x = torch.cat([torch.tensor(SPECIAL), torch.randn(997) * 4, torch.linspace(-20, 20, 3001), torch.randn(300) * 1e-3])
    parameters = PARAMETERS.get(name, ())
    step = Map((0,), (), (), ((name, (0,), parameters),))
    [y] = Program(Recipe(1, (step,), (1,)), [])(x)
    exact = ONE[name](x.double(), *parameters)
    torch_own = ONE[name](x, *parameters).double()
    if name == "silu":  # of minus infinity PyTorch makes 0 times infinity
        keep = x != -INF
        y, exact, torch_own = y[keep], exact[keep], torch_own[keep]
    assert torch.equal(y.isnan(), exact.isnan())
    finite = exact.isfinite() & torch_own.isfinite()
    infinite = exact.isinf()
    assert torch.equal(y[infinite].double(), exact[infinite])
    error, own = (y - exact).abs()[finite], (torch_own - exact).abs()[finite]
    assert bool((error <= 4 * own.clamp(min=0) + 4e-7 * exact.abs()[finite] + 2e-7 * (exact[finite].abs() < 4) + 1e-37).all())


@pytest.mark.parametrize("name", TWO)
def test_functions_of_two_operands(name):
    torch.manual_seed(0)
    grid = torch.tensor([v for v in SPECIAL if abs(v) >= 1e-6 or v == 0])
    x, y = torch.cat([grid.repeat_interleave(len(grid)), torch.randn(500)]), torch.cat([grid.repeat(len(grid)), torch.randn(500)])
    parameters = PARAMETERS.get(name, ())
    step = Map((0, 1), (), (), ((name, (0, 1), parameters),))
    [found] = Program(Recipe(2, (step,), (2,)), [])(x, y)
    torch.testing.assert_close(
        found.double(), TWO[name](x.double(), y.double(), *parameters), rtol=1e-6, atol=1e-37, equal_nan=True
    )


def registers(step, values, constants):
    """What an element-wise step means, in float64."""
    made = [v.double() for v in (*values, *constants)] + [torch.tensor(v, dtype=torch.float64) for v in step.numbers]
    for name, read, parameters in step.operations:
        made.append({**ONE, **TWO}[name](*(made[r] for r in read), *parameters))
    return made[-1]


@given(st.data())
def test_chains_of_values_constants_and_numbers_that_are_broadcast(data):
    torch.manual_seed(data.draw(st.integers(0, 99)))
    rank = data.draw(st.integers(1, 5))
    sizes = [data.draw(st.sampled_from((1, 2, 3, 7, 33, 600 if i == rank - 1 else 5))) for i in range(rank)]

    def part(batch):
        kept = data.draw(st.integers(0 if not batch else rank, rank))
        shape = [s if data.draw(st.booleans()) else 1 for s in sizes[rank - kept :]]
        return torch.randn(shape)

    values = [torch.randn(sizes), *(part(True) for _ in range(data.draw(st.integers(0, 2))))]
    constants = [part(False) for _ in range(data.draw(st.integers(0, 2)))]
    numbers = tuple(data.draw(st.lists(st.floats(-2, 2, width=32), max_size=2, unique=True)))
    operands, operations = len(values) + len(constants) + len(numbers), []
    functions = ("tanh", "sigmoid", "relu", "leaky_relu", "neg", "square", "add", "sub", "mul", "maximum", "prelu")
    for i in range(data.draw(st.integers(1, 6))):
        name = data.draw(st.sampled_from(functions))
        read = [data.draw(st.integers(0, operands + i - 1)) for _ in range(FUNCTIONS[name])]
        operations.append((name, tuple(read), PARAMETERS.get(name, ())))
    operations.append(("add", (0, operands + len(operations) - 1), (1.0,)))
    step = Map(tuple(range(len(values))), tuple(tuple(c.shape) for c in constants), numbers, tuple(operations))
    weights = [tuple(constants)] if constants else []
    recipe = Recipe(len(values), (step,), (len(values),))
    assert Recipe.from_json(recipe.to_json()) == recipe
    exact = registers(step, values, constants)
    [found] = same_on_threads(Program(recipe, weights), *values)
    assert found.shape == exact.shape
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5 * max(1.0, float(exact.abs().max())))


@given(st.data())
def test_steps_that_are_joined_do_what_they_did(data):
    torch.manual_seed(0)
    shapes, steps, weights = [(2, 3, 5), (2, 3, 1)], [], []
    for _ in range(data.draw(st.integers(2, 8))):
        sources = data.draw(st.lists(st.integers(0, len(shapes) - 1), min_size=1, max_size=2))
        constant = data.draw(st.sampled_from((None, (5,), (3, 1))))
        count = len(sources) + (constant is not None)
        read = tuple(data.draw(st.integers(0, count - 1)) for _ in range(2))
        step = Map(
            tuple(sources),
            () if constant is None else (constant,),
            (0.5,),
            (("mul", read, ()), ("sub", (count, count + 1), (1.0,))),
        )
        steps.append(step)
        if constant is not None:
            weights.append((torch.randn(constant),))
        shapes.append(step.shape(shapes))
    outputs = tuple(sorted({len(shapes) - 1, data.draw(st.integers(2, len(shapes) - 1))}))
    values, given_weights = [torch.randn(shape) for shape in shapes[:2]], iter(weights)
    exact = list(values)
    for step in steps:
        exact.append(registers(step, [exact[x] for x in step.inputs], next(given_weights) if step.weighted else ()))
    joined = merged(steps, 2, outputs, weights, shapes)[0]
    assert len(joined) <= len(steps)
    found = Program(Recipe(2, tuple(steps), outputs), weights)(*values)
    for y, value in zip(found, outputs, strict=True):
        torch.testing.assert_close(y.double(), exact[value].expand(y.shape), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("images", [1, 2, 5, 70, 1500, 40000])
@pytest.mark.parametrize("shape", [(1,), (1, 1, 1), (3, 1), (1, 1, 2)])
def test_images_of_a_concatenation_lie_apart(images, shape):
    """A detector stacks the corners of its boxes: what one step makes is an element of each image, and the next one's its neighbour."""
    torch.manual_seed(2)
    x, factor = torch.randn(images, *shape), torch.randn(images, *([1] * len(shape)))
    subtract, add = (Map((0, 1), (), (), ((name, (0, 1), (1.0,)),)) for name in ("sub", "add"))
    square = Map((1,), (), (), (("square", (0,), ()),))
    steps = (subtract, add, square, Map((4, 0), (), (2.5,), (("mul", (0, 2), ()), ("mul", (3, 1), ()))), Concat((2, 5, 3), 1))
    program = Program(Recipe(2, steps, (6,)), [])
    exact, by = x.double(), factor.double()
    exact = torch.cat([exact - by, 2.5 * by * by * exact, exact + by], 1)
    for [y] in on_threads(program, x, factor):
        torch.testing.assert_close(y.double(), exact, rtol=1e-6, atol=1e-6)


def test_a_chain_becomes_one_step_unless_somebody_reads_what_is_in_between():
    half = Map((0,), (), (0.5,), (("mul", (0, 1), ()),))
    last = Map((1, 0), (), (0.5,), (("add", (0, 1), (1.0,)),))
    shapes = [(2, 3)] * 3
    assert len(merged((half, last), 1, (2,), [], shapes)[0]) == 1
    assert len(merged((half, last), 1, (1, 2), [], shapes)[0]) == 2
    assert len(merged((half, View(1, (3, 1)), last), 1, (2, 3), [], [*shapes, (2, 3, 1)])[0]) == 3


def test_dimensions_are_joined_where_strides_say_the_same():
    assert coalesced((2, 3, 4), [(12, 4, 1), (12, 4, 1)], 2) == ([1, 24], [[0, 1], [0, 1]])
    assert coalesced((2, 3, 4), [(12, 4, 1), (0, 1, 0)], 3) == ([2, 3, 4], [[12, 4, 1], [0, 1, 0]])
    assert coalesced((2, 1, 4), [(4, 4, 1), (9, 7, 1)], 2) == ([2, 4], [[4, 1], [9, 1]])
    with pytest.raises(KernelError, match="dimensions"):
        coalesced((2, 3, 4), [(12, 4, 1), (0, 1, 0)], 2)


@pytest.mark.parametrize(
    "step",
    [
        lambda: Map((), (), (1.0,), (("neg", (0,), ()),)),
        lambda: Map((0,), (), (), ()),
        lambda: Map((0,), (), (), (("cosh", (0,), ()),)),
        lambda: Map((0,), (), (), (("add", (0,), ()),)),
        lambda: Map((0,), (), (), (("neg", (1,), ()),)),
        lambda: Map(tuple(range(9)), (), (), (("neg", (0,), ()),)),
        lambda: Map((0,), (), (), (("neg", (0,), ()),) * 33),
        lambda: Recipe.from_json(
            '[1, [["Map", {"inputs": [0], "constants": [], "numbers": [], "operations": [["neg", [-1], []]]}]], [1]]'
        ),
    ],
)
def test_what_no_kernel_may_see_is_refused(step):
    with pytest.raises(KernelError):
        step()


def test_operands_that_do_not_fit_are_refused():
    program = Program(Recipe(2, (Map((0, 1), (), (), (("add", (0, 1), ()),)),), (2,)), [])
    assert program(torch.ones(2, 3), torch.ones(2, 1))[0].shape == (2, 3)
    for wrong in ((2, 4), (3, 3)):
        with pytest.raises(KernelError, match="operands"):
            program(torch.ones(2, 3), torch.ones(wrong))


class Elements(nn.Module):
    """A convolution, then one expression."""

    def __init__(self, expression):
        super().__init__()
        self.conv, self.expression = nn.Conv2d(3, 6, 3, padding=1), expression
        self.gate = nn.Conv2d(6, 6, 1)
        self.scale, self.prelu = nn.Parameter(torch.randn(6, 1, 1)), nn.PReLU(6, 0.1)
        self.norm = nn.BatchNorm2d(6)
        nn.init.normal_(self.norm.running_mean)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)
        nn.init.uniform_(self.norm.weight, 0.5, 2)
        nn.init.normal_(self.norm.bias)

    def forward(self, x):
        return self.expression(self, self.conv(x))


EXPRESSIONS = {
    "x + 1": lambda m, x: x + 1,
    "2 - x": lambda m, x: 2 - x,
    "1 / x": lambda m, x: 1 / (x * x + 1),
    "x / 3": lambda m, x: x / 3,
    "x ** 2": lambda m, x: x**2,
    "sqrt(x ** 2 + 1)": lambda m, x: torch.sqrt(x.pow(2) + 1),
    "add alpha": lambda m, x: torch.add(x, x.tanh(), alpha=0.5),
    "sub alpha": lambda m, x: x.sub(m.scale, alpha=2),
    "rsub": lambda m, x: torch.rsub(x, 1.5),
    "layer scale": lambda m, x: x * m.scale + x,
    "prelu": lambda m, x: m.prelu(x),
    "batch norm": lambda m, x: m.norm(F.elu(x)),
    "gate": lambda m, x: x * torch.sigmoid(m.gate(x.mean((2, 3), keepdim=True))),
    "gate hard": lambda m, x: F.hardsigmoid(m.gate(F.adaptive_avg_pool2d(x, 1))) * x,
    "leaky": lambda m, x: F.leaky_relu(x, 0.2, True),
    "elu": lambda m, x: F.elu(x, 0.7),
    "selu": lambda m, x: F.selu(x),
    "celu": lambda m, x: F.celu(x, 0.7),
    "gelu": lambda m, x: F.gelu(x),
    "gelu tanh": lambda m, x: F.gelu(x, approximate="tanh"),
    "softplus": lambda m, x: F.softplus(x, 2.0, 10.0),
    "mish": lambda m, x: F.mish(x),
    "logsigmoid": lambda m, x: F.logsigmoid(x),
    "relu6": lambda m, x: F.relu6(x + 0.5),
    "hardtanh": lambda m, x: F.hardtanh(x, -0.25, 0.5),
    "clamp": lambda m, x: torch.clamp(x, max=0.25).clamp_min(-0.125),
    "in place": lambda m, x: F.silu(x, inplace=True).mul_(2).add_(x.abs()),
    "maximum": lambda m, x: torch.maximum(x, m.gate(x)),
    "exp": lambda m, x: torch.exp(-x.abs()),
}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_expressions_are_part_of_the_program(name):
    torch.manual_seed(3)
    dense = Elements(EXPRESSIONS[name]).eval()
    model = convert(dense, LookupConfig(dictionary_size=1.0, sparsity=None, lowering="lookup"))
    x = torch.randn(2, 3, 9, 7)
    assert_one_program(dense, model, x, atol=2e-5)


def test_a_batch_norm_after_its_values_were_read_and_weights_that_change():
    torch.manual_seed(4)
    dense = Elements(EXPRESSIONS["batch norm"]).eval()
    model = convert(dense, LookupConfig(dictionary_size=1.0, sparsity=None, lowering="lookup"))
    torch._dynamo.reset()
    run, x = torch.compile(model, backend="lcnn"), torch.randn(2, 3, 9, 7)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(run(x).double(), copy.deepcopy(dense).double()(x.double()), rtol=1e-4, atol=2e-5)
            for network in (dense, model):
                network.norm.running_mean.add_(0.5)
                network.norm.weight.mul_(1.5)
