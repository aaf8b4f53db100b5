"""Distillation: a network with lookups learns to answer as the dense one does, with labels or without."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from lcnn_compile.errors import ConfigError, LcnnWarning
from lcnn_compile.learning.resume import read_state, write_state
from lcnn_compile.learning.soft import sparsity_penalty
from lcnn_compile.torch_private import BatchNorm, pytree

Loss = Literal["auto", "kl", "mse"]


@dataclass(frozen=True)
class Epoch:
    """One pass over the loader.

    Attributes:
        loss: mean distillation loss, with the labels' share where there are labels.
        metric: what ``evaluate`` returned; None without it.
        seconds: wall-clock time, evaluation included.
    """

    loss: float
    metric: float | None
    seconds: float


@dataclass
class History:
    """What :func:`distill` did, epoch by epoch.

    Attributes:
        epochs: in order, those before a resumption included.
        best: number of the epoch whose weights the student has now.
        stopped_early: whether ``patience`` ended it.
    """

    epochs: list[Epoch] = field(default_factory=list)
    best: int = -1
    stopped_early: bool = False


def distill(
    student: nn.Module,
    teacher: nn.Module,
    loader: Iterable[Any],
    *,
    epochs: int,
    lr: float = 0.02,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    max_norm: float | None = 1.0,
    warm_up: float = 0.2,
    loss: Loss = "auto",
    temperature: float = 1.0,
    label_weight: float = 0.0,
    train_batch_norm: bool = True,
    autocast: torch.dtype | None = None,
    call: Callable[[nn.Module, Any], Any] | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    patience: int | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> History:
    """Train ``student`` in place to give ``teacher``'s outputs on the loader's inputs.

    Stochastic gradient descent with Nesterov momentum, one cycle of the learning rate: linear up, then a half cosine
    down to zero. Parameters that do not require grad stay (freeze the dictionaries to learn coefficients only, LCNN,
    section 3.3). Dropout stays off. Where supports are soft (:func:`~lcnn_compile.learning.soften`), their penalty is added.

    Args:
        student: any module; a DistributedDataParallel wrapper works too, then only rank 0 reports and writes.
        teacher: gives the targets, in eval mode.
        loader: has a length; each batch is the inputs, or a pair (inputs, labels). Where it or its sampler has
            ``set_epoch``, that is called before each pass.
        epochs: passes over the loader.
        lr: highest learning rate.
        momentum: of SGD.
        weight_decay: of SGD, for everything but biases and batch norm.
        max_norm: gradients are scaled down to this norm; None leaves them.
        warm_up: share of all steps in which the learning rate rises.
        loss: "kl" compares logits [N, classes]; "mse" compares every floating tensor of the outputs, relative to the
            teacher's variance; "auto" takes "kl" for one tensor [N, classes] with at least two classes.
        temperature: of "kl".
        label_weight: share of cross-entropy with the labels in the loss, 0 to 1; needs labels. With 1 the teacher is not run.
        train_batch_norm: batch norm layers use and update batch statistics while training.
        autocast: torch.bfloat16 or torch.float16 for mixed precision.
        call: runs a module on a batch's inputs; ``module(inputs)`` by default.
        evaluate: a figure of merit, higher is better, after each epoch; the best epoch's weights are kept.
        patience: stop after so many epochs without a better figure (without ``evaluate``: a lower loss).
        checkpoint: a file that is written after each epoch and continued from if it exists.
        progress: show a bar.

    Warns:
        LcnnWarning: the loss ended higher than it began, and nothing else says which epoch is best.

    Raises:
        ConfigError: for arguments out of range, labels that are wanted and missing, or nothing to train.
        CheckpointError: if ``checkpoint`` holds something else.
    """
    _check(epochs, lr, loss, label_weight, temperature, loader)
    parameters = [p for p in student.parameters() if p.requires_grad]
    if not parameters:
        raise ConfigError("the student has no parameter that requires grad")
    # Biases and what batch norm learns do not decay.
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(
        [group for group in groups if group["params"]], lr=lr, momentum=momentum, nesterov=momentum > 0, foreach=False
    )
    device = parameters[0].device
    scaler = torch.amp.GradScaler(device.type, enabled=autocast is torch.float16)
    run = call or (lambda module, inputs: module(inputs))
    history, best = History(), _Best()
    path = None if checkpoint is None else Path(checkpoint)
    core = student.module if isinstance(student, nn.parallel.DistributedDataParallel) else student
    if path is not None and path.exists():
        plain = read_state(path, core, optimizer, best.weights)
        history = History([Epoch(**epoch) for epoch in plain["epochs"]], plain["best"], plain["stopped_early"])
    steps = len(loader)  # type: ignore[arg-type]
    modes = {module: module.training for module in [*student.modules(), *teacher.modules()]}
    teacher.eval()
    spread = torch.distributed.is_available() and torch.distributed.is_initialized()
    leader = not spread or torch.distributed.get_rank() == 0
    began: float | None = None
    try:
        with _bar(progress and leader, epochs * steps, len(history.epochs) * steps) as advance:
            while len(history.epochs) < epochs and not history.stopped_early:
                start, total = time.perf_counter(), 0.0
                _announce(loader, len(history.epochs))
                _train_mode(student, train_batch_norm)
                for step, batch in enumerate(loader):
                    share = (len(history.epochs) * steps + step) / (epochs * steps)
                    for group in optimizer.param_groups:
                        group["lr"] = lr * _cycle(share, warm_up)
                    inputs, labels = _split(batch, device)
                    with torch.autocast(device.type, autocast, enabled=autocast is not None):
                        with torch.no_grad():
                            target = run(teacher, inputs) if label_weight < 1 else None
                        output = run(student, inputs)
                    value = _loss(output, target, labels, loss, temperature, label_weight) + sparsity_penalty(student)
                    optimizer.zero_grad(set_to_none=True)
                    scaler.scale(value).backward()
                    if max_norm is not None:
                        scaler.unscale_(optimizer)
                        nn.utils.clip_grad_norm_(parameters, max_norm)
                    scaler.step(optimizer)
                    scaler.update()
                    total += value.item()
                    began = total if began is None else began
                    advance(f"epoch {len(history.epochs) + 1}/{epochs}  loss {total / (step + 1):.4g}")
                student.eval()
                mean = _everywhere(total / steps, device, spread)
                metric = None if evaluate is None else _everywhere(float(evaluate(student)), device, spread)
                history.epochs.append(Epoch(mean, metric, time.perf_counter() - start))
                if best.offer(history, core, -mean if metric is None else metric, keep=evaluate is not None):
                    history.best = len(history.epochs) - 1
                history.stopped_early = patience is not None and len(history.epochs) - 1 - history.best >= patience
                if path is not None and leader:
                    write_state(path, core, optimizer, best.weights, asdict(history))
    finally:
        for module, training in modes.items():
            module.training = training
    if began is not None and leader and evaluate is None and not history.epochs[-1].loss <= began:
        warnings.warn(
            f"distillation ended with a loss of {history.epochs[-1].loss:.3g}, which was {began:.3g} before the first step: "
            f"take a lower lr than {lr:g}, or pass evaluate= to keep the best epoch",
            LcnnWarning,
            stacklevel=2,
        )
    if best.weights:
        core.load_state_dict(best.weights, strict=False)
    else:
        history.best = len(history.epochs) - 1
    return history


def _announce(loader: Any, epoch: int) -> None:
    """Tell loaders and samplers that shuffle by epoch (as DistributedSampler) which one comes."""
    for shuffled in (loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
        announce = getattr(shuffled, "set_epoch", None)
        if callable(announce):
            announce(epoch)


def _everywhere(value: float, device: torch.device, spread: bool) -> float:
    """The mean over all processes, so that they decide alike."""
    if not spread:
        return value
    total = torch.tensor(value, dtype=torch.float32, device=device)
    torch.distributed.all_reduce(total)
    return float(total) / torch.distributed.get_world_size()


class _Best:
    """The best weights so far."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}

    def offer(self, history: History, student: nn.Module, merit: float, *, keep: bool) -> bool:
        """Whether the last epoch is the best; if so and ``keep``, copy the weights."""
        earlier = [-e.loss if e.metric is None else e.metric for e in history.epochs[:-1]]
        if earlier and merit <= max(earlier):
            return False
        if keep:
            state = student.state_dict()
            self.weights = {name: t.detach().clone() for name, t in state.items() if isinstance(t, Tensor)}
        return True


