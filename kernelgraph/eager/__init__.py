"""Eager use: ``kernelize`` puts kernels in the place of a model's forwards.

`kernelization` decides on a kernel for each class of layers and puts a `KernelForward` on each
instance. For training that is a forward of `training`, which asks `routes` about every call
through which a gradient may flow. A route is found by the key of the call (`call_keys`). It leads
to the kernel's forward, to the layer's reference, or to a forward of `route_forwards`.

Invariants:
    - A model is kernelized as a whole, or, where an error is raised, not changed at all.
    - Only ``forward`` in the ``__dict__`` of an instance changes: parameters, buffers, hooks and
      the class stay as they are. A forward that is neither the class's nor a `KernelForward` is
      left alone.
    - Deep copies and pickles of a model keep its kernels. Where a kernel cannot be loaded, an
      unpickled layer runs on its reference.
    - In a layer kernelized for training, no gradient flows through a kernel in eager use before
      its output and its gradients have been compared with those of the layer's reference (unless
      ``verify_gradients`` is False). One that is missing or found wrong is never used.
    - Importing this package imports no part of torch's compiler, nor does kernelizing without
      ``Mode.TORCH_COMPILE``. The first eager call that needs a gradient does.
"""

from kernelgraph.eager.kernelization import (
    KernelForward,
    kernelize,
    named_layers,
)

__all__ = [
    "KernelForward",
    "kernelize",
    "named_layers",
]
