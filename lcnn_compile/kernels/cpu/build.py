"""Load the C++ kernels: those that were installed with the package, else compiled at first use into a per-user cache.

Environment variables:
    LCNN_CACHE_DIR: directory of the compiled libraries, instead of the user's cache directory.
    LCNN_CPU_ISA: a key of ISA_FLAGS, such as "avx512" or "portable", instead of what the processor supports.
    LCNN_CPU_COMPILE: "1" compiles for this processor here, instead of taking the kernels that were installed.
    LCNN_CPU_SANITIZE: "1" builds with the address and undefined-behaviour sanitizers.
    CXX: the compiler, instead of the first of c++, g++ and clang++.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import filelock
import torch

from lcnn_compile.errors import KernelError, LcnnWarning
from lcnn_compile.files import digest
from lcnn_compile.kernels.cpu.sources import (
    BFLOAT16,
    COMPRESS,
    FLAGS,
    FOLDER,
    INSTALLED,
    ISA_FLAGS,
    MATRIX,
    SOURCES,
    UNFUSED,
    UNITS,
    VNNI,
    build_shared,
    made_of_these_sources,
    sources_digest,
)
from lcnn_compile.kernels.store import cache_folder

NEEDED = {
    "avxvnni": ("avx_vnni",),
    "avx512vnni": ("avx512_vnni",),
    "avx512vbmi2": ("avx512_vnni", "avx512vbmi", "avx512_vbmi2"),
    "avx512bf16": ("avx512_vnni", "avx512vbmi", "avx512_vbmi2", "avx512_bf16"),
    "amx": ("avx512_vnni", "avx512vbmi", "avx512_vbmi2", "avx512_bf16", "amx_tile", "amx_bf16"),
}
"""What Linux calls the instructions of a set, beside those that PyTorch tells of."""
SANITIZE_FLAGS = ("-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined")
COMPILE_SECONDS = 600


def instruction_set() -> str:
    """The key of ISA_FLAGS to build for.

    Raises:
        KernelError: LCNN_CPU_ISA names none of them.
    """
    chosen = os.environ.get("LCNN_CPU_ISA")
    if chosen is None:
        return supported()[-1]
    if chosen not in ISA_FLAGS:
        raise KernelError(f"LCNN_CPU_ISA is {chosen!r}; allowed are {sorted(ISA_FLAGS)}")
    return chosen


def supported() -> list[str]:
    """The keys of ISA_FLAGS that this processor can run, the best last."""
    capability = torch.backends.cpu.get_cpu_capability()
    widths = {"AVX512": ("portable", "avx2", "avx512"), "AVX2": ("portable", "avx2")}.get(capability, ("portable",))
    known = _processor_flags()

    def has(name: str) -> bool:
        return name in widths or (
            name in NEEDED and ("avx2" if name == "avxvnni" else "avx512") in widths and known.issuperset(NEEDED[name])
        )

    return [name for name in ISA_FLAGS if has(name)]


@functools.cache
def _processor_flags() -> frozenset[str]:
    """What Linux tells of the processor; nothing elsewhere."""
    try:
        return frozenset(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return frozenset()


def cache_directory() -> Path:
    """Where compiled libraries are kept."""
    return cache_folder() if os.environ.get("LCNN_CACHE_DIR") else cache_folder() / "kernels"


def _compiler() -> Path:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        found = shutil.which(name) if name else None
        if found:
            return Path(found).resolve()
    raise FileNotFoundError("no C++ compiler found: install one or set CXX")


def _flags() -> tuple[str, ...]:
    sanitize = SANITIZE_FLAGS if os.environ.get("LCNN_CPU_SANITIZE") == "1" else ()
    return (*FLAGS, *ISA_FLAGS[instruction_set()], *sanitize)


def _key(compiler: Path, flags: tuple[str, ...], sources: list[Path]) -> str:
    """A digest of all that decides what the library contains; the compiler is known by its file, which is quicker to ask."""
    stat = compiler.stat()
    parts = [str(compiler), str(stat.st_size), str(stat.st_mtime_ns), platform.machine(), platform.system(), *flags, str(UNFUSED)]
    return digest(parts, sources)


def _run(command: list[str]) -> str:
    """What the compiler complains of; "" where it succeeds."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False)
    return "" if done.returncode == 0 else done.stderr.strip() or f"exit status {done.returncode}"


def _compile(compiler: Path, flags: tuple[str, ...], sources: list[Path], target: Path) -> None:
    """Compile the sources at once to names of our own, link, then rename: nobody ever sees half a library."""
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        built = Path(work) / target.name
        failure = ""
        # A compiler without OpenMP still gives one fast thread, and one without the newest instructions slower ones.
        vectors = tuple(flag for flag in flags if flag not in MATRIX)
        fewer = tuple(flag for flag in vectors if flag not in (*BFLOAT16, *VNNI, *COMPRESS, "-mavxvnni"))
        for options in ((*flags, "-fopenmp"), (*vectors, "-fopenmp"), (*fewer, "-fopenmp"), fewer):
            objects = [str(Path(work) / f"{source.stem}.o") for source in sources]
            commands = [
                [str(compiler), *options, *UNFUSED.get(source.name, ()), "-c", "-o", made, str(source)]
                for source, made in zip(sources, objects, strict=True)
            ]
            # The longest comes first; more at once than there are processors would hold it up.
            with ThreadPoolExecutor(min(len(commands), os.cpu_count() or 1)) as pool:
                complaint = "\n".join(filter(None, pool.map(_run, commands)))
            complaint = complaint or _run([str(compiler), *options, "-o", str(built), *objects])
            if not complaint:
                built.replace(target)
                return
            failure = failure or complaint
        raise OSError(f"{compiler.name} failed: {failure[-500:]}")


