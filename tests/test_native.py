"""export_native: programs as files, run by liblcnn.so without Python, equal to freeze to the bit."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_program_networks import NETWORKS, settled
from torch import nn

from lcnn_compile import LookupConfig, convert, freeze
from lcnn_compile.errors import ExportError
from lcnn_compile.export import export_native, load_native
from lcnn_compile.kernels import cpu

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason="the C++ kernels are unavailable")

SMALL = {"dictionary_size": 0.5, "sparsity": 3, "group_size": 4, "lowering": "lookup"}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 24, 3, stride=2, padding=(0, 2), groups=2)
        self.third = nn.Conv2d(24, 24, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(24)
        self.last = nn.Linear(24, 5)

    def forward(self, x):
        x = F.relu(self.second(F.relu(self.first(x))))
        x = F.relu(self.norm(self.third(x)) + x)
        return self.last(F.max_pool2d(x, 2).mean((2, 3)))


def net(precision="float32", shape=(3, 17, 19)):
    model = Net().eval()
    x = torch.randn(2, *shape)
    return convert(model, LookupConfig(**SMALL, precision=precision), calibration=[torch.randn(4, *shape)]), x


def assert_equal(model, x, folder, batches=(1, 2, 3, 70), **options):
    """What is exported gives the same bits as what is frozen, for several batches."""
    frozen = freeze(model, x, **options)
    assert frozen.alone, frozen.left_over
    export_native(model, folder, x, **options)
    native = load_native(folder)
    for batch in batches:
        inputs = [torch.randn(batch, *one.shape[1:]) for one in (x if isinstance(x, tuple) else (x,))]
        found, wanted = native(*inputs), frozen(*inputs)
        several = isinstance(found, tuple)
        for ours, theirs in zip(found if several else (found,), wanted if several else (wanted,), strict=True):
            assert ours.shape == theirs.shape
            assert torch.equal(ours, theirs.contiguous())
    return native


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_every_kind_of_step(name, tmp_path):
    make, shape = NETWORKS[name]
    model = convert(settled(make), LookupConfig(dictionary_size=1.0, sparsity=None, lowering="lookup"))
    assert_equal(model, torch.rand(2, *shape), tmp_path)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_precisions(precision, tmp_path):
    native = assert_equal(*net(precision), tmp_path)
    assert native.inputs[0].shape == (None, 3, 17, 19)
    assert native.outputs[0].shape == (None, 5)


def test_a_fixed_batch(tmp_path):
    model, x = net()
    assert_equal(model, x, tmp_path, batches=(2,), dynamic_batch=False)
    with pytest.raises(ExportError, match=r"shape \(3, 3, 17, 19\)"):
        load_native(tmp_path)(torch.randn(3, 3, 17, 19))


class Several(nn.Module):
    """Two inputs; outputs that are views, in other orders and of one memory."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 3), nn.Conv2d(2, 8, 3)

    def forward(self, a, b):
        x = self.left(a) + self.right(b)
        return x, x.permute(0, 2, 3, 1), x[:, 2:5], x.flatten(1), torch.sigmoid(x)[:, :, ::2]


def test_several_inputs_and_outputs(tmp_path):
    model = convert(Several().eval(), LookupConfig(dictionary_size=1.0, sparsity=None, lowering="lookup"))
    native = assert_equal(model, (torch.randn(2, 3, 9, 11), torch.randn(2, 2, 9, 11)), tmp_path)
    assert [port.name for port in native.inputs] == ["a", "b"]
    assert native.outputs[1].shape == (None, 7, 9, 8)


class Crossed(Several):
    """The second input is read first."""

    def forward(self, a, b):
        return self.left(b) * 2 + self.left(a)


def test_inputs_are_in_the_order_of_the_call(tmp_path):
    model = convert(Crossed().eval(), LookupConfig(dictionary_size=1.0, sparsity=None, lowering="lookup"))
    native = assert_equal(model, (torch.randn(2, 3, 9, 11), torch.randn(2, 3, 9, 11)), tmp_path)
    assert [port.name for port in native.inputs] == ["a", "b"]


