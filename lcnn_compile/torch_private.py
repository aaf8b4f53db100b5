"""All that the package uses of PyTorch without PyTorch promising it: a new version is checked against this one file.

Everything else imports it from here under a name that says what it is for. Tested with torch 2.11.0, 2.13.0 and 2.14.1.
"""

from __future__ import annotations

import functools
import importlib
import linecache
import operator
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import DynamicOutputShapeException as SizeOfData
from torch.fx import graph_module as _graph_module
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes as without_modes

from lcnn_compile.files import digest

__all__ = [
    "DISPATCHED",
    "NATIVE_FUNCTIONS",
    "BatchNorm",
    "ConvolutionBase",
    "DropoutBase",
    "FakeTensor",
    "FakeTensorMode",
    "InstanceNormBase",
    "NormBase",
    "OpOverload",
    "OpOverloadPacket",
    "SizeOfData",
    "alone_with_dynamo",
    "autocast_depth",
    "buffers_of",
    "called_eagerly",
    "check_calls",
    "children_of",
    "compile_package",
    "compile_with_inductor",
    "dispatched_operators",
    "dynamo_signals",
    "example_of_size",
    "fixed_number",
    "has_hooks",
    "has_implicit_kernel",
    "inductor_freezing",
    "inductor_modes",
    "inside_transform",
    "is_boxed_float",
    "is_composite",
    "is_tracing",
    "is_users_tensor",
    "known_size",
    "least_size",
    "load_package",
    "mark_static",
    "module_of",
    "move_hooks",
    "never_alone",
    "occupy_gpu",
    "owned_by",
    "package_metadata",
    "package_spec",
    "pads_of",
    "parameters_of",
    "plain_dtypes",
    "pre_hooks_of",
    "profiled_kernels",
    "pytree",
    "sizes_apart",
    "storage_of",
    "tensor_names",
    "tensors_of",
    "version",
    "without_autocast",
    "without_compilers",
    "without_modes",
    "without_sources",
    "without_torch_function",
    "without_transforms",
]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
_OWNED = re.compile(r"_(parameters|buffers)_")
_OWNER = re.compile(r"\._(parameters|buffers)\['")
_MEMBER = re.compile(r"\._(?:modules|parameters|buffers)\['([^']+)'\]")

BatchNorm = nn.modules.batchnorm._BatchNorm
"""What all batch norms derive from."""
NormBase = nn.modules.batchnorm._NormBase
InstanceNormBase = nn.modules.instancenorm._InstanceNorm
ConvolutionBase = nn.modules.conv._ConvNd
DropoutBase = nn.modules.dropout._DropoutNd
NATIVE_FUNCTIONS: Any = torch._C._nn
"""Functions of torch.nn.functional that are not written in Python."""
OpOverload, OpOverloadPacket = torch._ops.OpOverload, torch._ops.OpOverloadPacket
DISPATCHED = "torch._jit_internal"
"""Where functions of torch.nn.functional live that choose between two by a flag, such as max_pool2d."""
without_torch_function = torch._C.DisableTorchFunctionSubclass
"""A context in which subclasses of tensors are plain tensors."""

version: Callable[[Tensor], int] = operator.attrgetter("_version")
"""How often a tensor was written to in place; inference tensors have none and raise RuntimeError."""


# Dynamo and Inductor take seconds to import, and are only wanted where something is compiled.


def compile_with_inductor(graph: fx.GraphModule, inputs: list[Any], patches: dict[str, Any]) -> Callable[..., Any]:
    """Inductor's callable for a graph, under changes of its configuration.

    Its caches on disk know a graph by the names of our operators; the tag tells them which code those stood for.
    """
    from torch._inductor.compile_fx import compile_fx
    from torch.compiler import config

    _fix_sizes(inputs)
    tag = f"{config.cache_key_tag} lcnn {_source_digest()}"
    # Freezing takes constants for weights that may change later, and ours are inputs anyway.
    with config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]
        compiled: Any = compile_fx(graph, inputs, config_patches={**patches, "freezing": False})
    return compiled


def _fix_sizes(inputs: list[Any]) -> None:
    """Tell the compilation in progress that tensors which Dynamo has not seen, being derived from weights, have fixed sizes.

    Their sizes become symbols otherwise, without a source: a guard on one of them cannot be written, which ends Dynamo's work.
    """
    from torch._dynamo.source import ConstantSource
    from torch._guards import TracingContext
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatefulSymbolicContext

    context = TracingContext.try_get()
    if context is None:
        return
    for number, value in enumerate(inputs):
        if isinstance(value, Tensor) and not isinstance(value, FakeTensor) and value not in context.tensor_to_context:
            context.tensor_to_context[value] = StatefulSymbolicContext(
                dynamic_sizes=[DimDynamic.STATIC] * value.dim(),
                constraint_sizes=[None] * value.dim(),
                tensor_source=ConstantSource(f"lcnn_derived_{number}"),
                shape_env_to_source_to_symbol_cache={},
            )


