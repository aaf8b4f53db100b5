"""The library on ARM: cross-compiled for aarch64 and run by an emulator, on models that were exported here; ``make arm``.

    apt-get install g++-aarch64-linux-gnu qemu-user

Layers of bytes must give the bits that they give here; what is computed in float32 may differ by the order of its sums.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

from test_native import net  # noqa: E402
from test_program_networks import NETWORKS, settled  # noqa: E402

from lcnn_compile import LookupConfig, convert, freeze  # noqa: E402
from lcnn_compile.export import export_native  # noqa: E402
from lcnn_compile.kernels.cpu.sources import build_shared  # noqa: E402

TOOLS = "aarch64-linux-gnu-"
EMULATOR = ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"]


def run(folder: Path, x: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The output by the emulated processor."""
    x.numpy().tofile(folder / "x.bin")
    subprocess.run([*EMULATOR, "./example", "model.lcnn", "x.bin", "y.bin"], cwd=folder, check=True)
    return torch.from_numpy(np.fromfile(folder / "y.bin", np.float32)).view(shape)


def bytes_alone() -> tuple[torch.nn.Module, torch.Tensor]:
    """A network all of whose layers are of bytes, but for the last one's output."""
    torch.manual_seed(0)
    convs = [
        torch.nn.Conv2d(3, 16, 3, padding=1),
        torch.nn.Conv2d(16, 24, 3, stride=2),
        torch.nn.Conv2d(24, 8, 3, groups=2, padding=2),
    ]
    model = torch.nn.Sequential(convs[0], torch.nn.ReLU(), torch.nn.MaxPool2d(2), convs[1], torch.nn.Hardswish(), convs[2]).eval()
    config = LookupConfig(dictionary_size=0.75, sparsity=3, group_size=4, lowering="lookup", precision="int8")
    return convert(model, config, calibration=[torch.randn(4, 3, 33, 31)]), torch.randn(5, 3, 33, 31)


def check(name: str, model: torch.nn.Module, x: torch.Tensor, library: Path, folder: Path, exact: bool) -> None:
    """One model on both processors."""
    export_native(model, folder, x)
    (folder / "liblcnn.so").write_bytes(library.read_bytes())
    build = [f"{TOOLS}gcc", "-O1", "example.c", "-o", "example", "-L.", "-llcnn", "-Wl,-rpath,."]
    subprocess.run(build, cwd=folder, check=True)
    with torch.no_grad():
        wanted = freeze(model, x)(x)
    found = run(folder, x, wanted.shape)
    if exact:
        assert torch.equal(found, wanted), f"{name}: other bits than here"
    else:
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 if name != "int8" else 2e-2)
    print(f"{name}: {'the same bits' if exact else f'largest difference {float((found - wanted).abs().max()):.1e}'}", flush=True)


def main() -> None:
    """Cross-compile, then every precision and every network of the tests."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        library = folder / "liblcnn.so"
        build_shared(library, f"{TOOLS}g++", sets=["portable"], tools=TOOLS)
        for precision in ("float32", "bfloat16", "int8"):
            check(precision, *net(precision), library, folder / precision, False)
        check("int8 throughout", *bytes_alone(), library, folder / "bytes", True)
        for network, (make, shape) in NETWORKS.items():
            model = convert(settled(make), LookupConfig(dictionary_size=1.0, sparsity=None, lowering="lookup"))
            check(network, model, torch.rand(2, *shape), library, folder / network.replace(" ", "-"), False)


if __name__ == "__main__":
    main()
