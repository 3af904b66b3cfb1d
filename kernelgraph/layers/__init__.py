"""Extensible layers: classes and functions whose ``forward`` a kernel may replace.

An extensible layer carries its layer name in the class attribute ``kernel_layer_name``. This is
the convention of the ecosystem and not of this package alone, so a class that another package
tagged is extensible here too. `decorators` sets the tag, `tags` finds it, and `hub_layer` checks
that the class which a repository loaded may replace a layer's ``forward``. `class_data` keeps the
counters of a program's classes as they are while a forward runs for a trial.

Invariants:

- A tagged class is the class that was decorated, with three class attributes more.
- A subclass is extensible only as long as it inherits the ``forward`` that is tagged.
- `Extensible.reference` is the author's ``forward``, also where a wrapper captures its calls.
- Each class that this package tags is announced to each listener of `on_extensible`, and so is each
  class that was tagged before, by whatever package.
- A hub layer that `check_hub_layer` accepts has no ``__init__`` and no members but ``forward`` and
  two flags, and takes the same number and kinds of parameters as the reference. Their names may
  differ: `named_forward` gives it those of the reference.
- Nothing here imports torch before a class is tagged or looked at.
"""

from kernelgraph.layers.class_data import program_data_kept
from kernelgraph.layers.decorators import (
    class_of_function,
    functions_of,
    replace_kernel_forward_from_hub,
    use_kernel_forward_from_hub,
    use_kernelized_func,
)
from kernelgraph.layers.hub_layer import check_hub_layer, named_forward
from kernelgraph.layers.tags import (
    CONDITION,
    FAKE,
    FUNCTION,
    FUNCTIONS,
    NAME,
    Extensible,
    extensible,
    on_extensible,
    original,
    reference_of,
    tagged_subclasses,
)

__all__ = [
    "CONDITION",
    "FAKE",
    "FUNCTION",
    "FUNCTIONS",
    "NAME",
    "Extensible",
    "check_hub_layer",
    "class_of_function",
    "extensible",
    "functions_of",
    "named_forward",
    "on_extensible",
    "original",
    "program_data_kept",
    "reference_of",
    "replace_kernel_forward_from_hub",
    "tagged_subclasses",
    "use_kernel_forward_from_hub",
    "use_kernelized_func",
]