@functools.cache
def _source_digest() -> str:
    """Of the operators' Python code: what tracing sees of them, forwards and backwards."""
    return digest((), sorted((Path(__file__).parent / "kernels").rglob("*.py")))


def compile_package(program: Any, path: str, metadata: dict[str, str]) -> bool:
    """Write AOTInductor's package of an exported program; whether it checks the form of its inputs."""
    from torch._inductor import config

    options: dict[str, Any] = {"aot_inductor.metadata": metadata}
    if hasattr(config.aot_inductor, "check_lowerbound"):
        # Or a batch of one would be refused.
        options["aot_inductor.check_lowerbound"] = False
    with _checked_inputs() as added:
        torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=options)
    return all(added) and bool(added)


@contextmanager
def _checked_inputs() -> Iterator[list[bool]]:
    """Let the code that AOTInductor writes check its inputs always, not only where an environment variable asks for it.

    Yields a list that tells of each piece of code whether that was done. Its own check looks at sizes without looking at
    their number first.
    """
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu
    from torch._inductor.virtualized import V

    plain: Callable[[Any], None] = CppWrapperCpu.generate_input_output_runtime_checks
    asked, added = "if (!_check_aoti_runtime_check_inputs_env())", []

    def always(self: Any) -> None:
        plain(self)
        lines = getattr(self.prefix, "aot", self.prefix)._lines
        found = [i for i, line in enumerate(lines) if isinstance(line, str) and asked in line]
        for i in found:
            lines[i] = lines[i].replace(asked, "if (false)")
        seen: dict[str, tuple[int, int]] = {}
        for number, (name, value) in enumerate(V.graph.graph_inputs.items()):
            line = f"auto {name}_size = {name}.sizes();"
            at = [i for i, text in enumerate(lines) if isinstance(text, str) and text.strip() == line]
            sizes = value.get_size() if hasattr(value, "get_size") else []
            for i in at:
                lines[i] = f"{_dimension_check(name, len(sizes))} {lines[i]} {_equal_sizes(name, number, sizes, seen)}"
        added.append(bool(found))

    CppWrapperCpu.generate_input_output_runtime_checks = always  # type: ignore[method-assign]
    try:
        yield added
    finally:
        CppWrapperCpu.generate_input_output_runtime_checks = plain  # type: ignore[method-assign]


def _dimension_check(name: str, dimensions: int) -> str:
    """C++ that refuses an input of another number of dimensions."""
    return (
        f"{{ int64_t lcnn_dim; AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim({name}, &lcnn_dim)); "
        f'if (lcnn_dim != {dimensions}) throw std::runtime_error("an input has " + std::to_string(lcnn_dim) + '
        f'" dimensions; it was compiled for {dimensions}"); }}'
    )


def _equal_sizes(name: str, number: int, sizes: Any, seen: dict[str, tuple[int, int]]) -> str:
    """C++ that refuses an input whose varying sizes are not those that earlier inputs share with it."""
    checks = []
    for dim, size in enumerate(sizes):
        if isinstance(size, int) or size.is_number:
            continue
        first = seen.setdefault(str(size), (number, dim))
        if first != (number, dim):
            checks.append(
                f"{{ int64_t* lcnn_sizes; AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(input_handles[{first[0]}], &lcnn_sizes)); "
                f"if (lcnn_sizes[{first[1]}] != {name}_size[{dim}]) "
                f'throw std::runtime_error("sizes of inputs {first[0]} and {number} are unmatched"); }}'
            )
    return " ".join(checks)


def load_package(path: str) -> Callable[..., Any]:
    """What an AOTInductor package computes."""
    loaded: Any = torch._inductor.aoti_load_package(path)
    return loaded


def package_metadata(package: Any) -> dict[str, str]:
    """The texts that were put into a loaded package."""
    metadata: dict[str, str] = package.get_metadata()
    return metadata


def package_spec(package: Any) -> Any:
    """The structure of the arguments (args, kwargs) that a loaded package takes."""
    return pytree.treespec_loads(package.loader.get_call_spec()[0])


def profiled_kernels() -> Any:
    """A context in which Inductor compiles kernels that the profiler knows by name."""
    from torch._inductor import config

    return config.patch("cpp.enable_kernel_profile", True)


def inductor_modes() -> dict[str, dict[str, Any]]:
    """The configuration changes that each ``mode`` of ``torch.compile`` stands for."""
    from torch._inductor import list_mode_options

    modes: Any = list_mode_options()
    return modes


