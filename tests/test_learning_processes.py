"""Calibration spread over two processes (gloo) is calibration on the data of both."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lcnn_compile.config import LayerConfig
from lcnn_compile.errors import ConversionError
from lcnn_compile.fitting.model import fit_model
from lcnn_compile.fitting.processes import Processes
from lcnn_compile.fitting.statistics import InputMoments
from lcnn_compile.geometry import geometry_of


def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 12, 3)
    ).eval()


def data():
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn(20, 3, 4, 4, generator=generator)
    return nn.functional.interpolate(coarse, size=12, mode="bicubic") + 0.5


def fit(batches, config, **options):
    network = model()
    layers = {name: m for name, m in network.named_modules() if isinstance(m, nn.Conv2d)}
    call = lambda m, x: m(x)  # noqa: E731
    return fit_model(network, layers, dict.fromkeys(layers, config), calibration=batches, call=call, **options)


FIXED, SEARCHED = LayerConfig(dictionary_size=0.5, sparsity=3, group_size=2), LayerConfig(group_size=4)


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    processes = Processes(True)
    mine = data()[:13] if rank == 0 else data()[13:]
    moments = []
    for channels in (3, 3000):
        found = InputMoments(geometry_of(nn.Conv2d(channels, 4, 1)))
        found.update(mine[:, :1].expand(-1, channels, -1, -1) * torch.linspace(0.5, 1.5, channels)[:, None, None])
        found.combine(processes)
        second = found.covariance() if found.streams_gram else found.centred_rows().square().mean((0, 1))
        moments.append((found.count, found.mean(), second))
    empty = InputMoments(geometry_of(nn.Conv2d(3, 4, 1)))
    if rank == 1:
        empty.update(mine)
    empty.combine(processes)
    result = {
        "gathered": processes.gather(torch.full((rank + 1, 2), float(rank))),
        "order": processes.order(["a", "b"] if rank == 0 else ["b", "c"]),
        "moments": moments,
        "alone": (empty.count, empty.mean(), empty.covariance()),
        "fixed": fit(mine.split(5), FIXED, distributed=True),
        "searched": fit(mine.split(5), SEARCHED, distributed=True, target_speedup=2.0),
    }
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(worker, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def test_rows_and_names_are_gathered(results):
    for result in results:
        assert result["gathered"].tolist() == [[0, 0], [1, 1], [1, 1]]
        assert result["order"] == ["a", "b", "c"]


def test_moments_are_those_of_all_data(results):
    x = data()
    for result in results:
        for (count, mean, second), channels in zip(result["moments"], (3, 3000), strict=True):
            scales = torch.linspace(0.5, 1.5, channels, dtype=torch.float64)
            pixels = x[:, :1].double().flatten()
            assert count == pixels.numel()
            torch.testing.assert_close(mean[0], pixels.mean() * scales, rtol=1e-5, atol=1e-6)
            variance = pixels.var(correction=0) * torch.outer(scales, scales)
            wanted = variance[None] if channels == 3 else variance.diagonal().float()
            torch.testing.assert_close(second, wanted, rtol=1e-4, atol=1e-6)
        count, mean, covariance = result["alone"]
        seen = x[13:].double().transpose(0, 1).flatten(1)
        assert count == seen.shape[1]
        torch.testing.assert_close(mean[0], seen.mean(1), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(covariance[0], torch.cov(seen, correction=0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["fixed", "searched"])
def test_all_processes_get_the_same_fit_to_all_data(results, kind):
    first, second = (result[kind] for result in results)
    alone = fit(data().split(5), FIXED if kind == "fixed" else SEARCHED, **({} if kind == "fixed" else {"target_speedup": 2.0}))
    half = fit(
        data()[:13].split(5), FIXED if kind == "fixed" else SEARCHED, **({} if kind == "fixed" else {"target_speedup": 2.0})
    )
    assert any(not layer.reason for layer in first.values())
    for name, layer in first.items():
        assert layer.reason == second[name].reason
        assert layer.error == second[name].error
        for key, tensor in layer.weight.tensors().items():
            assert torch.equal(tensor, second[name].weight.tensors()[key])
        if kind == "fixed":
            torch.testing.assert_close(layer.weight.dictionary.abs(), alone[name].weight.dictionary.abs(), rtol=1e-2, atol=1e-3)
            assert layer.error < 2 * alone[name].error
            assert not torch.equal(layer.weight.dictionary, half[name].weight.dictionary)


def test_without_a_process_group_it_says_so():
    with pytest.raises(ConversionError, match="init_process_group"):
        fit([data()], FIXED, distributed=True)
