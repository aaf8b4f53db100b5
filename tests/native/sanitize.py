"""liblcnn.so under sanitizers: damaged model files in an address-sanitized build, threads in a thread-sanitized one.

    python tests/native/sanitize.py [FILES [FOLDER]]      # 20,000 mutated files in all unless said otherwise; FOLDER keeps the library

Networks of every kind of step are exported; their files are mutated, opened and run.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

from test_native import net  # noqa: E402
from test_program_networks import NETWORKS, settled  # noqa: E402

from lcnn_compile import LookupConfig, convert  # noqa: E402
from lcnn_compile.export import export_native  # noqa: E402
from lcnn_compile.kernels.cpu.build import instruction_set  # noqa: E402
from lcnn_compile.kernels.cpu.sources import NATIVE, build_shared  # noqa: E402

SANITIZE = ("-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
ENVIRONMENT = {
    **os.environ,
    "ASAN_OPTIONS": "detect_leaks=1:allocator_may_return_null=1:max_allocation_size_mb=4096",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
}


def models(folder: Path) -> list[Path]:
    """A file of every network."""
    found = []
    for precision in ("float32", "bfloat16", "int8"):
        model, x = net(precision, (3, 9, 11))
        found.append(export_native(model, folder / precision, x))
    for name, (make, shape) in NETWORKS.items():
        model = convert(settled(make), LookupConfig(dictionary_size=1.0, sparsity=None, lowering="lookup"))
        found.append(export_native(model, folder / name.replace(" ", "-"), torch.rand(2, *shape)))
    return found


def main() -> None:
    """Build, export, mutate."""
    total = int(sys.argv[1]) if len(sys.argv) > 1 else 20000
    with tempfile.TemporaryDirectory() as name:
        folder = Path(sys.argv[2] if len(sys.argv) > 2 else name).absolute()
        folder.mkdir(exist_ok=True)
        if not (folder / "liblcnn.so").exists():
            build_shared(folder / "liblcnn.so", "g++", sets=list(dict.fromkeys(("portable", instruction_set()))), extra=SANITIZE)
        program = folder / "mutate_files"
        command = ["g++", "-std=c++17", *SANITIZE, f"-I{NATIVE}", "-o", str(program), str(HERE / "mutate_files.cpp")]
        subprocess.run([*command, f"-L{folder}", "-llcnn", f"-Wl,-rpath,{folder}"], check=True)
        files = models(folder)
        for seed, file in enumerate(files):
            print(f"{file.parent.name}: {file.stat().st_size} bytes", flush=True)
            subprocess.run([str(program), str(file), str(-(-total // len(files))), str(seed)], check=True, env=ENVIRONMENT)


if __name__ == "__main__":
    main()