def dynamo_signals() -> tuple[type[BaseException], ...]:
    """Exceptions by which a compiler tells Dynamo to begin again, or to leave a frame alone: no failures."""
    from torch._dynamo.exc import RestartAnalysis, SkipFrame

    return RestartAnalysis, SkipFrame


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The dictionary of a module's own parameters, as it is kept."""
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """The dictionary of a module's own buffers, as it is kept."""
    return module._buffers


@contextmanager
def alone_with_dynamo() -> Iterator[None]:
    """No other thread traces or compiles meanwhile: what torch.fx and Dynamo keep of a trace is global."""
    from torch._dynamo.convert_frame import compile_lock

    with compile_lock:
        yield


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """The dictionary of a module's children, as it is kept: names may share a module, and writing to it replaces."""
    return module._modules


def tensors_of(module: nn.Module) -> tuple[dict[str, nn.Parameter | None], dict[str, Tensor | None]]:
    """The dictionaries of a module's own parameters and buffers, as they are kept: writing to them replaces.

    Those of a scripted module, which keeps them elsewhere, are copies.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return dict(module.named_parameters(recurse=False)), dict(module.named_buffers(recurse=False))
    return module._parameters, module._buffers


def tensor_names(module: nn.Module) -> set[str]:
    """Names of a module's own parameters and buffers, those that are None among them."""
    return {*module._parameters, *module._buffers}


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its ``forward``."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def has_implicit_kernel(operator: Any) -> bool:
    """Whether an operator is composed of others, so that its schema does not say what its result aliases."""
    found: bool = torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), "CompositeImplicitAutograd")
    return found


def pre_hooks_of(module: nn.Module) -> list[Callable[..., Any]]:
    """The functions that run before the module's ``forward``."""
    return list(module._forward_pre_hooks.values())


def check_calls(graph: fx.GraphModule, check: Callable[..., None]) -> None:
    """Let ``check(module, args, kwargs)`` run before each call of a graph and of its copies, which lose other hooks."""

    def add(module: fx.GraphModule) -> None:
        module.register_forward_pre_hook(check, with_kwargs=True)

    add(graph)
    graph._register_deepcopy_hook(add)


def move_hooks(old: nn.Module, new: nn.Module) -> None:
    """Let the forward hooks of ``old`` run for ``new`` too; their handles remove them from both."""
    for name in _HOOKS:
        getattr(new, name).update(getattr(old, name))


def pads_of(conv: nn.Module) -> tuple[int, ...]:
    """What a convolution with a padding_mode hands to ``F.pad``: (left, right, top, bottom) in two dimensions."""
    pads: list[int] = conv._reversed_padding_repeated_twice  # type: ignore[assignment]
    return tuple(pads)


def module_of(compiled: Any) -> Any:
    """The module that ``torch.compile`` wrapped; what is no wrapper comes back as it is."""
    return getattr(compiled, "_orig_mod", compiled)


@contextmanager
def called_eagerly(model: nn.Module) -> Iterator[None]:
    """Modules inside ``model`` that ``torch.compile`` wrapped, ``model`` included, run uncompiled."""
    if any(module_of(module) is not module for module in model.modules()):
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


def without_compilers(model: nn.Module) -> nn.Module:
    """``model`` with the modules themselves in place of those inside that ``torch.compile`` wrapped; changed in place."""
    model = module_of(model)
    for module in list(model.modules()):
        for name, child in list(children_of(module).items()):
            if child is not None and module_of(child) is not child:
                children_of(module)[name] = module_of(child)
    return model


@contextmanager
def plain_dtypes() -> Iterator[None]:
    """Without the autocast that is on around it."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def least_size(program: torch.export.ExportedProgram, size: Any) -> int:
    """The smallest value of a size of an exported program that varies; 0 for one that does not."""
    if not isinstance(size, torch.SymInt) or size.node.maybe_as_int() is not None:
        return 0
    return max(1, int(program.range_constraints[size.node.expr].lower))


def sizes_apart() -> Any:
    """A context in which sizes that are alike in the example are not taken for one symbol."""
    from torch.fx.experimental import _config

    return _config.patch(use_duck_shape=False)  # type: ignore[attr-defined]


def never_alone(function: Callable[..., Any]) -> None:
    """Let Dynamo trace ``function`` within what calls it, and not where the caller itself is not traced."""
    # Not through torch._dynamo, whose import takes a second.
    frames = importlib.import_module("torch._C._dynamo.eval_frame")
    action = frames._FrameAction
    frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(action.SKIP, action.DEFAULT))


def is_tracing() -> bool:
    """Whether ``torch.compile``, ``torch.export`` or ``torch.jit.trace`` runs this code to write down what it does."""
    return torch.compiler.is_compiling() or bool(torch._C._get_tracing_state())


# Compiled alone, for a caller that is not, it would say yes.
never_alone(is_tracing)


def inside_transform() -> bool:
    """Whether a ``torch.func`` transform (``vmap``, ``grad``, …) runs this code."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def without_transforms(tensor: Tensor) -> Tensor:
    """The tensor in memory behind those that ``torch.func`` wraps around it, with the dimensions that it maps over."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def is_users_tensor(node: fx.Node) -> bool:
    """Whether Dynamo named a placeholder after a parameter or buffer of the user's modules."""
    return _OWNED.search(str(node.target)) is not None


