"""The sources of the C++ kernels, and the flags that they are compiled with. Knows the standard library alone: the wheel is built with it."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).parent / "src"
VERSION = next(
    line.split('"')[1]
    for line in (Path(__file__).parents[2] / "__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)
"""Of the package."""
UNITS = ("kernels.cpp", "interface.cpp", "bfloat16.cpp", "int8.cpp")
"""What is compiled, the longest first."""
SOURCES = (*UNITS, *sorted(path.name for path in FOLDER.glob("*.h")))
NATIVE = FOLDER / "native"
"""What runs programs from files, beside the kernels of every instruction set."""
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma")
VNNI, COMPRESS = ("-mavx512vnni",), ("-mavx512vbmi", "-mavx512vbmi2")
BFLOAT16, MATRIX = ("-mavx512bf16",), ("-mamx-tile", "-mamx-bf16")
AVX2 = ("-mavx2", "-mfma")
ISA_FLAGS = {
    "portable": (),
    "avx2": AVX2,
    "avxvnni": (*AVX2, "-mavxvnni"),
    "avx512": AVX512,
    "avx512vnni": (*AVX512, *VNNI),
    "avx512vbmi2": (*AVX512, *VNNI, *COMPRESS),
    "avx512bf16": (*AVX512, *VNNI, *COMPRESS, *BFLOAT16),
    "amx": (*AVX512, *VNNI, *COMPRESS, *BFLOAT16, *MATRIX),
}
UNFUSED = {"int8.cpp": ("-ffp-contract=off",)}
"""Sources in which every operation is rounded, whatever the instruction set has."""
NEEDS = {
    "portable": "NOTHING",
    "avx2": "AVX2_FMA",
    "avxvnni": "AVX2_FMA | AVX_VNNI",
    "avx512": "AVX512",
    "avx512vnni": "AVX512 | AVX512_VNNI",
    "avx512vbmi2": "AVX512 | AVX512_VNNI | AVX512_VBMI2",
    "avx512bf16": "AVX512 | AVX512_VNNI | AVX512_VBMI2 | AVX512_BF16",
    "amx": "AVX512 | AVX512_VNNI | AVX512_VBMI2 | AVX512_BF16 | AMX",
}
"""Features of native/choose.cpp, the fastest set last."""
INSTALLED = Path(__file__).parent / "lib"
"""Where the wheel has liblcnn.so, and beside it a digest of what it was made of."""
RUNTIME = ("lcnn.cpp", "choose.cpp", "threads.cpp")
"""Compiled once, for any processor of the kind."""
HIDDEN = ("-fvisibility=hidden", "-fvisibility-inlines-hidden", "-fno-gnu-unique")
SECONDS = 1800


def build_shared(
    target: Path, compiler: str, sets: Sequence[str] | None = None, extra: Sequence[str] = (), tools: str = ""
) -> None:
    """Compile liblcnn.so: the kernels of all instruction sets, chosen from at run time, and the functions of native/lcnn.h.

    The objects of a set are linked into one whose names others do not see, but for its table: else the linker would keep one version of
    every inline function and template, from whatever set it saw first.

    Args:
        target: the file, replaced once it is whole.
        compiler: a C++ compiler; ``ld``, ``nm`` and ``objcopy`` of ``tools`` + their name are called beside it.
        sets: keys of ISA_FLAGS; all on x86-64, else the portable ones.
        extra: more flags, such as those of a sanitizer.
        tools: a prefix of binutils, such as "aarch64-linux-gnu-".

    Raises:
        OSError: a tool is missing, or fails.
    """
    if sets is None:
        sets = tuple(NEEDS) if platform.machine() in ("x86_64", "AMD64") else ("portable",)
    flags = (*(flag for flag in FLAGS if flag != "-shared"), "-fopenmp", *HIDDEN, *extra)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        work = Path(folder)
        (work / "sets.inc").write_text("".join(f"LCNN_SET({name}, {NEEDS[name]})\n" for name in NEEDS if name in sets))
        jobs = []
        for name in sets:
            table = f"-DLCNN_KERNELS=lcnn_kernels_{name}"
            for source in (*(FOLDER / unit for unit in UNITS), NATIVE / "kernel_table.cpp"):
                made = work / f"{name}-{source.stem}.o"
                own = (*ISA_FLAGS[name], *UNFUSED.get(source.name, ()), table)
                jobs.append([compiler, *flags, *own, "-c", "-o", str(made), str(source)])
        for source in (NATIVE / name for name in RUNTIME):
            own = (f"-I{work}", f'-DLCNN_VERSION="{VERSION}"')
            jobs.append([compiler, *flags, *own, "-c", "-o", str(work / f"{source.stem}.o"), str(source)])
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(_run, jobs))
        wholes = []
        for name in sets:
            whole = work / f"{name}.o"
            units = [str(work / f"{name}-{Path(unit).stem}.o") for unit in (*UNITS, "kernel_table.cpp")]
            _run([f"{tools}ld", "-r", "--force-group-allocation", "-o", str(whole), *units])
            if "_GLOBAL__sub_I" in _run([f"{tools}nm", str(whole)]):
                raise OSError(
                    f"the kernels of {name} run code as they are loaded, which is of a set that the processor may not have"
                )
            _run([f"{tools}objcopy", f"--keep-global-symbol=lcnn_kernels_{name}", str(whole)])
            wholes.append(str(whole))
        built = work / target.name
        alone = (
            "-static-libstdc++",
            "-static-libgcc",
            "-Wl,--exclude-libs,ALL",
            "-Wl,-soname,liblcnn.so",
            "-Wl,-z,defs,-z,nodelete",
        )
        small = () if extra else ("-s",)
        parts = [*wholes, *(str(work / f"{Path(name).stem}.o") for name in RUNTIME)]
        _run([compiler, *extra, "-shared", *alone, *small, "-o", str(built), *parts, "-lpthread", "-ldl"])
        built.replace(target)


def _run(command: list[str]) -> str:
    if shutil.which(command[0]) is None:
        raise FileNotFoundError(f"{command[0]} is not installed")
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    if done.returncode:
        raise OSError(f"{Path(command[0]).name} failed: {done.stderr.strip()[-1000:]}")
    return done.stdout


def sources_digest() -> str:
    """A digest of all sources and flags of liblcnn.so."""
    found = hashlib.sha256(repr((FLAGS, ISA_FLAGS, NEEDS, UNFUSED, HIDDEN, VERSION)).encode())
    for path in (*(FOLDER / name for name in SOURCES), *sorted(NATIVE.iterdir())):
        if path.suffix in (".cpp", ".h"):
            found.update(path.read_bytes())
    return found.hexdigest()


def made_of_these_sources(folder: Path) -> bool:
    """Whether the library in a folder is there, and of these sources: in a checkout they change after it was installed."""
    try:
        return (folder / "liblcnn.so").exists() and (folder / "sources.sha256").read_text() == sources_digest()
    except OSError:
        return False


def install(folder: Path, compiler: str) -> None:
    """Build the library into a folder, with its digest; nothing where it is there.

    Raises:
        OSError: as :func:`build_shared`.
    """
    if made_of_these_sources(folder):
        return
    folder.mkdir(parents=True, exist_ok=True)
    build_shared(folder / "liblcnn.so", compiler)
    (folder / "sources.sha256").write_text(sources_digest())
