"""Choices: what a mapping has for the layers of a graph, and whether another mapping has the same.

A compiled graph holds the kernels of the mapping in force when it was traced. `Choices` is the
condition under which it may be used again.
"""

from __future__ import annotations

from kernelgraph.selection.devices import Target
from kernelgraph.selection.mapping import KernelMapping
from kernelgraph.selection.matching import Rejection, Selection, selections
from kernelgraph.selection.modes import Mode
from kernelgraph.selection.scopes import current_mapping


class Choices:
    """The kernels that a mapping has for some layers.

    Args:
        mapping: The mapping.
    """

    def __init__(self, mapping: KernelMapping) -> None:
        self._mapping = mapping
        self._alike = mapping
        """The last mapping that was found to choose alike."""
        self._asked: list[tuple[str, Target, Mode]] = []

    def note(self, layer_name: str, target: Target, mode: Mode) -> None:
        """Note that the kernels for a layer were asked for; see `selections`."""
        self._asked.append((layer_name, target, mode))

    def hold(self) -> bool:
        """Whether the mapping in force has the same kernels for all layers that were noted."""
        mapping = current_mapping()
        if mapping is self._alike:
            return True
        alike = all(self._chosen(mapping, *one) == self._chosen(None, *one) for one in self._asked)
        if alike:
            self._alike = mapping
        return alike

    def _chosen(
        self, mapping: KernelMapping | None, layer_name: str, target: Target, mode: Mode
    ) -> tuple[Selection, ...]:
        found = selections(mapping or self._mapping, layer_name, target, mode)
        return () if isinstance(found, Rejection) else found