_POINTER = ctypes.c_void_p
FUNCTIONS: tuple[tuple[str, Any, list[Any]], ...] = (
    ("lcnn_weight_new", _POINTER, [_POINTER] * 7),
    ("lcnn_weight_free", None, [_POINTER]),
    ("lcnn_plan_new", _POINTER, [_POINTER] * 3),
    ("lcnn_plan_free", None, [_POINTER]),
    ("lcnn_bytes_new", _POINTER, [_POINTER] * 12),
    ("lcnn_bytes_free", None, [_POINTER]),
    ("lcnn_bytes_plan_new", _POINTER, [_POINTER] * 2),
    ("lcnn_bytes_plan_free", None, [_POINTER]),
    ("lcnn_program_new", _POINTER, [_POINTER, ctypes.c_int64, _POINTER, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64]),
    ("lcnn_program_free", None, [_POINTER]),
    ("lcnn_program_run", ctypes.c_int, [_POINTER] * 3),
    ("lcnn_multiplies_pairs", ctypes.c_int, []),
    ("lcnn_run", ctypes.c_int, [_POINTER] * 5),
    ("lcnn_bytes_run", ctypes.c_int, [_POINTER] * 4),
    ("lcnn_gradients", ctypes.c_int, [_POINTER] * 2),
)
"""Names, results and arguments of the library's functions, in the order of lcnn::KernelTable."""


class Kernels:
    """The functions of one instruction set."""

    def __init__(self, found: Sequence[Any]):
        for (name, _, _), function in zip(FUNCTIONS, found, strict=True):
            setattr(self, name, function)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


def _compiled(path: Path) -> Kernels:
    """Those of a library that was compiled for this processor."""
    library = ctypes.CDLL(str(path))
    found = []
    for name, result, arguments in FUNCTIONS:
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
        found.append(function)
    return Kernels(found)


def _installed() -> Kernels | None:
    """Those of the library that was installed with the package, where it was made of these sources and has the instruction set."""
    path = INSTALLED / "liblcnn.so"
    compiled = "1" in (os.environ.get("LCNN_CPU_SANITIZE"), os.environ.get("LCNN_CPU_COMPILE"))
    if compiled or not made_of_these_sources(INSTALLED):
        return None
    try:
        library = ctypes.CDLL(str(path))
    except OSError:
        return None
    library.lcnn_kernels.restype, library.lcnn_kernels.argtypes = ctypes.c_void_p, [ctypes.c_char_p]
    table = library.lcnn_kernels(instruction_set().encode())
    if not table:
        return None
    addresses = (ctypes.c_void_p * len(FUNCTIONS)).from_address(table)
    return Kernels(
        [ctypes.CFUNCTYPE(result, *arguments)(at) for (_, result, arguments), at in zip(FUNCTIONS, addresses, strict=True)]
    )


def target() -> Path:
    """Where the library for this source, compiler and processor is kept, whether it has been compiled or not.

    Raises:
        OSError, KernelError: no compiler, or no such instruction set.
    """
    return cache_directory() / f"lcnn_{_key(_compiler(), _flags(), [FOLDER / name for name in SOURCES])}.so"


def build() -> Path:
    """Path of the compiled library, compiling it if no process has done so before.

    Raises:
        OSError, subprocess.SubprocessError, filelock.Timeout, KernelError: why there is none.
    """
    path = target()
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{path}.lock", timeout=2 * COMPILE_SECONDS):
            if not path.exists():
                sources = [FOLDER / name for name in UNITS]
                _compile(_compiler(), _flags(), sources, path)
    return path


def shared_library() -> Path:
    """liblcnn.so, which runs programs from files on any processor of this kind: the one that was installed, or built once into the cache.

    Raises:
        KernelError: it is not there, and cannot be built.
    """
    if made_of_these_sources(INSTALLED):
        return INSTALLED / "liblcnn.so"
    try:
        compiler = _compiler()
        extra = SANITIZE_FLAGS if os.environ.get("LCNN_CPU_SANITIZE") == "1" else ()
        path = cache_directory() / f"liblcnn_{_key(compiler, (sources_digest(), *extra), [])}.so"
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{path}.lock", timeout=2 * COMPILE_SECONDS):
            if not path.exists():
                build_shared(path, str(compiler), extra=extra)
    except (OSError, subprocess.SubprocessError, filelock.Timeout) as error:
        raise KernelError(f"liblcnn.so was not installed, and cannot be built here: {error}") from error
    return path


@functools.cache
def library() -> Kernels | None:
    """The loaded kernels, or None, with one warning per process that says why."""
    try:
        installed = _installed()
        if installed is not None:
            return installed
        path = build()
        try:
            return _compiled(path)
        except (OSError, AttributeError):  # a damaged file: once more from the source
            path.unlink(missing_ok=True)
            return _compiled(build())
    except (OSError, AttributeError, subprocess.SubprocessError, filelock.Timeout, KernelError) as error:
        warnings.warn(
            f"the C++ kernels are unavailable, lookups on CPU run as the factored lowering: {error}", LcnnWarning, stacklevel=2
        )
        return None
