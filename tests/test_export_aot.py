"""AOTInductor packages take the inputs they were compiled for, or refuse; never do they read memory of another form."""

import copy
import json

import pytest
import torch
from nets import pictures, randomise
from torch import nn

from lcnn_compile import LcnnError, LookupConfig, convert
from lcnn_compile.export import export_aot, load_aot
from lcnn_compile.testing import assert_close


class Streaming(nn.Module):
    """Writes to its input and to a buffer, and takes a number that becomes a constant."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(6, 7, 3, padding=1)
        self.register_buffer("state", torch.zeros(7))

    def forward(self, x, power=1, *, scale):
        x.mul_(2)
        y = self.conv(x).relu_()
        self.state += y.mean((0, 2, 3))
        return y * scale[:, None, None, None] ** power, self.state.clone()


def examples(count):
    return {"x": pictures(count, 9, 6), "power": 2, "scale": torch.rand(count) + 0.5}


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    torch.manual_seed(0)
    config = LookupConfig(dictionary_size=0.5, sparsity=2)
    model = convert(randomise(Streaming()), config, calibration=[examples(3)], example_inputs=examples(3)).eval()
    path = tmp_path_factory.mktemp("aot") / "model.pt2"
    with torch._inductor.config.patch("aot_inductor.compile_wrapper_opt_level", "O0"):
        export_aot(model, path, examples(2), lowering="factored")
    return model, path


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "part": lambda x: torch.cat([x, x], 3)[..., ::2],
    "one sample": lambda x: x[:1].transpose(0, 1).contiguous().transpose(0, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_memory_layout_gives_the_models_values(package, layout):
    model, path = package
    x = LAYOUTS[layout](pictures(5, 9, 6))
    scale = (torch.rand(2 * len(x)) + 0.5)[::2]
    loaded, own, wide = load_aot(path), copy.deepcopy(model), copy.deepcopy(model).double()
    for _ in range(2):  # the state of the first call counts in the second
        given, kept, reference = (x.clone(memory_format=torch.preserve_format) for _ in range(3))
        reference = reference.double()
        with torch.no_grad():
            wanted, exact = own(kept, power=2, scale=scale), wide(reference, power=2, scale=scale.double())
            found = loaded(x=given, power=2, scale=scale)
        for y, plain, precise in zip((*found, given), (*wanted, kept), (*exact, reference), strict=True):
            assert_close(y, plain, precise, factor=32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.double(), r"input 0 is torch.float32 of shape \[1 to any, 6, 9, 9\] on cpu; it got torch.float64"),
        (lambda x: x[..., 1:], r"it got torch.float32 of shape \[2, 6, 9, 8\]"),
        (lambda x: x[0], r"it got torch.float32 of shape \[6, 9, 9\]"),
        (lambda x: x[:0], r"shape \[0, 6, 9, 9\]"),
        (lambda x: x[:, :4], r"shape \[2, 4, 9, 9\]"),
        (lambda x: 3, "is a tensor of torch.float32; it got int"),
    ],
)
def test_other_forms_are_refused(package, change, message):
    _, path = package
    with pytest.raises(LcnnError, match=message):
        load_aot(path)(x=change(pictures(2, 9, 6)), power=2, scale=torch.ones(2))


def test_other_structures_and_constants_are_refused(package):
    _, path = package
    run, x, scale = load_aot(path), pictures(2, 9, 6), torch.ones(2)
    with pytest.raises(LcnnError, match="input 1 is the constant 2 of this package; it got 3; export it again"):
        run(x=x, power=3, scale=scale)
    for call in (
        lambda: run(x=x, scale=scale),
        lambda: run(x=x, power=2),
        lambda: run(x, 2, scale=scale),
        lambda: run(x=x, power=2, scale=scale, other=x),
        lambda: run(x=(x,), power=2, scale=scale),
    ):
        with pytest.raises(LcnnError, match="the package takes"):
            call()


@pytest.mark.parametrize(
    "change", [lambda x: LAYOUTS["channels_last"](x), lambda x: x.double(), lambda x: x[..., 1:], lambda x: x[0]]
)
def test_a_package_that_pytorch_alone_loads_refuses_too(package, change, monkeypatch):
    monkeypatch.delenv("AOTI_RUNTIME_CHECK_INPUTS", raising=False)
    model, path = package
    run, x = torch._inductor.aoti_load_package(str(path)), pictures(2, 9, 6)
    with torch.no_grad():
        own = copy.deepcopy(model)(x.clone(), power=2, scale=torch.ones(2))
    torch.testing.assert_close(run(x=x.clone(), power=2, scale=torch.ones(2)), own, atol=1e-4, rtol=1e-4)
    with pytest.raises(RuntimeError, match=r"unmatched|dimensions"):
        run(x=change(x), power=2, scale=torch.ones(2))


def test_batch_sizes_that_differ_are_refused(package):
    _, path = package
    for run, error in ((load_aot(path), LcnnError), (torch._inductor.aoti_load_package(str(path)), RuntimeError)):
        with pytest.raises(error, match=r"input 2 is torch.float32 of shape \[3\]|unmatched"):
            run(x=pictures(3, 9, 6), power=2, scale=torch.ones(2))


def test_files_that_are_no_packages_are_named(tmp_path, package):
    with pytest.raises(LcnnError, match=r"none.pt2 is not a file"):
        load_aot(tmp_path / "none.pt2")
    (tmp_path / "text.pt2").write_text("no package")
    with pytest.raises(LcnnError, match=r"text.pt2 cannot be loaded as an AOTInductor package"):
        load_aot(tmp_path / "text.pt2")


def test_a_package_states_its_inputs(package):
    _, path = package
    metadata = torch._inductor.aoti_load_package(str(path)).get_metadata()
    first, number, last = json.loads(metadata["lcnn_inputs"])
    assert first["sizes"][1:] == [6, 9, 9]
    assert first["sizes"][0][:2] == [1, None]
    assert last["sizes"] == first["sizes"][:1]
    assert first["written"]
    assert number == {"value": 2}
    assert last["strides"] == [1]
