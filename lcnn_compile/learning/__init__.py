"""Learning dictionaries, taps and coefficients."""
