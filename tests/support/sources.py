"""Imports of the examples by path: they are programs, and in no package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

EXAMPLES = Path(__file__).parents[2] / "examples"


def import_example(name: str) -> ModuleType:
    """Return the module ``examples/<name>.py``, imported once."""
    return import_file(EXAMPLES / f"{name}.py", f"examples_{name.replace('/', '_')}")


def import_file(path: Path, name: str) -> ModuleType:
    """Return the module at ``path``, or the package of an ``__init__.py``, imported as ``name``."""
    if name in sys.modules:
        return sys.modules[name]
    package = [str(path.parent)] if path.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=package)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
