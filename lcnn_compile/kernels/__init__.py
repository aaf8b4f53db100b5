"""The operator ``torch.ops.lcnn.lookup_conv2d`` and the kernels behind it."""
