"""Models called in every way that Python knows, converted, explained, frozen and exported as they are called."""

import collections
import dataclasses
import warnings
from typing import NamedTuple

import pytest
import torch
from torch import nn

from lcnn_compile import LcnnError, LcnnWarning, LookupConfig, convert, explain, freeze
from lcnn_compile.batches import Inputs, batch_inputs, call_model, inputs_of
from lcnn_compile.export import export_program

SAME = LookupConfig(dictionary_size=1.0, sparsity=None, lowering="lookup")


class Net(nn.Module):
    """Two convolutions; subclasses say how they are called."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)

    def run(self, x):
        return self.b(self.a(x).relu())


class Masked(Net):
    def forward(self, x, mask=None):
        return self.run(x) if mask is None else self.run(x * mask)


class Variadic(Net):
    def forward(self, *inputs, **more):
        y = self.run(inputs[0])
        for value in (*inputs[1:], *more.values()):
            y = y * value
        return y


class KeywordOnly(Net):
    def forward(self, x, *, mask=None, flip: bool = False, gain=1.0, mode="add"):
        y = self.run(x.flip(-1) if flip else x) * gain
        if mask is None:
            return y
        return y + mask if mode == "add" else y * mask


class PositionalOnly(Net):
    def forward(self, x, scale=2, /, shift=0.0):
        return self.run(x) * scale + shift


class TwoThenRest(Net):
    def forward(self, x, y, *rest, last=None):
        z = self.run(x) - self.run(y)
        for value in rest:
            z = z + value
        return z if last is None else z * last


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


@dataclasses.dataclass
class Sample:
    image: torch.Tensor
    weight: float
    boxes: list


@dataclasses.dataclass(frozen=True)
class Answer:
    map: torch.Tensor
    mean: torch.Tensor
    name: str = "answer"


class Nested(Net):
    def forward(self, features, sample=None):
        y = self.run(features["p"][0]) + self.run(features["q"].left) * features["gain"]
        if sample is not None:
            y = y + sample.image * sample.weight + sample.boxes[0]
        return {"out": [y, (y.mean(), None)], "n": 3}


class Records(Net):
    def forward(self, sample):
        y = self.run(sample.image) * sample.weight
        return Answer(y, y.mean((2, 3)))


class Odd(Net):
    """Outputs that are inputs, constants, None, buffers, sizes, or twice the same."""

    def __init__(self):
        super().__init__()
        self.register_buffer("constant", torch.arange(3.0))

    def forward(self, x, given):
        y = self.run(x)
        return y, y, given, None, self.constant, 7, "text", x.shape[0], Pair(y, given), collections.OrderedDict(z=y + 1)


def image(*size):
    return torch.randn(*(size or (2, 4, 8, 8)), generator=torch.Generator().manual_seed(sum(size)))


def mask():
    return torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(9))


CALLS = {
    "optional": (Masked, (image(), mask()), {}),
    "optional, left out": (Masked, (image(),), {}),
    "optional, none": (Masked, (image(), None), {}),
    "optional, by name": (Masked, (image(),), {"mask": mask()}),
    "all by name": (Masked, (), {"mask": mask(), "x": image()}),
    "variadic": (Variadic, (image(), mask(), mask()), {}),
    "variadic by name": (Variadic, (image(), mask()), {"first": mask(), "second": mask() + 1}),
    "keyword-only": (KeywordOnly, (image(),), {"mask": mask()}),
    "flags": (KeywordOnly, (image(),), {"mask": mask(), "flip": True, "mode": "times"}),
    "a number": (KeywordOnly, (image(),), {"gain": 0.25}),
    "positional-only": (PositionalOnly, (image(), 3), {"shift": torch.tensor(0.5)}),
    "rest and keyword-only": (TwoThenRest, (image(), image() + 1, mask(), mask()), {"last": mask()}),
    "one tensor twice": (TwoThenRest, (image(), image()), {}),
    "nested": (Nested, ({"p": [image(), 2], "q": Pair(image(), mask()), "gain": 0.5},), {}),
    "dataclass inside": (
        Nested,
        ({"p": [image()], "q": Pair(image(), mask()), "gain": 2},),
        {"sample": Sample(mask(), 0.5, [mask(), None])},
    ),
    "dataclass in and out": (Records, (Sample(image(), 2.0, []),), {}),
    "odd outputs": (Odd, (image(), mask()), {}),
}


def dense(build):
    torch.manual_seed(0)
    return build().eval()


def same(found, wanted):
    assert type(found) is type(wanted)
    if isinstance(wanted, torch.Tensor):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    elif dataclasses.is_dataclass(wanted):
        same(vars(found), vars(wanted))
    elif isinstance(wanted, dict):
        assert list(found) == list(wanted)
        for key in wanted:
            same(found[key], wanted[key])
    elif isinstance(wanted, list | tuple):
        assert len(found) == len(wanted)
        for a, b in zip(found, wanted, strict=True):
            same(a, b)
    else:
        assert found == wanted


@pytest.fixture
def interpreted(monkeypatch):
    """What is left of a frozen graph runs node by node: compiling takes long, and is tested elsewhere."""
    monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)


@pytest.mark.parametrize("case", CALLS)
def test_converted_and_frozen_are_called_as_the_model(case, interpreted):
    build, args, kwargs = CALLS[case]
    model = dense(build)
    with warnings.catch_warnings():
        warnings.simplefilter("error", LcnnWarning)
        made = convert(model, SAME, calibration=[Inputs(*args, **kwargs)] * 2)
    assert [row.replaced for row in made.lcnn_report] == [True, True]
    assert all(row.macs_before > 0 for row in explain(model, SAME, example_inputs=Inputs(*args, **kwargs)))
    with torch.no_grad():
        wanted = model(*args, **kwargs)
        same(made(*args, **kwargs), wanted)
    for dynamic in (True, False):
        same(freeze(made, Inputs(*args, **kwargs), dynamic_batch=dynamic)(*args, **kwargs), wanted)


@pytest.mark.parametrize("case", [name for name in CALLS if "dataclass" not in name])
def test_exported_programs_are_called_as_the_model(case):
    build, args, kwargs = CALLS[case]
    made = convert(dense(build), SAME, calibration=[Inputs(*args, **kwargs)])
    with torch.no_grad():
        wanted = made(*args, **kwargs)
        same(export_program(made, Inputs(*args, **kwargs), lowering="lookup").module()(*args, **kwargs), wanted)


def test_arguments_by_position_and_name_in_any_order(interpreted):
    made = convert(dense(KeywordOnly), SAME, example_inputs=image())
    x, m = image(), mask()
    frozen = freeze(made, {"flip": True, "x": x, "mask": m})
    wanted = made(x, mask=m, flip=True).detach()
    for call in (
        lambda: frozen(x, flip=True, mask=m),
        lambda: frozen(mask=m, x=x, flip=True),
        lambda: frozen(x, gain=1.0, mode="add", mask=m, flip=True),
    ):
        same(call(), wanted)
    for kwargs, word in (
        ({"mask": m}, "flip"),
        ({"mask": m, "flip": False}, "flip"),
        ({"mask": m, "flip": 1}, "flip"),
        ({"flip": True}, "mask"),
        ({"flip": True, "mask": m, "gain": 2.0}, "gain"),
        ({"flip": True, "mask": m, "mode": "times"}, "mode"),
        ({"flip": True, "mask": m, "unknown": 1}, "unknown"),
    ):
        with pytest.raises(LcnnError, match=word):
            frozen(x, **kwargs)
    with pytest.raises(LcnnError, match="mask"):
        freeze(convert(dense(Masked), SAME), (x, None))(x, m)
    features = {"p": [x], "q": Pair(x, m), "gain": 0.5}
    frozen = freeze(convert(dense(Nested), SAME), (features,))
    with pytest.raises(LcnnError, match="gain"):
        frozen({"p": [x], "q": Pair(x, m), "gain": 1.0})
    with pytest.raises(LcnnError, match="features"):
        frozen({"q": Pair(x, m), "p": [x], "gain": 0.5})


def test_two_inputs_are_not_taken_for_one(interpreted):
    made = convert(dense(TwoThenRest), SAME)
    x, y = image(), image() + 1
    for dynamic in (True, False):
        frozen = freeze(made, (x, x), dynamic_batch=dynamic)
        same(frozen(x, y), made(x, y).detach())
        program = export_program(made, (x, x), dynamic_batch=dynamic)
        same(program.module()(x, y), made(x, y).detach())


def test_what_is_left_over_is_not_passed():
    class One(Net):
        def forward(self, x):
            return self.run(x)

    x, labels = image(), torch.zeros(2, dtype=torch.long)
    for batch in ((x, labels), [x, labels], (x, labels, "more")):
        assert inputs_of(One(), batch)[0][0] is x
        assert len(inputs_of(One(), batch)[0]) == len(batch_inputs(One(), batch).args) == 1
    made = convert(dense(One), SAME, calibration=[(x, labels)])
    same(freeze(made, (x, labels))(x), made(x).detach())


@pytest.mark.parametrize(
    ("build", "batch", "passed"),
    [
        (Masked, (image(), mask()), 2),
        (Masked, (image(), torch.zeros(2, dtype=torch.long)), 1),
        (Masked, (image(), torch.zeros(2, 8, 8, dtype=torch.long)), 1),
        (Masked, (image(), torch.zeros(2, 1, 8, 8, dtype=torch.bool)), 2),
        (Masked, (image(), None), 2),
        (Masked, (image(), 3), 1),
        (Masked, (image(), ["cat", "dog"]), 1),
        (Variadic, (image(), mask()), 2),
        (Variadic, (image(), mask(), torch.zeros(2, dtype=torch.long)), 2),
        (TwoThenRest, (image(), torch.zeros(2, dtype=torch.long)), 2),
        (PositionalOnly, (image(), torch.zeros(2)), 1),
        (PositionalOnly, (image(), 3), 2),
    ],
)
def test_labels_are_told_from_optional_inputs(build, batch, passed):
    assert len(batch_inputs(build(), batch).args) == passed


def test_labels_in_the_place_of_an_optional_input_are_named():
    seen = []

    class Recording(Masked):
        def forward(self, x, mask=None):
            seen.append(mask)
            return super().forward(x, mask)

    x, labels = image(), torch.ones(2, dtype=torch.long)
    with pytest.warns(LcnnWarning, match="labels and not passed as 'mask'"):
        convert(Recording(), SAME, calibration=[(x, labels)])
    assert seen
    assert all(given is None for given in seen)
    seen.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", LcnnWarning)
        # Example inputs say how many there are.
        convert(Recording(), SAME, calibration=[(x, mask())], example_inputs=x)
        assert all(given is None for given in seen)
        seen.clear()
        convert(
            Recording(), SAME, calibration=[(x, labels[:, None, None, None])], example_inputs=(x, labels[:, None, None, None])
        )
    assert all(given is not None for given in seen)
    seen.clear()
    convert(Recording(), SAME, calibration=[{"mask": mask(), "x": x}])
    assert all(given is not None for given in seen)


def test_a_mapping_whose_names_fit_nothing_is_the_input():
    class One(Net):
        def forward(self, batch):
            return self.run(batch["image"])

    made = convert(dense(One), SAME, calibration=[{"image": image(), "label": torch.zeros(2)}])
    same(made({"image": image()}), dense(One)({"image": image()}))
    assert inputs_of(PositionalOnly(), {"shift": 1.0, "x": 2, "scale": 3}) == ((2, 3), {"shift": 1.0})
    assert inputs_of(TwoThenRest(), {"x": 1, "y": 2, "rest": (3, 4), "last": 5}) == ((1, 2, 3, 4), {"last": 5})


def test_calls_see_copies():
    class Normalising(Net):
        def forward(self, x, pair):
            return self.run(x.sub_(1.0).div_(2.0)) + pair.left.mul_(2)

    x, left = image(), mask()
    before = x.clone(), left.clone()
    made = convert(dense(Normalising), SAME, calibration=[(x, Pair(left, left))])
    assert torch.equal(x, before[0])
    assert torch.equal(left, before[1])
    assert max(row.error for row in made.lcnn_report) < 1e-4
    call_model(made, (x, Pair(left, left)))
    assert torch.equal(x, before[0])


WRAPPERS = {
    "compile": torch._dynamo.optimize("eager"),
    "DataParallel": nn.DataParallel,
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
    "several": lambda model: torch._dynamo.optimize("eager")(torch.optim.swa_utils.AveragedModel(nn.DataParallel(model))),
}


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_wrappers(wrap, tmp_path, interpreted):
    inner = dense(Masked)
    x, m = image(), mask()
    wrapped = WRAPPERS[wrap](inner)
    made = convert(wrapped, SAME, calibration=[(x, m)]).eval()
    assert [row.replaced for row in made.lcnn_report] == [True, True]
    wanted = inner(x, m).detach()
    same(made(x, m).detach(), wanted)
    same(freeze(made, (x, m))(x, mask=m), wanted)
    same(export_program(made, (x, m)).module()(x, m), wanted)


def test_images_without_a_batch(interpreted):
    class Flat(Net):
        def forward(self, x, gain):
            return self.run(x) * gain

    x, gain = image(4, 8, 8), torch.rand(4, 1, 1)
    made = convert(dense(Flat), SAME, calibration=[(x, gain)])
    frozen = freeze(made, (x, gain))
    same(frozen(x, gain), dense(Flat)(x, gain).detach())
    with pytest.raises(LcnnError, match="freeze it again"):
        frozen(image(2, 8, 8), gain)
    same(export_program(made, (x, gain)).module()(x, gain), made(x, gain).detach())


def test_sizes_that_are_alike_by_chance(interpreted):
    class Scaled(Net):
        def forward(self, x, per_channel, per_sample):
            return self.run(x) * per_channel.view(1, -1, 1, 1) + per_sample.view(-1, 1, 1, 1)

    made = convert(dense(Scaled), SAME)
    given = (image(4, 4, 8, 8), torch.rand(4), torch.rand(4))
    frozen = freeze(made, given)
    for batch in (1, 3, 4):
        x = (image(batch, 4, 8, 8), torch.rand(4), torch.rand(batch))
        same(frozen(*x), made(*x).detach())
    with pytest.raises(LcnnError, match="freeze it again"):
        frozen(image(3, 4, 8, 8), torch.rand(4), torch.rand(2))
    with pytest.raises(LcnnError, match="freeze it again"):
        frozen(image(3, 4, 8, 8), torch.rand(3), torch.rand(3))


def test_a_batch_of_one_with_a_way_of_its_own(interpreted):
    class Single(Net):
        def forward(self, x):
            return self.run(x) if x.shape[0] == 1 else self.run(x) - 1

    made = convert(dense(Single), SAME)
    frozen = freeze(made, image())
    same(frozen(image(3, 4, 8, 8)), made(image(3, 4, 8, 8)).detach())
    with pytest.raises(LcnnError, match="2 at least"):
        frozen(image(1, 4, 8, 8))
    same(freeze(made, image(1, 4, 8, 8), dynamic_batch=False)(image(1, 4, 8, 8)), made(image(1, 4, 8, 8)).detach())

    class Four(Net):
        def forward(self, x):
            return self.run(x) if x.shape[0] < 4 else self.run(x) - 1

    made = convert(dense(Four), SAME)
    with pytest.raises(LcnnError, match="capture"):
        freeze(made, image())


def test_objects_that_may_hide_tensors_are_refused():
    class Box:
        def __init__(self, x):
            self.x = x

    class One(Net):
        def forward(self, box, give=False):
            y = self.run(box.x if isinstance(box, Box) else box)
            return Box(y) if give else y

    made = convert(dense(One), SAME, calibration=[Box(image())])
    with pytest.raises(LcnnError, match="box is a Box"):
        freeze(made, Box(image()))
    with pytest.raises(LcnnError, match="output is a Box"):
        freeze(made, (image(), True))
    with pytest.raises(LcnnError, match="takes"):
        freeze(made, {"box": image(), "wrong": 1})
