"""Checking and importing one variant on a disk, as a load from the Hub does with the files."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from kernelgraph.builds import check_variant, import_checked
from kernelgraph.selection import Target


def load_variant(directory: Path, target: Target, **arguments: Any) -> ModuleType:
    return import_checked(check_variant(directory, target, **arguments))
