"""Eager use: ``kernelize`` puts kernels in the place of a model's forwards.

`kernelization` decides on a kernel for each class of layers and puts a `KernelForward` on each
instance, with a forward of `instance_forwards`. At the first call of a form, which is what calls
with the same layouts of arguments have in common, the kernel is examined (`examination`): kernel
and reference run on copies (`twins`), and their `effects` are compared. `routes` keeps the outcome
by the keys of `call_keys`. It leads to the kernel's forward, to the layer's reference, or to a
forward of `route_forwards`. Calls through which a gradient may flow have routes of their own.

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
    - A call has the effects of a call of the reference, and no others: it writes, draws and changes
      what that does, and its results share memory with the same tensors and have the same strides.
      Where a kernel cannot be called so, the call runs on the reference, and the report says why.
    - What runs for an examination or a trial leaves nothing behind.
    - Importing this package imports no part of torch's compiler, nor does kernelizing without
      ``Mode.TORCH_COMPILE``. The first eager call does.
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