def _check(epochs: int, lr: float, loss: str, label_weight: float, temperature: float, loader: Iterable[Any]) -> None:
    if epochs < 0:
        raise ConfigError(f"epochs is {epochs}; an int >= 0 is required")
    if not lr > 0 or not temperature > 0:
        raise ConfigError(f"lr is {lr} and temperature {temperature}; numbers > 0 are required")
    if loss not in ("auto", "kl", "mse"):
        raise ConfigError(f"loss is {loss!r}; allowed are 'auto', 'kl' and 'mse'")
    if not 0 <= label_weight <= 1:
        raise ConfigError(f"label_weight is {label_weight}; a number from 0 to 1 is required")
    if not isinstance(loader, Sized):
        raise ConfigError(f"the loader ({type(loader).__name__}) has no length; the learning rate's cycle needs one")
    if len(loader) == 0:
        raise ConfigError("the loader has no batch")


def _train_mode(student: nn.Module, train_batch_norm: bool) -> None:
    student.eval()
    for module in student.modules():
        if isinstance(module, BatchNorm):
            module.train(train_batch_norm)


def _cycle(share: float, warm_up: float) -> float:
    """The learning rate, relative to its peak, after a share of all steps."""
    if share < warm_up:
        return (share + 0.01) / (warm_up + 0.01)
    return 0.5 + 0.5 * math.cos(math.pi * (share - warm_up) / (1 - warm_up))


