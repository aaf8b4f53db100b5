"""The one exception family of the package."""

from __future__ import annotations


class LcnnError(ValueError, RuntimeError):
    """Base of everything that lcnn_compile raises on purpose.

    It is both a ValueError and a RuntimeError because that is what torch.nn.Conv2d raises, at construction
    and at call, for the same mistakes: code that handles one layer handles the other.
    """


class ConfigError(LcnnError):
    """A LookupConfig, an option or a selection rule that cannot be obeyed."""


class WeightError(LcnnError):
    """A lookup weight whose tensors contradict each other, or the input they are applied to."""


class WriteError(WeightError):
    """A write to the dense weight of a lookup layer, which would be lost."""


class ConversionError(LcnnError):
    """A model that cannot be converted, calibrated or fitted."""


class CheckpointError(LcnnError):
    """A file that is not a lookup checkpoint, is damaged, or does not fit the module it is loaded into."""


class ExportError(LcnnError):
    """A model that cannot be brought into another form, or a form that lacks something."""


class KernelError(LcnnError):
    """A kernel or a lowering that was asked for explicitly and cannot run here."""


class LcnnWarning(UserWarning):
    """Something was left undone or done in a slower way; the message says what and why."""