class Ignoring(nn.Module):
    """Its first input is read by nothing, its last output has no elements where ``empty``."""

    def __init__(self, empty):
        super().__init__()
        self.conv, self.empty = nn.Conv2d(2, 8, 3), empty

    def forward(self, unused, x):
        y = self.conv(x)
        return (y, y[:, :0]) if self.empty else y


def test_inputs_that_the_model_ignores_are_taken_and_empty_outputs_are_refused(tmp_path):
    x = torch.randn(2, 3, 4), torch.randn(2, 2, 9, 11)
    config = LookupConfig(dictionary_size=1.0, sparsity=None, lowering="lookup")
    native = assert_equal(convert(Ignoring(False).eval(), config), x, tmp_path)
    assert [port.name for port in native.inputs] == ["unused", "x"]
    with pytest.raises(ExportError, match=r"without elements|not one program"):
        export_native(convert(Ignoring(True).eval(), config), tmp_path / "empty", x)


class Sorted(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x):
        return self.conv(x).flatten(1).sort(1).values


def test_what_is_not_one_program_is_refused_by_name(tmp_path):
    model = convert(Sorted().eval(), LookupConfig(dictionary_size=1.0, sparsity=None, lowering="lookup"))
    with pytest.raises(ExportError, match=r"not one program.*sort"):
        export_native(model, tmp_path / "out", torch.randn(2, 3, 9, 9))
    assert not (tmp_path / "out").exists()


