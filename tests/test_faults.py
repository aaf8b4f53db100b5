"""What goes wrong around the kernels (caches, compilers, Inductor, Triton) gives one warning and a correct result."""

import os
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from nets import SmallResNet, pictures, randomise

from lcnn_compile import LcnnWarning, LookupConfig, LookupConv2d, convert
from lcnn_compile.kernels.cpu import build as cpu_build
from lcnn_compile.kernels.triton import ops as triton_ops

SMALL = LookupConfig(dictionary_size=3, sparsity=2, group_size=4)
PROGRAM = """
import sys, warnings
import torch
from lcnn_compile import LcnnWarning, LookupConv2d
torch.manual_seed(0)
layer, x = LookupConv2d(8, 16, 3, padding=1, lowering="lookup"), torch.randn(2, 8, 9, 11)
with warnings.catch_warnings(record=True) as seen, torch.no_grad():
    warnings.simplefilter("always")
    for _ in range(3):
        y = layer(x)
    torch.testing.assert_close(y, layer.to_conv()(x), atol=1e-4, rtol=1e-4)
    messages = [str(w.message) for w in seen if issubclass(w.category, LcnnWarning)]
print(len(messages), *messages)
"""


def started(**environment):
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "OMP_NUM_THREADS": "1", "LCNN_CPU_ISA": "portable", "LCNN_CPU_COMPILE": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result(process):
    output, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
    return output


def test_eight_processes_share_an_empty_cache(tmp_path):
    processes = [started(LCNN_CACHE_DIR=str(tmp_path)) for _ in range(8)]
    assert [result(p).split()[0] for p in processes] == ["0"] * 8
    assert len(list(tmp_path.glob("*.so"))) == 1


def test_a_corrupt_library_and_a_stale_lock(tmp_path, monkeypatch):
    monkeypatch.setenv("LCNN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("LCNN_CPU_COMPILE", "1")
    monkeypatch.setenv("LCNN_CPU_ISA", "portable")
    path = cpu_build.target()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(os.urandom(10_000))
    Path(f"{path}.lock").touch()
    assert result(started(LCNN_CACHE_DIR=str(tmp_path))).split()[0] == "0"
    assert path.stat().st_size > 10_000


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"x": 3}', b"\xff\xfe\x00"])
def test_corrupt_measurements_are_measured_again(tmp_path, monkeypatch, damage):
    from lcnn_compile.kernels import store

    file = tmp_path / "lowerings.json"
    file.write_bytes(damage)
    assert store.known(file).get("problem") is None
    store.remember(file, "problem", {"lookup": 1.0})
    assert store.known(file)["problem"] == {"lookup": 1.0}


def _full(folder):
    """A directory on a file system without space: /dev/full stands for it where mounting is not allowed."""
    folder.rmdir()
    folder.symlink_to("/dev/full")


def _read_only(folder):
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)


def _file_in_the_way(folder):
    folder.rmdir()
    folder.write_text("not a directory")


@pytest.mark.parametrize("spoil", [_full, _file_in_the_way, _read_only])
def test_a_cache_that_cannot_be_written(tmp_path, spoil):
    folder = tmp_path / "cache"
    folder.mkdir()
    spoil(folder)
    if spoil is _read_only and os.geteuid() == 0:
        pytest.skip("root writes anywhere")
    count, *words = result(started(LCNN_CACHE_DIR=str(folder))).split()
    assert count == "1"
    assert "factored" in words


def test_inductor_failing_on_the_graph(backend_reset, monkeypatch):
    from lcnn_compile.backend import entry as backend
    from lcnn_compile.backend import guard

    def fail(*args, **kwargs):
        raise RuntimeError("no code for this graph")

    monkeypatch.setattr(backend, "compile_with_inductor", fail)
    for model in (convert(randomise(SmallResNet(8)), SMALL, calibration=[pictures(4)]), randomise(SmallResNet(8))):
        torch.compiler.reset()
        guard._warned.clear()
        compiled, x = torch.compile(model, backend="lcnn", options={"dictionary_size": 1.0, "sparsity": None}), pictures(2)
        with warnings.catch_warnings(record=True) as seen, torch.no_grad():
            warnings.simplefilter("always")
            for _ in range(3):
                torch.testing.assert_close(compiled(x), model(x), atol=1e-4, rtol=1e-4)
        messages = [str(w.message) for w in seen if issubclass(w.category, LcnnWarning)]
        assert sum("no code for this graph" in m for m in messages) <= 1
        # Where the whole graph became one native program, Inductor was never asked.
        assert len(messages) <= 1


def test_training_goes_on_where_inductor_fails(backend_reset, monkeypatch):
    from lcnn_compile.backend import entry as backend

    def fail(*args, **kwargs):
        raise RuntimeError("no code for this graph")

    monkeypatch.setattr(backend, "compile_with_inductor", fail)
    layer, x = LookupConv2d(4, 8, 3), torch.randn(2, 4, 8, 8)
    compiled = torch.compile(layer, backend="lcnn")
    with pytest.warns(LcnnWarning, match="no code for this graph"):
        y = compiled(x)
    y.sum().backward()
    torch.testing.assert_close(y, layer(x))
    assert layer.coefficients.grad.any()


def test_triton_failing_is_said_once_and_not_tried_again(monkeypatch):
    monkeypatch.setattr(triton_ops, "_unusable", {})
    device = torch.device("cuda:0")
    with pytest.warns(LcnnWarning, match="ptxas failed.*factored") as seen, triton_ops.attempt(device):
        raise RuntimeError("ptxas failed")
    assert len(seen) == 1
    assert not triton_ops.usable("cuda", torch.float32)
