"""Accuracy of one network on CIFAR-10 at many budgets, case by case: a case that is finished is never run again.

For each case a work folder holds CASE.json, the weights CASE.safetensors, and while it trains CASE.state.safetensors.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import prune

from lcnn_compile.bench import macs
from lcnn_compile.bench.accuracy import peers
from lcnn_compile.bench.accuracy.cases import CASES, Case
from lcnn_compile.bench.accuracy.data import VIEWS, Images, RememberedTeacher, TrainingBatches, standardise, top1
from lcnn_compile.checkpoint.archive import load, save
from lcnn_compile.config import LookupConfig
from lcnn_compile.conversion.convert import convert, explain
from lcnn_compile.errors import LcnnError
from lcnn_compile.kernels import cpu
from lcnn_compile.learning import distill, harden, soften
from lcnn_compile.modules import LookupConv2d, LookupModule

TUNE: dict[str, Any] = {"label_weight": 0.5, "temperature": 2.0}
SCRATCH: dict[str, Any] = {"lr": 0.1, "label_weight": 1.0}
COMMON: dict[str, Any] = {"weight_decay": 5e-4, "max_norm": None, "warm_up": 0.1}
LOOKUPS = ("lookups", "uniform lookups", "scratch")


class Study:
    """The benchmark's data, dense network and results.

    Args:
        data: folder with cifar10_jpeg.npz, cifar10_net.py (class Cifar10Net) and cifar10_dense.safetensors.
        work: folder for results and checkpoints.
    """

    def __init__(self, data: Path, work: Path) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self.work, self.data = work, data
        self.images = Images.read(data, work / "images.npz")
        self.example = standardise(self.images.test[:1]).contiguous()

    def dense(self) -> nn.Module:
        """The trained dense network, in evaluation mode."""
        source, weights = self.data / "cifar10_net.py", self.data / "cifar10_dense.safetensors"
        if not source.exists() or not weights.exists():
            raise LcnnError(f"{source} and {weights} are required")
        spec = importlib.util.spec_from_file_location("cifar10_net", source)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["cifar10_net"] = module
        spec.loader.exec_module(module)
        model: nn.Module = module.Cifar10Net()
        model.load_state_dict(load_file(weights))
        return model.eval()

    def result(self, case: Case) -> dict[str, Any] | None:
        """What a finished case has found; None before."""
        file = self.work / f"{case.name}.json"
        return json.loads(file.read_text()) if file.exists() else None

    def run(self, case: Case) -> dict[str, Any]:
        """The result of a case, worked out unless it is known; training continues where it was cut off."""
        known = self.result(case)
        if known is not None:
            return known
        start = time.perf_counter()
        result: dict[str, Any] = {"case": case.name, "method": case.method, "group_size": case.group_size}
        result |= {"epochs": case.epochs, "budget": case.budget}
        if case.method in ("int8", "bfloat16"):
            result |= {"top1": self._openvino(case), "macs": macs.count(self.dense(), self.example)}
        else:
            model = self._make(case)
            result |= {"top1": top1(model, self.images), "macs": self._macs(model, case)}
            self._store(model, case)
            if case.method in LOOKUPS:
                result["layers"] = _sizes(model)
        result["seconds"] = time.perf_counter() - start
        file = self.work / f"{case.name}.json"
        file.with_suffix(".partial").write_text(json.dumps(result, indent=1))
        file.with_suffix(".partial").replace(file)
        return result

    def _make(self, case: Case) -> nn.Module:
        dense, calibration = self.dense(), self.images.calibration(mirrored=True)
        if case.method == "scratch":
            return self._scratch(case)
        if case.epochs:
            return self._tune(case)
        if case.method == "lookups":
            config = LookupConfig(target_speedup=case.speedup, group_size=case.group_size, budget=case.budget)
            before = torch.get_num_threads()
            torch.set_num_threads(1 if case.budget == "time" else before)
            converted = convert(dense, config, calibration=calibration)
            torch.set_num_threads(before)
            return converted
        if case.method == "uniform lookups":
            return convert(dense, self._uniform(dense, case), calibration=calibration)
        if case.method == "low rank":
            return peers.low_rank(dense, case.speedup, calibration, self.example)
        return peers.pruned(dense, case.speedup, calibration, self.example) if case.method == "pruned" else dense

    def _uniform(self, dense: nn.Module, case: Case) -> LookupConfig:
        """The same share of the channels, and taps in proportion, for every layer."""
        low, high = 0.01, 1.0
        for _ in range(20):
            share = (low * high) ** 0.5
            config = LookupConfig(dictionary_size=share, sparsity=24 * share, group_size=case.group_size)
            before, after = explain(dense, config, example_inputs=self.example).macs()
            low, high = (share, high) if after < before / case.speedup else (low, share)
        return LookupConfig(dictionary_size=low, sparsity=24 * low, group_size=case.group_size)

    def _tune(self, case: Case) -> nn.Module:
        start = CASES[case.start]
        self.run(start)
        rate = 0.06 if case.epochs > 10 else 0.03
        return self._train(self.load(start, masked=True), case, {**TUNE, "lr": rate})

    def _scratch(self, case: Case) -> nn.Module:
        """Random weights, the sizes of the converted network, supports found while training; a second cycle lets them move again."""
        if case.start:
            before = CASES[case.start]
            self.run(before)
            return harden(
                self._train(soften(self.load(before)), case, {**SCRATCH, "lr": 0.05, "epochs": case.epochs - before.epochs})
            )
        pattern_case = CASES[f"lookups-{case.speedup:g}x"]
        self.run(pattern_case)
        pattern = self.load(pattern_case)
        torch.manual_seed(0)
        model = type(pattern)()
        for name, old in list(pattern.named_modules()):
            if isinstance(old, LookupConv2d):
                conv = model.get_submodule(name)
                assert isinstance(conv, nn.Conv2d)
                new = LookupConv2d(
                    conv.in_channels,
                    conv.out_channels,
                    conv.kernel_size,
                    padding=conv.padding,
                    bias=False,
                    dictionary_size=old.dictionary_size,
                    sparsity=None,
                    group_size=old.group_size,
                )
                taps = old.lookup_weight().taps / old.out_channels
                soften(new, sparsity=taps / (conv.kernel_size[0] * conv.kernel_size[1]))
                parent, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(parent), attribute, new)
        return harden(self._train(model, case, SCRATCH))

    def _train(self, model: nn.Module, case: Case, recipe: dict[str, Any]) -> nn.Module:
        torch.set_flush_denormal(True)
        try:
            return self._distilled(model, case, recipe)
        finally:  # the mode is the processor's: whoever called would compute with it from here on
            torch.set_flush_denormal(False)

    def _distilled(self, model: nn.Module, case: Case, recipe: dict[str, Any]) -> nn.Module:
        # Where bfloat16 has instructions, large batches run fastest so and factored; else in float32 at the taps.
        halves = cpu.multiplies_pairs()
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        lowerings = {m: m.lowering for m in model.modules() if isinstance(m, LookupModule)}
        for lookups in lowerings:
            lookups.lowering = "factored" if halves else "lookup"
        batches = TrainingBatches(self.images)
        state = self.work / f"{case.name}.state.safetensors"
        dense = self.dense().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        keys = VIEWS * len(self.images.train)
        teacher = RememberedTeacher(dense, keys, dense.fc.out_features, self.work / "teacher.safetensors")
        recipe = {"epochs": case.epochs, **recipe}
        history = distill(
            model,
            teacher,
            batches,
            checkpoint=state,
            autocast=torch.bfloat16 if halves else None,
            call=lambda module, inputs: module(inputs if module is teacher else inputs[0]),
            **COMMON,
            **recipe,
        )
        teacher.save()
        (self.work / f"{case.name}.history.json").write_text(json.dumps([vars(epoch) for epoch in history.epochs]))
        for lookups, lowering in lowerings.items():
            lookups.lowering = lowering
        for module in model.modules():
            if prune.is_pruned(module) and hasattr(module, "weight_orig"):
                prune.remove(module, "weight")
        return model.to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]

    def _store(self, model: nn.Module, case: Case) -> None:
        file = self.work / f"{case.name}.safetensors"
        if case.method in LOOKUPS:
            save(model, file)
        else:
            save_file({name: t.contiguous() for name, t in model.state_dict().items()}, file)

    def load(self, case: Case, *, masked: bool = False) -> nn.Module:
        """The network of a finished case; ``masked`` keeps the masks of a pruned one, for training."""
        file = self.work / f"{case.name}.safetensors"
        if case.method in LOOKUPS:
            return load(self.dense(), file).eval()
        model, state = self.dense(), load_file(file)
        for name, conv in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]:
            if f"{name}.0.weight" in state:
                first, second = state[f"{name}.0.weight"], state[f"{name}.1.weight"]
                rank = first.shape[0]
                pair = nn.Sequential(
                    nn.Conv2d(first.shape[1], rank, conv.kernel_size, conv.stride, conv.padding, bias=False),  # type: ignore[arg-type]
                    nn.Conv2d(rank, second.shape[0], 1),
                )
                parent, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(parent), attribute, pair)
            if f"{name}.weight_orig" in state:
                prune.identity(conv, "weight")
        model.load_state_dict(state)
        if not masked:
            for module in model.modules():
                if hasattr(module, "weight_orig"):
                    prune.remove(module, "weight")
        return model.eval()

    def _macs(self, model: nn.Module, case: Case) -> int:
        return peers.nonzero_macs(model, self.example) if case.method == "pruned" else macs.count(model, self.example)

    def _openvino(self, case: Case) -> float:
        """Top-1 of the dense network as OpenVINO runs it in low precision."""
        import nncf
        import openvino as ov

        folder = self.work / case.name
        folder.mkdir(exist_ok=True)
        network = ov.convert_model(copy.deepcopy(self.dense()), example_input=self.example)
        if case.method == "int8":
            batches = nncf.Dataset([image[None].contiguous().numpy() for image in torch.cat(self.images.calibration())])
            network.reshape([1, *self.example.shape[1:]])
            network = nncf.quantize(network, batches, subset_size=512)
            network.reshape([-1, *self.example.shape[1:]])
            ov.save_model(network, folder / "int8.xml", compress_to_fp16=False)
        compiled = ov.Core().compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})

        def call(x: Tensor) -> Tensor:
            return torch.from_numpy(compiled(x.contiguous().numpy())[0])

        return top1(call, self.images)


def _sizes(model: nn.Module) -> list[dict[str, Any]]:
    """Layer by layer, what it was given."""
    rows = []
    for name, module in model.named_modules():
        if isinstance(module, LookupModule):
            weight = module.lookup_weight()
            taps = weight.taps / weight.out_channels
            rows.append({"layer": name, "dictionary_size": weight.dictionary_size, "taps": taps, "group_size": weight.group_size})
    return rows
