"""Kernels inside compiled graphs: capture, custom ops and the ``hubkernels`` backend."""
