"""What chains compile to, for GPUs that are not there: registers, spills, shared memory and the width of global accesses."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parent))

from emulate import compiling, resources
from test_values_chain import Case, build

from lcnn_compile.kernels.triton import chain_tune as triton_chain_tune

pytestmark = [pytest.mark.triton, pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")]

LAYERS = {
    "64 filters": Case(channels=16, filters=64, next=16, residual=True, size=(56, 56), dtype=torch.float16),
    "128 filters": Case(channels=32, filters=128, next=32, residual=True, size=(28, 28), dtype=torch.float16),
    "256 filters": Case(channels=64, filters=256, next=64, residual=True, size=(14, 14), dtype=torch.float16),
    "512 filters": Case(channels=128, filters=512, next=128, residual=True, size=(7, 7), dtype=torch.float16),
    "the last": Case(channels=128, filters=512, residual=True, size=(7, 7), dtype=torch.float16),
    "product": Case(channels=256, filters=64, kernel=(1, 1), padding=(0,) * 4, activation="none", dtype=torch.float16),
    "image": Case(channels=3, kernel=(7, 7), stride=(2, 2), padding=(3,) * 4, filters=64, size=(64, 64), dtype=torch.float16),
}
SHARED = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}
"""KiB of shared memory that a program may have."""


@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("name", LAYERS)
def test_what_is_compiled(name, capability):
    """The safest configuration of every layer neither spills nor exceeds a multiprocessor, and moves 16 bytes at a time."""
    case = LAYERS[name]
    call, _, _ = build(case, "cpu")
    wanted = call._replace(next_channels=case.next if case.filters <= 256 else 0)
    if case.filters > 256:
        wanted = wanted._replace(tail=call.tail._replace(next=None))
    with compiling(capability) as kernels:
        triton_chain_tune.run(wanted, triton_chain_tune.plans(wanted)[0])
    kernel = kernels[-1]
    found = resources(kernel)
    assert found["STACK"] == 0, found
    assert found["spills"] == 0, found
    assert found["REG"] * 32 * kernel.metadata.num_warps <= 65536, found
    assert found["smem"] <= SHARED[capability] * 1024, found
    assert set(found["async"]) == {16}, found
    assert found["matrix"], found
    assert max(found["store"], key=found["store"].get) == 16, found