def owned_by(node: fx.Node) -> tuple[str, list[str]] | None:
    """The expression of the object that owns a placeholder's parameter, and the parameter's path in it; None if unknown."""
    argument = node.meta.get("grapharg")
    source = getattr(argument, "source", None) or getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", "")
    text = str(name() if callable(name) else name)
    first = _MEMBER.search(text)
    if first is None or not _OWNER.search(text):
        return None
    return text[: first.start()], _MEMBER.findall(text)


def _forget(code: str) -> None:
    """Forget the source of one graph's code; see :func:`without_sources`."""
    _graph_module._loader.eval_cache.pop(code, None)
    linecache.cache.pop(code, None)


@contextmanager
def without_sources() -> Iterator[None]:
    """Graphs made inside leave no source text behind.

    ``fx.GraphModule`` keeps the source of every version of every graph for tracebacks, for ever; graphs that are rebuilt
    with each change of a weight would fill the memory.
    """
    first = _graph_module._loader.next_id
    try:
        yield
    finally:
        last = _graph_module._loader.next_id
        for key in [k for k in list(_graph_module._loader.eval_cache) if first <= _number(k) < last]:
            _forget(key)


def _number(key: str) -> int:
    found = re.match(r"<eval_with_key>\.(\d+)", key)
    return int(found[1]) if found else -1


def occupy_gpu(cycles: int) -> None:
    """Let the current GPU wait so many cycles, in its stream."""
    torch.cuda._sleep(cycles)


def mark_static(tensor: Tensor) -> None:
    """Tell Dynamo that the sizes of a tensor never vary."""
    if not hasattr(tensor, "_dynamo_static_indices"):
        torch._dynamo.mark_static(tensor)


def dispatched_operators() -> frozenset[str]:
    """The names of all operators that take tensors, as "aten::add.Tensor"; TorchScript has more, for lists and numbers."""
    return frozenset(torch._C._dispatch_get_all_op_names())


def is_composite(name: str) -> bool:
    """Whether an operator is written in terms of others, so that its schema may keep silent about what those alias."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd"))


def known_size(value: Any) -> int | None:
    """The number that a symbolic one was traced with, a plain one itself; None where it depends on data."""
    if not isinstance(value, torch.SymInt):
        return int(value)
    return None if value.node.hint is None else int(value.node.hint)


def example_of_size(value: Any) -> int:
    """The size that a symbolic dimension was traced with; a plain size itself."""
    return int(value.node.hint) if isinstance(value, torch.SymInt) and value.node.hint is not None else int(value)


def storage_of(tensor: Tensor) -> int | None:
    """What two tensors have in common that share memory, fake ones too; None for a layout without plain memory."""
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else None


def autocast_depth() -> int:
    """How many autocast contexts are open."""
    depth = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    return depth


def is_boxed_float(node: fx.Node) -> bool:
    """Whether a placeholder is a float of the user's that Dynamo hands over as a tensor, to be read by ``item()``."""
    memo = getattr(node.meta.get("example_value"), "item_memo", None)
    # A tensor of the user's whose item() was traced has a memo too, but no value yet.
    known = isinstance(memo, torch.SymFloat) and memo.node.hint is not None
    return known and all(user.op == "call_method" and user.target == "item" for user in node.users)


def fixed_number(value: Any) -> Any:
    """A symbolic number as the plain one it was traced with, which Dynamo from now on compiles for alone."""
    from torch.fx.experimental.symbolic_shapes import guard_scalar

    return guard_scalar(value)


def without_autocast(device: str) -> Any:
    """A context in which operators called by the autocast implementation of ``device`` do not come back to it."""
    key = torch._C.DispatchKeySet(torch._C._dispatch_key_parse(f"Autocast{device.upper()}"))
    return torch._C._ExcludeDispatchKeyGuard(key)


@contextmanager
def inductor_freezing() -> Iterator[None]:
    """Within, Inductor compiles with parameters as constants."""
    import torch._inductor.config as config

    with config.patch(freezing=True):
        yield
