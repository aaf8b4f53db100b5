"""Learning dictionaries, taps and coefficients (LCNN, sections 3.2 and 3.3, with calibration data instead of labels).

Here modules are trained: ``distill``, ``soft`` taps, dictionaries carried over (``transfer``). What is found by numbers alone is in ``fitting``. May import
``checkpoint`` and the rooms below it.
"""

from lcnn_compile.conversion.sweep import SweepPoint, sweep
from lcnn_compile.fitting.fitted import FittedLayer
from lcnn_compile.fitting.model import fit_model
from lcnn_compile.learning.distill import Epoch, History, distill
from lcnn_compile.learning.soft import harden, soft_taps, soften, sparsity_penalty
from lcnn_compile.learning.transfer import carry_dictionaries, freeze_dictionaries

__all__ = [
    "Epoch",
    "FittedLayer",
    "History",
    "SweepPoint",
    "carry_dictionaries",
    "distill",
    "fit_model",
    "freeze_dictionaries",
    "harden",
    "soft_taps",
    "soften",
    "sparsity_penalty",
    "sweep",
]