def test_the_example_in_c(tmp_path):
    model, x = net()
    export_native(model, tmp_path, x)
    build = "cc -std=c99 -Wall -Wextra -Werror example.c -o example -L. -llcnn -Wl,-rpath,."
    subprocess.run(build, shell=True, cwd=tmp_path, check=True)
    said = subprocess.run(["./example", "model.lcnn"], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert said == "input x: float32 [batch, 3, 17, 19]\noutput output: float32 [batch, 5]\n"
    for batch in (2, 5):
        y = torch.randn(batch, 3, 17, 19)
        y.numpy().tofile(tmp_path / "x.bin")
        subprocess.run(["./example", "model.lcnn", "x.bin", "y.bin"], cwd=tmp_path, check=True)
        found = torch.from_numpy(np.fromfile(tmp_path / "y.bin", np.float32)).view(batch, 5)
        assert torch.equal(found, freeze(model, x)(y))
    (tmp_path / "x.bin").write_bytes(b"12345")
    done = subprocess.run(
        ["./example", "model.lcnn", "x.bin", "y.bin"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (1, "x.bin cannot be read as float32\n")


def test_the_library_needs_nothing_but_the_c_library(tmp_path):
    export_native(*net()[:1], tmp_path, torch.randn(2, 3, 17, 19))
    needed = subprocess.run(["ldd", "liblcnn.so"], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    names = {line.split()[0].rpartition("/")[2] for line in needed.splitlines()}
    assert names <= {"linux-vdso.so.1", "libm.so.6", "libc.so.6", "ld-linux-x86-64.so.2", "libpthread.so.0"}


SANITIZERS = {"address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"), "thread": ("-fsanitize=thread",)}


@pytest.mark.parametrize("kind", SANITIZERS)
def test_callers_under_sanitizers(kind, tmp_path):
    """A C program of several threads; the library itself is sanitized by tests/native/sanitize.py."""
    export_native(*net()[:1], tmp_path, torch.randn(2, 3, 17, 19))
    for source in ("example.c", str(Path(__file__).parent / "native" / "threads.c")):
        build = [
            "cc",
            "-g",
            *SANITIZERS[kind],
            "-I.",
            source,
            "-o",
            Path(source).stem,
            "-L.",
            "-llcnn",
            "-lpthread",
            "-Wl,-rpath,.",
        ]
        if subprocess.run(build, cwd=tmp_path, capture_output=True, check=False).returncode:
            pytest.skip(f"this compiler has no {kind} sanitizer")
    torch.randn(3, 3, 17, 19).numpy().tofile(tmp_path / "x.bin")
    subprocess.run(["./example", "model.lcnn", "x.bin", "y.bin"], cwd=tmp_path, check=True)
    for threads in ("1", "3"):
        done = subprocess.run(["./threads", "model.lcnn", threads], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "all threads agree\n", "")


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
def test_the_example_under_valgrind(tmp_path):
    export_native(*net()[:1], tmp_path, torch.randn(2, 3, 17, 19))
    subprocess.run("cc -g example.c -o example -L. -llcnn -Wl,-rpath,.", shell=True, cwd=tmp_path, check=True)
    torch.randn(2, 3, 17, 19).numpy().tofile(tmp_path / "x.bin")
    command = ["valgrind", "-q", "--error-exitcode=9", "--leak-check=full", "./example", "model.lcnn", "x.bin", "y.bin"]
    environment = {**os.environ, "LCNN_CPU_ISA": "portable"}  # it knows no wider vectors than 256 bits
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_python_without_torch(tmp_path):
    model, x = net("int8")
    export_native(model, tmp_path, x)
    np.save(tmp_path / "x.npy", x.numpy())
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import numpy as np; from lcnn_native import Model\n"
        "with Model('model.lcnn') as model:\n"
        "    [y] = model(np.load('x.npy')); times = model.profile(np.load('x.npy'), calls=2)\n"
        "assert times[1].kind == 'lookup convolution of bytes' and all(t.seconds >= 0 for t in times), times\n"
        "np.save('y.npy', y)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert torch.equal(torch.from_numpy(np.load(tmp_path / "y.npy")), freeze(model, x)(x))


def test_many_threads_share_one_model(tmp_path):
    model, x = net()
    export_native(model, tmp_path, x)
    native, frozen = load_native(tmp_path), freeze(model, x)
    inputs = [torch.randn(1 + i % 5, 3, 17, 19) for i in range(24)]
    wanted, found = [frozen(one) for one in inputs], [None] * len(inputs)

    def work(first):
        for i in range(first, len(inputs), 4):
            for _ in range(10):
                found[i] = native(inputs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def damaged(data, kind):
    if kind == "cut off":
        return data[:-100]
    if kind == "longer":
        return data + bytes(64)
    if kind == "empty":
        return b""
    if kind == "another version":
        return data[:8] + bytes([99]) + data[9:]
    if kind == "no model":
        return b"PK" + data[2:]
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


REASONS = {
    "cut off": "not as long as it says",
    "longer": "not as long as it says",
    "empty": "too short",
    "another version": "version 99; this library reads version 1",
    "no model": "no model of lcnn_compile",
    "one bit": "checksum is wrong",
}


@pytest.mark.parametrize("kind", REASONS)
def test_damaged_files_are_refused(kind, tmp_path):
    file = export_native(*net()[:1], tmp_path, torch.randn(2, 3, 17, 19))
    file.write_bytes(damaged(file.read_bytes(), kind))
    with pytest.raises(ExportError, match=REASONS[kind]):
        load_native(tmp_path)


def test_calls_that_do_not_fit_are_refused(tmp_path):
    export_native(*net()[:1], tmp_path, torch.randn(2, 3, 17, 19))
    native = load_native(tmp_path)
    with pytest.raises(ExportError, match="float64; float32 is required"):
        native(torch.zeros(2, 3, 17, 19).double())
    with pytest.raises(ExportError, match=r"has shape \(2, 3, 17, 18\)"):
        native(torch.zeros(2, 3, 17, 18))
    with pytest.raises(ExportError, match="takes 1 inputs; it got 2"):
        native(torch.zeros(2, 3, 17, 19), torch.zeros(2, 3, 17, 19))
    with pytest.raises(ExportError, match=r"has no model\.lcnn"):
        load_native(tmp_path / "elsewhere")
