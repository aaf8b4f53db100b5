"""A compiled model over its life: forks, threads, resets, other dtypes, many models, and memory that stays flat."""

import copy
import gc
import os
import threading
import time
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from nets import SmallResNet, pictures, randomise
from torch import nn

from lcnn_compile import LookupConfig, LookupConv2d, convert

pytestmark = pytest.mark.usefixtures("backend_reset")
SMALL = LookupConfig(dictionary_size=3, sparsity=2, group_size=4)


def converted():
    return convert(randomise(SmallResNet(8)), SMALL, calibration=[pictures(4)])


def check(compiled, model, x, tolerance=1e-4):
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), atol=tolerance, rtol=tolerance)


def in_child(work):
    """Whether ``work`` returns true in a forked process; one that hangs is ended."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            os._exit(0 if work() else 1)
        finally:
            os._exit(2)
    for _ in range(600):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.1)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return False


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fork_after_use():
    model, x = converted(), pictures(2)
    compiled = torch.compile(model, backend="lcnn")
    check(compiled, model, x)

    def work():
        check(compiled, model, x)
        with torch.no_grad():
            model.layers[0].conv1.coefficients.mul_(2)
        check(compiled, model, x)
        return True

    assert in_child(work)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fork_after_the_kernels_have_used_several_threads():
    # Small enough for PyTorch's own operators to stay on one thread: they hang after a fork.
    layer, x = LookupConv2d(32, 16, 3, padding=1, lowering="lookup"), torch.randn(2, 32, 30, 30)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.no_grad():
            y = layer(x)
            assert in_child(lambda: torch.equal(layer(x), y))
            assert torch.equal(layer(x), y)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_another_dtype(dtype):
    model, x = converted(), pictures(2)
    compiled = torch.compile(model, backend="lcnn")
    check(compiled, model, x)
    model.to(dtype)
    check(compiled, model, x.to(dtype), 1e-4 if dtype == torch.float64 else 0.1)
    model.float()
    check(compiled, model, x)


def test_reset_and_many_models():
    models, x = [converted() for _ in range(3)], pictures(2)
    compiled = [torch.compile(model, backend="lcnn") for model in models]
    for _ in range(2):
        for f, model in zip(compiled, models, strict=True):
            check(f, model, x)
        torch.compiler.reset()


def test_models_are_freed():
    model, x = converted(), pictures(2)
    compiled = torch.compile(model, backend="lcnn")
    check(compiled, model, x)
    alive = [weakref.ref(tensor) for tensor in (*model.parameters(), *model.buffers())]
    del model, compiled
    torch.compiler.reset()
    gc.collect()
    assert not any(ref() is not None for ref in alive)


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
@pytest.mark.parametrize(("calls", "update"), [(1000, False), (150, True)])
def test_memory_is_flat(calls, update):
    model, x = converted(), pictures(2)
    compiled = torch.compile(model, backend="lcnn")

    def work(times):
        for _ in range(times):
            if update:
                model.layers[0].conv1.coefficients.mul_(1)
            compiled(x)
        gc.collect()
        return len(gc.get_objects()), resident()

    with torch.no_grad():
        work(20)
        before, after = work(20), work(calls)
    assert after[0] - before[0] < calls  # a leak of one object per call would be seen
    assert after[1] - before[1] < 8 << 20


def test_threads_while_weights_change():
    model, x = converted(), pictures(2)
    compiled = torch.compile(model, backend="lcnn")
    check(compiled, model, x)
    versions, failures, done = [], [], threading.Event()
    with torch.no_grad():
        for scale in (1.0, 2.0, 3.0):
            twin = copy.deepcopy(model)
            twin.layers[0].bn2.bias.fill_(scale)
            versions.append(twin(x))

    def call():
        while not done.is_set():
            with torch.no_grad():
                y = compiled(x)
            # A call sees the weights of one version, or of one that is being written; never a mixture of structures.
            if y.shape != versions[0].shape or not y.isfinite().all():
                failures.append(y)

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    with torch.no_grad():
        for number in range(12):
            scale = float(number % 3 + 1)
            model.layers[0].bn2.bias = nn.Parameter(torch.full_like(model.layers[0].bn2.bias, scale))
            time.sleep(0.01)
            torch.testing.assert_close(compiled(x), versions[number % 3], atol=1e-4, rtol=1e-4)
    done.set()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_layer_frozen_or_without_bias_in_between():
    model, x = converted(), pictures(2)
    compiled = torch.compile(model, backend="lcnn")
    check(compiled, model, x)
    model.requires_grad_(False)
    check(compiled, model, x)
    model.fc.bias = None
    check(compiled, model, x)
    model.layers[0] = copy.deepcopy(model.layers[0])
    check(compiled, model, x)
