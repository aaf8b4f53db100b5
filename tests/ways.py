"""The ways in which a network reaches the user, and what each of them must leave as the dense network does."""

import contextlib
import copy
import io
import logging
import tempfile
import warnings
from pathlib import Path

import torch
from torch import fx

from lcnn_compile import LookupConfig, convert, freeze
from lcnn_compile.backend import entry
from lcnn_compile.batches import Inputs
from lcnn_compile.errors import LcnnError
from lcnn_compile.export import export_pt2
from lcnn_compile.passes import (
    chain_lookups,
    choose_lowerings,
    fold_batch_norm,
    fold_factors,
    fuse_epilogues,
    gather_programs,
    narrow_convolutions,
    pool_first,
)
from lcnn_compile.testing.calls import differences, record, spread

SAME = {"dictionary_size": 1.0, "sparsity": None}
LOWERINGS = ("lookup", "auto", "factored", "dense")


class Refused(Exception):  # noqa: N818
    """Said clearly that it cannot be done; Inductor or the dense network takes over."""


@contextlib.contextmanager
def quiet():
    level = logging.getLogger("lcnn_compile").level
    logging.getLogger("lcnn_compile").setLevel("ERROR")
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.getLogger("lcnn_compile").setLevel(level)


@contextlib.contextmanager
def inductor(real):
    """Inductor, with eager's random numbers; or in its place, where the backend calls it, the graph as it is."""
    torch.compiler.reset()
    before = entry.compile_with_inductor
    with torch._inductor.config.patch(fallback_random=True):
        if not real:
            entry.compile_with_inductor = lambda graph, inputs, patches: graph
        try:
            yield
        finally:
            entry.compile_with_inductor = before


def given(call):
    """The arguments of a call as ``convert``, ``freeze`` and exports take them."""
    return Inputs(*call.args, **call.kwargs)


def config(lowering):
    return LookupConfig(**SAME, lowering=lowering)


def converted(model, case, lowering):
    return convert(model, config(lowering), calibration=[given(case.call())])


def all_passes(model):
    """The model traced by torch.fx, after all passes."""
    gm = fx.symbolic_trace(model)
    gm = fuse_epilogues(choose_lowerings(narrow_convolutions(fold_factors(fold_batch_norm(gm)))))
    return gather_programs(pool_first(chain_lookups(gm)))


class Way:
    """One way: ``make(model, case, lowering)`` is the callable; ``state`` the module whose state counts."""

    memory = True
    random = True
    evaluation = False
    state = None

    def __init__(self, real=False, dynamic=None):
        self.real, self.dynamic = real, dynamic

    def reference(self, model, case):
        """What PyTorch alone does with the dense model in the like way; raises where it cannot."""


class Converted(Way):
    def make(self, model, case, lowering):
        return converted(model, case, lowering)


class Passes(Way):
    """Conversion, tracing by torch.fx, every pass."""

    memory = False

    def make(self, model, case, lowering):
        own = record(copy.deepcopy(model), case.calls())
        try:
            traced = record(fx.symbolic_trace(copy.deepcopy(model)), case.calls())
        except Exception as error:
            raise Refused(f"torch.fx cannot trace it: {error}") from None
        if differences(traced, own, dict.fromkeys(own.tensors, 0.0), memory=False):
            raise Refused("torch.fx traces something else")
        return all_passes(converted(model, case, lowering))


class CompiledConverted(Way):
    def make(self, model, case, lowering):
        self.state = converted(model, case, lowering)
        return torch.compile(self.state, backend="lcnn", dynamic=self.dynamic)

    def reference(self, model, case):
        torch.compiler.reset()
        return record(torch.compile(model, backend="inductor", dynamic=self.dynamic), case.calls())


class CompiledDense(CompiledConverted):
    def make(self, model, case, lowering):
        self.state = model
        return torch.compile(model, backend="lcnn", options={**SAME, "lowering": lowering}, dynamic=self.dynamic)


class Frozen(Way):
    evaluation = True
    memory = False

    def make(self, model, case, lowering):
        same = converted(model, case, lowering)
        return freeze(same, given(case.call(0)), dynamic_batch=len(set(case.batches)) > 1)

    def reference(self, model, case):
        return record(torch.compile(model.eval(), dynamic=False), case.calls())


class Exported(Frozen):
    def reference(self, model, case):
        call = case.call(0)
        program = torch.export.export(model.eval(), call.args, call.kwargs, strict=False)
        return record(program.run_decompositions({}).module(), case.calls())

    def make(self, model, case, lowering):
        same = converted(model, case, lowering)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "m.pt2"
            export_pt2(
                same,
                path,
                given(case.call(0)),
                lowering=lowering if lowering != "auto" else "lookup",
                dynamic_batch=len(set(case.batches)) > 1,
            )
            return torch.export.load(path).module()


WAYS = {
    "converted": Converted(),
    "passes": Passes(),
    "compiled": CompiledConverted(),
    "compiled dense": CompiledDense(),
    "compiled dynamic": CompiledConverted(dynamic=True),
    "dense dynamic": CompiledDense(dynamic=True),
    "frozen": Frozen(),
    "exported": Exported(),
    "compiled by Inductor": CompiledConverted(real=True),
    "dense by Inductor": CompiledDense(real=True),
}


def wrong(case, name, lowering="lookup"):
    """What is wrong with a way of a case, in words; "" where all is right.

    Raises:
        Refused: our code said that it cannot do it.
    """
    way = WAYS[name]
    model = case.build()
    if way.evaluation:
        model.eval()
    arguments = case.calls()
    own = record(copy.deepcopy(model), arguments)
    again = record(copy.deepcopy(model), arguments)
    allowed = spread(model, arguments, own)
    if differences(again, own, allowed):
        return ""  # not even the same twice
    before = copy.deepcopy(model.state_dict())
    with quiet(), inductor(way.real):
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                run = way.make(model, case, lowering)
                after = model.state_dict()
                if any(not torch.equal(before[key], after[key]) for key in before):
                    return "the model given was changed"
                found = record(run, arguments, way.state)
        except Refused:
            raise
        except Exception as error:
            cause = getattr(error, "inner_exception", error)
            if isinstance(cause, LcnnError):
                raise Refused(f"{type(cause).__name__}: {cause}") from None
            try:
                way.reference(case.build(), case)
            except Exception as also:
                raise Refused(f"PyTorch alone fails as well: {type(also).__name__}: {str(also)[:200]}") from None
            text = next((line for line in str(error).splitlines() if line.strip()), "")
            return f"{type(error).__name__}: {text[:300]}"
    texts = differences(found, own, allowed, random=way.random, memory=way.memory)
    if texts and (way.evaluation or way.real):
        try:
            with torch.no_grad(), quiet(), inductor(way.real):
                alone = differences(way.reference(case.build(), case), own, allowed, memory=False)
        except Exception:
            alone = []
        if {text.split(" is ")[0] for text in texts} <= {text.split(" is ")[0] for text in alone}:
            raise Refused(f"PyTorch alone is as wrong: {alone[0]}")
    return "; ".join(texts)
