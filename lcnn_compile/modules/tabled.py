"""A module with index tables: how they move, are saved, loaded, replaced and checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lcnn_compile.errors import WeightError
from lcnn_compile.geometry import Call
from lcnn_compile.kernels.arguments import Weight
from lcnn_compile.kernels.checks import check_weight
from lcnn_compile.modules.tables import CHECKSUM, TABLES, check_tables, encode, has_values, loaded_tables, table_digest
from lcnn_compile.torch_private import buffers_of, is_tracing


class HasTables(nn.Module):
    """A module with ``dictionary``, ``coefficients`` and the four index tables of a lookup weight. Abstract.

    Tables (int32) are plain attributes: they move with the module and stand in its state dict, and nothing that runs over
    parameters and buffers sees them. Assigning one replaces it.
    """

    dictionary: nn.Parameter
    coefficients: nn.Parameter
    indices: Tensor
    positions: Tensor
    offsets: Tensor
    filters: Tensor
    table_checksum: Tensor
    call: Call
    path: str = ""
    """Qualified name in the model that it was put into, for messages."""

    @property
    def label(self) -> str:
        """What messages call this layer: its kind, and its qualified name where it is known."""
        return f"{type(self).__name__} {self.path!r}" if self.path else type(self).__name__

    def _tables(self) -> dict[str, Tensor]:
        return {name: self.__dict__[name] for name in TABLES}

    def _set_tables(self, tables: dict[str, Tensor]) -> None:
        """Replace the tables, and seal them with their checksum."""
        self.__dict__.update(tables)
        sealed = encode(table_digest(self._tables()))
        old = buffers_of(self).get(CHECKSUM)
        if old is None:
            self.register_buffer(CHECKSUM, sealed.to(self.indices.device))
        elif has_values(old) and not old.is_inference():
            with torch.no_grad():
                old.copy_(sealed)
        else:
            buffers_of(self)[CHECKSUM] = sealed.to(old.device, old.dtype)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in TABLES:
            super().__setattr__(name, value)
            return
        if not isinstance(value, Tensor) or value.dtype != torch.int32:
            found = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise WeightError(f"{self.label}: {name} is {found}; a tensor of torch.int32 is required")
        self._set_tables({**self._tables(), name: value.detach()})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        # Pickles of version 0.1 have the tables among the buffers.
        old: Any = {name: buffers_of(self).pop(name) for name in TABLES if name in buffers_of(self)}
        if old:
            self._set_tables(old)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, table in self._tables().items():
            moved = fn(table)
            # Module.type() casts everything; indices stay integers.
            self.__dict__[name] = moved if moved.dtype == table.dtype else table.to(moved.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # Copies: some moving averages write to the tensors of a state dict.
        destination.update({prefix + name: table.detach().clone() for name, table in self._tables().items()})

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own, label = self._tables(), self.label if self.path else f"{type(self).__name__} {prefix[:-1]!r}"
        given = {name: state_dict[prefix + name] for name in TABLES if prefix + name in state_dict}
        sizes = {name: (tuple(given[name].shape), tuple(own[name].shape)) for name in given}
        different = {name: found for name, found in sizes.items() if found[0] != found[1]}
        checksum = state_dict.get(prefix + CHECKSUM)
        new = None if different else loaded_tables(label, own, given, checksum)
        if new is not None and len(new) == len(TABLES):
            # Factors of other sizes are refused as any module refuses them.
            dictionary, coefficients = (torch.empty(()).expand(t.shape) for t in (self.dictionary, self.coefficients))
            check_weight(label, Weight(dictionary, coefficients, *(new[name].cpu() for name in TABLES)), self.call.kernel_size)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        ours = {prefix + name for name in TABLES}
        unexpected_keys[:] = [key for key in unexpected_keys if key not in ours]
        missing_keys[:] = [key for key in missing_keys if key != prefix + CHECKSUM]
        missing_keys.extend(prefix + name for name in TABLES if name not in given)
        for name, (found, wanted) in different.items():
            error_msgs.append(
                f"size mismatch for {prefix}{name}: copying a param with shape {found} from checkpoint, the shape in current model is {wanted}."
            )
        assign = local_metadata.get("assign_to_params_buffers", False)
        if assign:
            # The checksum may be the state dict's own now, which is not ours to write to.
            buffers_of(self)[CHECKSUM] = self.table_checksum.clone()
        for name, table in (new or {}).items():
            own[name] = table if assign else _filled(own[name], table)
        self._set_tables(own)

    def _check_tables(self) -> None:
        # A compiler traces what is right when it traces, and our operator checks tables on its own.
        if not is_tracing():
            check_tables(self.label, self._tables(), self.table_checksum)


def _filled(table: Tensor, values: Tensor) -> Tensor:
    """``table`` with other values, in place where it has memory that may be written to."""
    if not has_values(table):
        return table
    if table.is_inference() and not torch.is_inference_mode_enabled():
        return values.to(table.device)
    with torch.no_grad():
        return table.copy_(values)
