"""What save() writes, load() reads: buffers of any dtype, shape, layout and value."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from lcnn_compile import LcnnError, LookupConfig, convert, load, save
from lcnn_compile.checkpoint.header import digest_of
from lcnn_compile.checkpoint.stored import OTHERS

SMALL = LookupConfig(dictionary_size=3, sparsity=2, group_size=4)
FLOAT8 = [name for name in OTHERS if name.startswith("float8") and "e8m0" not in name]
BUFFERS = {
    "causal mask": torch.full((5, 5), float("-inf")).triu(1),
    "nan": torch.tensor([float("nan"), 1, float("inf")]),
    "half nan": torch.tensor([float("nan"), 1]).half(),
    "complex": torch.randn(3, 2, dtype=torch.complex64),
    "complex128, conjugated": torch.randn(3, dtype=torch.complex128).conj(),
    "complex nan": torch.tensor([complex(float("nan"), 1)]),
    "negated": torch.randn(3, dtype=torch.complex64).conj().imag,
    "no dimension": torch.tensor(7),
    "complex without dimension": torch.tensor(1 + 2j),
    "uint16 without dimension": torch.tensor(65535, dtype=torch.uint16),
    "empty": torch.empty(0, 3),
    "empty complex": torch.empty(0, 3, dtype=torch.complex64),
    "empty uint32": torch.empty(2, 0, dtype=torch.uint32),
    "bool": torch.tensor([[True], [False]]),
    "transposed": torch.randn(3, 4).t(),
    "every second": torch.arange(10, dtype=torch.uint8)[::2],
    "expanded": torch.randn(1, 3).expand(4, 3),
    "transposed complex": torch.randn(3, 4, dtype=torch.complex64).t(),
    "channels last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    **{
        kind: torch.tensor([1, 2, 200]).to(getattr(torch, kind))
        for kind in ("uint16", "uint32", "uint64", "int8", "int16", "float64")
    },
    **{kind: torch.tensor([1.0, -2, 0.5]).to(OTHERS[kind]) for kind in FLOAT8},
}


def build(**buffers):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.Module()).eval()
    for name, buffer in buffers.items():
        model[1].register_buffer(name, buffer)
    model[1].forward = lambda x: x
    return model


def convert_and_save(model, path):
    model[1].forward = nn.Identity().forward
    made = convert(model, SMALL, calibration=[torch.randn(2, 8, 6, 6)])
    save(made, path)
    return made


def same(a, b):
    raw = [t.resolve_conj().resolve_neg().contiguous().flatten().view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


@pytest.mark.parametrize("kind", BUFFERS)
def test_a_buffer_there_and_back(kind, tmp_path):
    buffer = BUFFERS[kind]
    made = convert_and_save(build(extra=buffer.clone()), tmp_path / "m")
    blank = torch.zeros(buffer.shape, dtype=torch.uint8).to(buffer.dtype)
    found = load(build(extra=blank), tmp_path / "m")
    assert same(found[1].extra, made[1].extra)
    assert same(found[1].extra, buffer)
    x = torch.randn(1, 8, 5, 5)
    assert torch.equal(found[0](x), made[0](x))


def test_buffers_that_share_memory_and_buffers_that_are_not_kept(tmp_path):
    model = build(first=torch.ones(3, dtype=torch.complex64))
    model[1].register_buffer("second", model[1].first)
    model[1].register_buffer("rest", torch.ones(2), persistent=False)
    convert_and_save(model, tmp_path / "m")
    with safe_open(tmp_path / "m", "pt") as file:
        assert sum("first" in key or "second" in key for key in file.keys()) == 1  # noqa: SIM118
        assert not any("rest" in key or "checksum" in key for key in file.keys())  # noqa: SIM118
    again = build(first=torch.zeros(3, dtype=torch.complex64), second=torch.zeros(3, dtype=torch.complex64))
    again[1].register_buffer("rest", torch.full((2,), 5.0), persistent=False)
    found = load(again, tmp_path / "m")
    assert found[1].first.tolist() == found[1].second.tolist() == [1, 1, 1]
    assert found[1].rest.tolist() == [5, 5]


def test_a_layer_under_two_names(tmp_path):
    def tied():
        conv = nn.Conv2d(8, 8, 3, padding=1)
        return nn.Sequential(conv, nn.ReLU(), conv).eval()

    made = convert(tied(), SMALL, calibration=[torch.randn(2, 8, 6, 6)])
    save(made, tmp_path / "m")
    with safe_open(tmp_path / "m", "pt") as file:
        assert all(key.startswith("0.") for key in file.keys())  # noqa: SIM118
    found = load(tied(), tmp_path / "m")
    assert found[0] is found[2]
    x = torch.randn(1, 8, 5, 5)
    assert torch.equal(found(x), made(x))


REFUSED = {
    "sparse": (lambda: torch.eye(3).to_sparse(), "sparse"),
    "subclass": (lambda: torch.Tensor._make_subclass(type("Marked", (torch.Tensor,), {}), torch.ones(2)), "Marked"),
    "meta": (lambda: torch.ones(2, device="meta"), "meta"),
    "quantized": (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "qint8"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_file_cannot_keep(kind, tmp_path):
    make, word = REFUSED[kind]
    made = convert(nn.Sequential(nn.Conv2d(8, 16, 3)).eval(), SMALL, calibration=[torch.randn(2, 8, 6, 6)])
    made.register_buffer("extra", make())
    with pytest.raises(LcnnError, match=f"extra .*{word}"):
        save(made, tmp_path / "m")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["0.dictionary", "0.coefficients", "0.bias"])
def test_lookup_tensors_must_be_finite(name, tmp_path):
    made = convert_and_save(build(extra=torch.ones(2)), tmp_path / "good")
    with torch.no_grad():
        made.get_parameter(name).view(-1)[0] = float("inf")
    with pytest.raises(LcnnError, match=f"{name} has values that are not finite"):
        save(made, tmp_path / "m")


def rewrite(path, change):
    import json

    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["lcnn"])
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    change(header, tensors)
    body = json.dumps(header, sort_keys=True)
    save_file(tensors, path, {"lcnn": body, "digest": digest_of(body, tensors)})


BROKEN = {
    "another dtype": lambda h, t: h["forms"]["1.extra"].update(dtype="object"),
    "no dtype": lambda h, t: h["forms"]["1.extra"].pop("dtype"),
    "too large": lambda h, t: h["forms"]["1.extra"].update(shape=[2**60, 2**60]),
    "another size": lambda h, t: h["forms"]["1.extra"].update(shape=[2]),
    "negative": lambda h, t: h["forms"]["1.extra"].update(shape=[-1, -3]),
    "no form": lambda h, t: h["forms"].update({"1.extra": 3}),
    "unknown tensor": lambda h, t: h["forms"].update({"1.more": h["forms"]["1.extra"]}),
    "no mapping": lambda h, t: h.update(forms=[]),
    "a table": lambda h, t: h["forms"].update({"0.indices": h["forms"]["1.extra"]}),
    "bytes as they are": lambda h, t: h.pop("forms"),
    "nan in a dictionary": lambda h, t: t["0.dictionary"].fill_(float("nan")),
    "nan in a dense parameter": lambda h, t: t["1.weight"].fill_(float("nan")),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_header_that_lies_about_its_bytes(kind, tmp_path):
    model = build(extra=torch.ones(3, dtype=torch.complex64))
    model[1].weight = nn.Parameter(torch.ones(2))
    convert_and_save(model, tmp_path / "m")
    rewrite(tmp_path / "m", BROKEN[kind])
    with pytest.raises(LcnnError):
        load(model, tmp_path / "m")


def test_a_complex_file_for_a_real_buffer(tmp_path):
    convert_and_save(build(extra=torch.ones(3, dtype=torch.complex64)), tmp_path / "m")
    with pytest.raises(LcnnError, match=r"1\.extra has dtype torch\.complex64"):
        load(build(extra=torch.ones(3)), tmp_path / "m")
