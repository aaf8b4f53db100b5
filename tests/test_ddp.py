"""Converted models under DistributedDataParallel (gloo, two processes)."""

import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from nets import SmallResNet, pictures, randomise
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lcnn_compile import LookupConfig, convert


def step(model, x):
    model.eval()  # batch statistics would differ between a half batch and the whole one
    model(x).square().mean().backward()
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}


def worker(rank, port, model, x, expected, compiled):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    dist._DEFAULT_FIRST_BUCKET_BYTES = 1000  # so that even this small model has several buckets
    replica = DistributedDataParallel(model, bucket_cap_mb=0.001)
    run = torch.compile(replica, backend="lcnn") if compiled else replica
    run(x[rank::2]).square().mean().backward()
    for name, parameter in replica.module.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-4)
    dist.destroy_process_group()


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def converted():
    model = convert(
        randomise(SmallResNet(8)), LookupConfig(dictionary_size=3, sparsity=2, group_size=4), calibration=[pictures(4)]
    )
    assert not any(isinstance(m, nn.Conv2d) and m.in_channels > 3 for m in model.modules())
    return model.eval()


def test_gradients_are_those_of_one_process():
    x = pictures(4)
    expected = {name: grad.clone() for name, grad in step(converted(), x).items()}
    torch.manual_seed(0)
    x = pictures(4)
    mp.spawn(worker, (free_port(), converted(), x, expected, False), nprocs=2)


def test_compiled_with_several_buckets():
    x = pictures(4)
    expected = {name: grad.clone() for name, grad in step(converted(), x).items()}
    torch.manual_seed(0)
    x = pictures(4)
    mp.spawn(worker, (free_port(), converted(), x, expected, True), nprocs=2)
