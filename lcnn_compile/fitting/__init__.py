"""Fitting by numbers: statistics of calibration data, dictionaries, taps, sizes. Nothing here knows a module of ours.

``layer`` fits one layer by the ``stages`` of its statistics, dictionary and taps; ``model`` all layers of a model; ``allocate`` and ``search`` find
sizes for a budget. May import ``geometry`` and the rooms below it.
"""
