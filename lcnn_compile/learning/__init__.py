"""Learning dictionaries, taps and coefficients (LCNN, sections 3.2 and 3.3, with calibration data instead of labels)."""

from lcnn_compile.learning.distill import Epoch, History, distill
from lcnn_compile.learning.model import FittedLayer, fit_model
from lcnn_compile.learning.soft import harden, soft_taps, soften, sparsity_penalty
from lcnn_compile.learning.sweep import SweepPoint, sweep

__all__ = [
    "Epoch",
    "FittedLayer",
    "History",
    "SweepPoint",
    "distill",
    "fit_model",
    "harden",
    "soft_taps",
    "soften",
    "sparsity_penalty",
    "sweep",
]
