"""The Triton kernels: S by ``dictionary``, lookups by ``lookup`` or ``grouped``, what follows them by ``epilogue``, and ``chain``, which fuses a layer with the next one's S.

``ops`` is where the operator meets them and imports Triton at the first call that can use it; ``tune`` and ``chain_tune`` choose block sizes, ``choose`` the
lowering. May import of ``kernels`` what ``cpu`` may, and what measures lowerings.
"""
