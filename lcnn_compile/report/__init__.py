"""Reports: one row per layer, as a table in the terminal, a picture, or one HTML file.

``layers`` holds the rows, a file each for what they are shown as. May import ``passes`` and the rooms below it.
"""

from lcnn_compile.report.layers import LayerReport, Report
from lcnn_compile.report.plots import plot_dictionary, plot_pareto
from lcnn_compile.report.times import time_layers, time_planned

__all__ = ["LayerReport", "Report", "plot_dictionary", "plot_pareto", "time_layers", "time_planned"]
