"""FX passes, each usable on any GraphModule."""
