"""The operator ``torch.ops.lcnn.lookup_conv2d`` and the kernels behind it.

``operator`` registers it and hands its ``arguments``, as one value that ``checks`` has seen, to ``cpu`` (C++), to ``triton`` (GPUs) or to ``reference``, the
truth in plain PyTorch; ``backward`` has its gradients. ``problem``, ``measured`` and ``choose`` say which lowering is cheapest. May import nothing of the
package but what every room may: errors, files and ``torch_private``.
"""
