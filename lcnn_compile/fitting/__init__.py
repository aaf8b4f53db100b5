"""Fitting by numbers: statistics of calibration data, dictionaries, taps, sizes. Nothing here knows a module of ours."""
