"""Builds liblcnn.so, the kernels of every instruction set, into the package; all else is in pyproject.toml."""

import os
import shutil
import sys
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent / "lcnn_compile" / "kernels" / "cpu"))
import sources  # the file alone: the package imports torch


class BuildLibrary(build_ext):
    """Compiles with the tools of the system; without a compiler the package is installed without kernels, and says so when it is used."""

    def run(self) -> None:
        """Into the folder that is packed, or beside the sources for an editable installation."""
        root = Path(__file__).parent if self.inplace or self.editable_mode else Path(self.build_lib)
        folder = root / "lcnn_compile" / "kernels" / "cpu" / "lib"
        compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX") or "c++", "g++"))), None)
        if compiler is None:
            print("lcnn_compile is built without its C++ kernels: there is no compiler; install one or set CXX", file=sys.stderr)
            return
        sources.install(folder, compiler)

    def get_outputs(self) -> list[str]:
        """None that setuptools would have to copy."""
        return []

    def get_output_mapping(self) -> dict[str, str]:
        """The same for an editable installation."""
        return {}


class Binary(Distribution):
    """What is installed depends on the processor's kind."""

    def has_ext_modules(self) -> bool:
        """It has, as it were."""
        return True


class AnyPython(bdist_wheel):
    """The library knows nothing of Python: one wheel for all versions."""

    def get_tag(self) -> tuple[str, str, str]:
        """py3-none-PLATFORM."""
        return "py3", "none", super().get_tag()[2]


setup(
    distclass=Binary,
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": AnyPython},
    ext_modules=[Extension("lcnn_compile.kernels.cpu.lib.liblcnn", sources=[])],
)
