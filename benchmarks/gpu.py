"""Lookup convolutions on a GPU: correct first, then layers and networks against the best dense result, in under nine minutes.

    python benchmarks/gpu.py [--out FOLDER] [--seconds 520] [--only checks|layers|networks]

Every time is the median replay of a CUDA graph that holds the call on several inputs in turn, together larger than the
second-level cache, divided by their number; so launches cost the same for everyone. Nothing is timed unless all values
agree with float64. What does not fit into the time is named, not dropped silently. JSON goes to --out, $OUT or here.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import signal
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from lcnn_compile import LookupConv2d
from lcnn_compile.bench.settings import Setting, dense_twin, lookup_network, random_lookup
from lcnn_compile.config import LayerConfig
from lcnn_compile.errors import LcnnWarning

MODES = {"float32": torch.float32, "tf32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
LOWERINGS = ("lookup", "factored", "dense")


@dataclass(frozen=True)
class Layer:
    """A 3x3 layer with padding 1 on a square image."""

    channels: int
    filters: int
    side: int
    stride: int = 1

    @property
    def name(self) -> str:
        return f"{self.channels}->{self.filters}@{self.side}{'/2' if self.stride == 2 else ''}"

    def conv(self) -> nn.Conv2d:
        return nn.Conv2d(self.channels, self.filters, 3, self.stride, 1).eval()


@dataclass(frozen=True)
class Sizes:
    """Sizes of a lookup layer: dictionary, as a number or a share of the channels, taps per filter, and group size."""

    dictionary: float | int
    taps: int
    group: int

    @property
    def name(self) -> str:
        return f"g{self.group}/{self.taps}"

    def config(self, lowering: str = "lookup") -> LayerConfig:
        return LayerConfig(dictionary_size=self.dictionary, sparsity=self.taps / 9, group_size=self.group, lowering=lowering)


NARROW = (Layer(64, 128, 224), Sizes(10, 9, 1))
WIDE = [
    Layer(256, 256, 56), Layer(512, 512, 28), Layer(512, 512, 14), Layer(256, 512, 28), Layer(256, 256, 14), Layer(512, 512, 7)
]  # fmt: skip
SIZES = [Sizes(0.25, 192, 64), Sizes(0.25, 144, 16), Sizes(0.25, 27, 1)]


@dataclass
class Run:
    """What has been measured, and how much time is left."""

    seconds: float
    out: Path
    started: float = field(default_factory=time.monotonic)
    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    device: dict[str, Any] = field(default_factory=dict)

    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.started)

    def add(self, **row: Any) -> dict[str, Any]:
        self.rows.append(row)
        return row

    def save(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        record = {"device": self.device, "rows": self.rows, "skipped": self.skipped}
        (self.out / "gpu.json").write_text(json.dumps(record, indent=1))


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after so many seconds."""

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(0.001, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def set_mode(mode: str) -> torch.dtype:
    """Allow TF32 in mode "tf32" alone; the dtype of the mode."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = mode == "tf32"
    return MODES[mode]


def inputs_of(shape: tuple[int, ...], dtype: torch.dtype, format: torch.memory_format) -> list[Tensor]:
    """Enough random inputs to exceed twice the second-level cache, 2 to 32."""
    size = torch.Size(shape).numel() * dtype.itemsize
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    count = max(2, min(32, -(-2 * cache // size)))
    return [torch.randn(shape, device="cuda").to(dtype).contiguous(memory_format=format) for _ in range(count)]


@torch.no_grad()
def milliseconds(call: Callable[[Tensor], Any], inputs: list[Tensor]) -> float:
    """Median time of one call."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for x in inputs[:2] * 2:
            call(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for x in inputs:
            call(x)
    graph.replay()
    times = []
    for _ in range(9):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / len(inputs))
    return statistics.median(times)


def ceilings() -> dict[str, float]:
    """Bytes per second of a large copy, and flop/s of a large product in each mode; L1 at 128 bytes per clock."""
    properties = torch.cuda.get_device_properties(0)
    a = torch.randn(1 << 28, device="cuda")
    found = {"copy": 8 * a.numel() / milliseconds(lambda x: x.clone(), [a]) * 1e3}
    del a
    for mode in MODES:
        x = torch.randn(4096, 4096, device="cuda").to(set_mode(mode))
        found[mode] = 2 * 4096**3 / milliseconds(lambda x: x @ x, [x, x]) * 1e3
    clock = getattr(properties, "clock_rate", 1_755_000) * 1e3
    found["l1"] = 128 * properties.multi_processor_count * clock
    return found


def distance(y: Tensor, truth: Tensor) -> float:
    """‖y − truth‖ / ‖truth‖; infinite where anything is not finite."""
    error = float((y.detach().double() - truth.detach()).norm() / truth.detach().norm())
    return error if error == error else float("inf")


def checks(run: Run) -> None:
    """Every kernel in every dtype and format against float64; exits if one is farther from it than cuDNN's result allows.

    Configurations are guessed, not tuned, which saves most of the compiling; networks are checked again as they were tuned.
    """
    os.environ["LCNN_TUNE"] = "0"
    cases = [
        (Layer(64, 64, 15), Sizes(0.25, 27, 1)),
        (Layer(64, 128, 28, 2), Sizes(0.25, 27, 1)),
        (Layer(64, 128, 7), Sizes(0.25, 96, 16)),
        (Layer(96, 192, 30, 2), Sizes(0.5, 120, 64)),
        (Layer(33, 40, 13), Sizes(7, 20, 8)),
    ]
    worst = 0.0
    for layer, sizes in cases:
        torch.manual_seed(0)
        lookup = random_lookup(layer.conv(), sizes.config()).cuda()
        for mode in MODES:
            dtype = set_mode(mode)
            for name, format in FORMATS.items():
                x = (
                    torch.randn(5, layer.channels, layer.side, layer.side, device="cuda")
                    .to(dtype)
                    .contiguous(memory_format=format)
                )
                module = in_dtype(lookup, dtype)
                truth = in_dtype(module, torch.float64).to_conv()(x.double())
                own = distance(module.to_conv()(x), truth)
                step = 2.0**-11 if mode == "tf32" else torch.finfo(dtype).eps
                found = distance(module(x), truth)
                allowed = 4 * max(own, step)
                worst = max(worst, found / allowed)
                grads = torch.autograd.grad(module(x).square().sum(), [module.dictionary, module.coefficients])
                exact = in_dtype(module, torch.float64)
                wide = torch.autograd.grad(exact(x.double()).square().sum(), [exact.dictionary, exact.coefficients])
                back = max(distance(g, w) for g, w in zip(grads, wide, strict=True))
                label = f"{layer.name} {sizes.name} {mode} {name}"
                run.add(kind="check", case=label, error=found, dense_error=own, gradient_error=back)
                if not found <= allowed or not back <= 32 * max(own, step):
                    run.save()
                    sys.exit(
                        f"wrong values, so no times: {label}: error {found:.2g} (allowed {allowed:.2g}), gradients {back:.2g}"
                    )
    del os.environ["LCNN_TUNE"]
    print(f"values agree with float64: largest error {worst:.2f} of what is allowed; {run.left():.0f} s left", flush=True)


def in_dtype(module: LookupConv2d, dtype: torch.dtype) -> LookupConv2d:
    """The same layer in another dtype."""
    return copy.deepcopy(module).to("cuda", dtype)


def floors(
    layer: Layer, sizes: Sizes, batch: int, item: int, mode: str, ceiling: dict[str, float]
) -> dict[str, dict[str, float]]:
    """For both kernels of a lookup layer: bytes to and from memory, L1 bytes, flop, and the floor in ms that they give.

    S stays in the cache and counts as L1 traffic alone; what goes through shared memory counts a second time.
    """
    out = -(-layer.side // layer.stride)
    pixels, sources, vectors = batch * out * out, batch * layer.side**2, sizes.config().vectors(layer.channels)
    matrix = max(ceiling[mode], ceiling["tf32"] / 3) if mode == "float32" else ceiling[mode]
    vector = 2 * ceiling["l1"]
    single = sizes.group == 1
    found = {}
    for kernel, moved, l1, flop, rate in (
        (
            "dictionary",
            item * sources * layer.channels,
            item * sources * (2 * layer.channels + 3 * vectors),
            2 * layer.channels * vectors * sources,
            matrix,
        ),
        (
            "lookups",
            item * pixels * layer.filters,
            item * pixels * layer.filters * (sizes.taps * (1 if single else 2) // sizes.group + 1),
            2 * layer.filters * sizes.taps * pixels,
            vector if single else matrix,
        ),
    ):
        floor = 1e3 * max(moved / ceiling["copy"], l1 / ceiling["l1"], flop / rate)
        found[kernel] = {"bytes": moved, "l1_bytes": l1, "flop": flop, "floor_ms": floor}
    return found


@torch.no_grad()
def kernel_times(module: nn.Module, inputs: list[Tensor]) -> dict[str, float]:
    """Milliseconds of each kernel of ours in one call, by the profiler; a fused launch is a kernel of its own."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for x in inputs:
            module(x)
        torch.cuda.synchronize()
    names = {"dictionary_kernel": "dictionary", "lookup_kernel": "lookups", "grouped_kernel": "lookups"}
    found: dict[str, float] = {}
    for event in profile.key_averages():
        if event.key in names or event.key in ("permute_kernel", "fused_kernel"):
            name = names.get(event.key, event.key)
            found[name] = found.get(name, 0.0) + event.self_device_time_total / 1e3 / len(inputs)
    return found


def best_dense(run: Run, conv: nn.Module, inputs: list[Tensor], autotune: bool, label: str) -> dict[str, float]:
    """Times of the dense layer: eager with cuDNN's own search, and torch.compile's where asked for and there is time."""
    found = {"eager": milliseconds(conv, inputs)}
    if autotune and run.left() < 200:
        run.skipped.append(f"{label}: torch.compile(mode='max-autotune')")
    elif autotune:
        try:
            with at_most(40):
                torch.compiler.reset()
                compiled = torch.compile(conv, mode="max-autotune-no-cudagraphs")
                found["max-autotune"] = milliseconds(compiled, inputs)
        except Exception as error:
            run.skipped.append(f"{label}: torch.compile(mode='max-autotune'): {type(error).__name__}")
    return found


@torch.no_grad()
def layer_times(
    run: Run,
    layer: Layer,
    settings: list[Sizes],
    mode: str,
    format: str,
    batch: int,
    ceiling: dict[str, float],
    autotune: bool = False,
) -> None:
    """Time one layer, dense and with lookups; add a row per setting."""
    dtype = set_mode(mode)
    label = f"{layer.name} b{batch} {mode} {format}"
    if run.left() < 30:
        run.skipped.append(label)
        return
    inputs = inputs_of((batch, layer.channels, layer.side, layer.side), dtype, FORMATS[format])
    conv = layer.conv().to("cuda", dtype, memory_format=FORMATS[format])
    dense = best_dense(run, conv, inputs, autotune, label)
    for sizes in settings:
        module = in_dtype(random_lookup(layer.conv(), sizes.config()), dtype)
        apart = distance(module(inputs[0]), module.to_conv()(inputs[0]))
        if not apart <= 16 * (2.0**-11 if mode == "tf32" else torch.finfo(dtype).eps):
            sys.exit(f"wrong values, so no times: {label} {sizes.name}: {apart:.2g} from the dense layer")
        times = {}
        for lowering in LOWERINGS[:2]:
            module.lowering = lowering
            times[lowering] = milliseconds(module, inputs)
        module.lowering = "lookup"
        count = floors(layer, sizes, batch, dtype.itemsize, mode, ceiling)
        floor = sum(part["floor_ms"] for part in count.values())
        row = run.add(
            kind="layer",
            layer=layer.name,
            sizes=asdict(sizes),
            mode=mode,
            format=format,
            batch=batch,
            dense_ms=dense,
            ms=times,
            kernels_ms=kernel_times(module, inputs),
            floors=count,
            speedup=min(dense.values()) / times["lookup"],
            over_floor=times["lookup"] / floor,
        )
        print(
            f"{label:36} {sizes.name:8} dense {min(dense.values()):8.4f}  lookup {times['lookup']:8.4f}  factored "
            f"{times['factored']:8.4f} ms  {row['speedup']:5.2f}x  {row['over_floor']:5.2f} of floor  "
            + " ".join(f"{name} {ms:.4f}" for name, ms in row["kernels_ms"].items()),
            flush=True,
        )
    run.save()


def layers(run: Run, ceiling: dict[str, float]) -> None:
    """The target cases first, with every baseline; then batch sizes, modes and formats, as long as there is time."""
    narrow, narrow_sizes = NARROW
    for mode, format in (("float32", "contiguous"), ("float32", "channels_last"), ("float16", "channels_last")):
        layer_times(run, narrow, [narrow_sizes], mode, format, 1, ceiling, autotune=format == "contiguous")
    for index, layer in enumerate(WIDE):
        layer_times(run, layer, SIZES, "float16", "channels_last", 64, ceiling, autotune=index < 2)
        layer_times(run, layer, SIZES, "float32", "contiguous", 64, ceiling)
    budget = 200
    for layer in WIDE[:3]:
        for mode in MODES:
            for batch in (1, 8, 64, 256):
                for format in FORMATS:
                    if run.left() > budget:
                        layer_times(run, layer, SIZES[:1], mode, format, batch, ceiling)
                    else:
                        run.skipped.append(f"{layer.name} b{batch} {mode} {format}")


def choose_lowerings(model: nn.Module, x: Tensor) -> dict[str, int]:
    """Give every lookup layer the lowering that is fastest on its own input; how many took which."""
    shapes: dict[nn.Module, Tensor] = {}
    layers = [m for m in model.modules() if isinstance(m, LookupConv2d)]
    hooks = [m.register_forward_pre_hook(lambda module, args: shapes.__setitem__(module, args[0].clone())) for m in layers]
    model(x)
    for hook in hooks:
        hook.remove()
    taken = dict.fromkeys(LOWERINGS, 0)
    for module in layers:
        times = {}
        for lowering in LOWERINGS:
            module.lowering = lowering
            times[lowering] = milliseconds(module, [shapes[module]])
        module.lowering = min(times, key=lambda name: times[name])
        taken[module.lowering] += 1
    return taken


@torch.no_grad()
def networks(run: Run) -> None:
    """ResNet-18 and VGG-16 with random lookups: each layer at its fastest lowering, compiled by our backend, against dense."""
    from networks import build, example_input

    from lcnn_compile.backend import lcnn

    warnings.simplefilter("default", LcnnWarning)
    for name in ("resnet18", "vgg16"):
        for mode in ("float16", "float32"):
            if run.left() < 70:
                run.skipped.append(f"{name} {mode}")
                continue
            dtype = set_mode(mode)
            images = [x.to("cuda", dtype, memory_format=torch.channels_last) for x in (example_input(64), example_input(64))]
            model = build(name).eval()
            settings = SIZES if mode == "float16" else SIZES[2:]
            row: dict[str, Any] = {"ms": {}, "lowerings": {}}
            for sizes in settings:
                label = f"{name} {mode} {sizes.name}"
                try:
                    with at_most(min(120, run.left() - 30)):
                        rule = Setting(sizes.name, lambda _, m, s=sizes: s.config() if wide(m) else None)
                        lookups = lookup_network(name, model, rule).to("cuda", dtype, memory_format=torch.channels_last)
                        truth = dense_twin(lookups).double()(images[0].double())
                        own = distance(dense_twin(lookups)(images[0]), truth)
                        row["lowerings"][sizes.name] = choose_lowerings(lookups, images[0])
                        torch.compiler.reset()
                        compiled = torch.compile(lookups, backend=lcnn)
                        found = distance(compiled(images[0]), truth)
                        if not found <= 4 * max(own, torch.finfo(dtype).eps):
                            sys.exit(f"wrong values, so no times: {label}: error {found:.2g}; dense {own:.2g}")
                        row["ms"][sizes.name] = milliseconds(compiled, images)
                except Exception as error:
                    run.skipped.append(f"{label}: {type(error).__name__}: {error}")
            dense = model.to("cuda", dtype, memory_format=torch.channels_last)
            times = {"eager": milliseconds(dense, images)}
            for compile_mode in ("default", "max-autotune-no-cudagraphs"):
                try:
                    with at_most(min(90, run.left() - 20)):
                        torch.compiler.reset()
                        times[compile_mode] = milliseconds(torch.compile(dense, mode=compile_mode), images)
                except Exception as error:
                    run.skipped.append(f"{name} {mode} dense {compile_mode}: {type(error).__name__}")
            speedups = {sizes: min(times.values()) / ms for sizes, ms in row["ms"].items()}
            run.add(kind="network", network=name, mode=mode, batch=64, dense_ms=times, speedup=speedups, **row)
            print(name, mode, {k: round(v, 3) for k, v in {**times, **row["ms"]}.items()}, row["lowerings"], flush=True)
            run.save()


def wide(module: nn.Module) -> bool:
    """Whether a layer of a network gets lookups: 3x3, on 64 channels and more."""
    return isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) and module.in_channels >= 64


def closing_table(run: Run) -> None:
    """The targets, what was reached, and what was left out."""
    rows = [r for r in run.rows if r["kind"] == "layer"]
    narrow = [r["speedup"] for r in rows if r["layer"] == NARROW[0].name and r["mode"] == "float32"]
    print("\ntarget                                            at least   reached")
    print(f"{NARROW[0].name} b1 k=10 float32, best format            4.0     {max(narrow, default=0):6.2f}")
    for mode, least in (("float16", 2.5), ("float32", 6.0)):
        for layer in WIDE:
            best = [r["speedup"] for r in rows if (r["layer"], r["mode"], r["batch"]) == (layer.name, mode, 64)]
            print(f"{layer.name + ' b64 ' + mode:49} {least:4.1f}     {max(best, default=0):6.2f}")
    for row in run.rows:
        if row["kind"] == "network":
            print(f"{row['network'] + ' b64 ' + row['mode']:49}  2.0     {max(row['speedup'].values(), default=0):6.2f}")
    ours = [r["over_floor"] for r in rows]
    if ours:
        print(f"time over floor, median and worst                  1.6     {statistics.median(ours):6.2f} {max(ours):6.2f}")
    if run.skipped:
        print(f"{len(run.skipped)} measurements left out for lack of time or support; the first: {run.skipped[:3]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    parser.add_argument("--seconds", type=float, default=520)
    parser.add_argument("--only", choices=("checks", "layers", "networks"))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py needs an NVIDIA GPU and a PyTorch built for CUDA; none is visible here")
    import triton

    warnings.simplefilter("error", LcnnWarning)
    torch.backends.cudnn.benchmark = True
    run = Run(arguments.seconds, arguments.out)
    properties = torch.cuda.get_device_properties(0)
    run.device = {"gpu": properties.name, "multiprocessors": properties.multi_processor_count, "l2": properties.L2_cache_size,
                  "torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton.__version__}  # fmt: skip
    print(run.device, flush=True)
    checks(run)
    if arguments.only != "checks":
        ceiling = run.device["ceilings"] = ceilings()
        print({name: f"{rate:.3g}" for name, rate in ceiling.items()}, flush=True)
        if arguments.only != "networks":
            layers(run, ceiling)
        if arguments.only != "layers":
            networks(run)
        closing_table(run)
    run.save()


if __name__ == "__main__":
    main()