def _split(batch: Any, device: torch.device) -> tuple[Any, Tensor | None]:
    """Inputs and labels: the second of a pair is labels if it is an integer tensor."""
    batch = pytree.tree_map_only(Tensor, lambda t: t.to(device, non_blocking=True), batch)
    if isinstance(batch, tuple | list) and len(batch) == 2:
        inputs, labels = batch
        if isinstance(labels, Tensor) and not labels.is_floating_point():
            return inputs, labels
    if isinstance(batch, tuple | list) and len(batch) == 1:
        return batch[0], None
    return batch, None


def _loss(output: Any, target: Any, labels: Tensor | None, loss: str, temperature: float, label_weight: float) -> Tensor:
    logits = isinstance(output, Tensor) and output.dim() == 2 and output.shape[1] > 1
    if label_weight and (labels is None or not logits):
        raise ConfigError("label_weight needs batches (inputs, integer labels) and one output of logits [N, classes]")
    if labels is not None and label_weight == 1:
        return F.cross_entropy(output.float(), labels)
    if loss == "kl" or (loss == "auto" and logits):
        scale = 1 / temperature
        wanted, given = (F.log_softmax(t.float() * scale, dim=-1) for t in (target, output))
        value = F.kl_div(given, wanted, reduction="batchmean", log_target=True) * temperature**2
    else:
        pairs = zip(pytree.tree_leaves(output), pytree.tree_leaves(target), strict=True)
        floating = [(y.float(), t.float()) for y, t in pairs if isinstance(y, Tensor) and y.is_floating_point()]
        value = torch.stack([F.mse_loss(y, t) / t.var(correction=0).clamp(min=1e-12) for y, t in floating]).mean()
    if not label_weight or labels is None:
        return value
    return (1 - label_weight) * value + label_weight * F.cross_entropy(output.float(), labels)


@contextmanager
def _bar(shown: bool, total: int, done: int) -> Iterator[Callable[[str], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as progress:
        task = progress.add_task("distill", total=total, completed=done)
        yield lambda text: progress.update(task, advance=1, description=text)
