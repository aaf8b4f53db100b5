import os
import warnings

import pytest
import torch
from hypothesis import HealthCheck, settings

from lcnn_compile.kernels import cpu
from lcnn_compile.kernels.cpu import build as cpu_build

slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
# Which lowering is fastest must not depend on what else the machine does during a test.
os.environ.setdefault("LCNN_TUNE", "0")
# Tests run side by side and on tiny tensors, where a second thread only waits.
torch.set_num_threads(1)
settings.register_profile("fast", max_examples=25, deadline=None, suppress_health_check=slow, derandomize=True)
many = int(os.environ.get("HYPOTHESIS_EXAMPLES", "20000"))
settings.register_profile("fuzz", max_examples=many, deadline=None, suppress_health_check=slow, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))


@pytest.fixture(autouse=True)
def _reproducible():
    """Same random numbers in every test, and memory that nobody wrote is NaN, so a kernel that skips a pixel is seen."""
    torch.manual_seed(0)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deterministic.*")
        yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def backend_reset():
    """A fresh Dynamo before and after, and the backend's one-time warnings as if never given."""
    from lcnn_compile.backend import guard

    torch.compiler.reset()
    guard._warned.clear()
    yield
    torch.compiler.reset()


def chosen_instruction_set(name, monkeypatch):
    """The C++ kernels of one instruction set, where this processor has it."""
    if name not in cpu_build.supported():
        pytest.skip(f"this processor has no {name}")
    monkeypatch.setenv("LCNN_CPU_ISA", name)
    cpu_build.library.cache_clear()
    assert cpu.is_available()
    yield name
    cpu_build.library.cache_clear()


@pytest.fixture(params=["portable", "avx2", "avx512", "avx512bf16", "amx"])
def instruction_set(request, monkeypatch):
    """The C++ kernels of one instruction set; those that differ in what they do with bytes alone are left out."""
    yield from chosen_instruction_set(request.param, monkeypatch)


@pytest.fixture(params=sorted(cpu_build.ISA_FLAGS))
def byte_instruction_set(request, monkeypatch):
    """The C++ kernels of one instruction set: all of them."""
    yield from chosen_instruction_set(request.param, monkeypatch)
