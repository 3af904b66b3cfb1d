"""The structure of the package: sizes, names and doors of its modules."""

from __future__ import annotations

import ast
import importlib
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "kernelgraph"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
DOORS = sorted(path for path in PACKAGE.rglob("__init__.py") if path.parent.name != "graph")
WINGS = [door.parent for door in DOORS if door.parent != PACKAGE]
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_module_has_at_most_400_lines() -> None:
    assert [shown(path) for path in MODULES if lines(path) > 400] == []


def test_test_file_has_at_most_600_lines() -> None:
    assert [shown(path) for path in TESTS if lines(path) > 600] == []


def test_wing_has_at_most_8_modules() -> None:
    counts = Counter(p.parent for p in MODULES if p.name not in ("__main__.py", "_version.py"))
    assert {shown(wing): count for wing, count in counts.items() if count > 8} == {}


def test_module_names_are_unique() -> None:
    counts = Counter(path.stem for path in MODULES)
    assert [name for name, count in counts.items() if count > 1] == []


@pytest.mark.parametrize("door", DOORS, ids=shown)
def test_door_has_a_docstring_with_invariants(door: Path) -> None:
    docstring = ast.get_docstring(ast.parse(door.read_text()))
    assert docstring
    assert door.parent == PACKAGE or "\nInvariants:\n" in docstring


@pytest.mark.parametrize("wing", WINGS, ids=shown)
def test_door_exports_no_name_of_a_module(wing: Path) -> None:
    """Such a name would hide the module from ``import a.b.c as m``."""
    name = ".".join(wing.relative_to(ROOT).parts)
    exported = importlib.import_module(name).__all__
    assert set(exported) & {path.stem for path in wing.glob("*.py")} <= {"sample_inputs"}


def test_only_the_private_torch_wing_reads_version_counters() -> None:
    found = [
        p for p in MODULES if re.search(r"(?<!kernelgraph)\._version\b(?!\.__)", p.read_text())
    ]
    assert [shown(p) for p in found if p.parent.name != "_torch"] == []


def test_docstring_begins_with_the_thing_or_the_verb() -> None:
    """ "What …", "Of …" and the like have no subject or no verb."""
    vague = re.compile(r"(What|Of|Have|Where|Whether it may|See that|How it) ")
    found = []
    for path in MODULES + DOORS:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (
                vague.match(ast.get_docstring(node) or "")
            ):
                found.append(f"{shown(path)}: {ast.get_docstring(node)}".splitlines()[0])
    assert found == []


def test_contributing_names_files_that_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = re.findall(r"`((?:\w+/)*\w+\.py|(?:\w+/)+)`", text)
    places = {name: (PACKAGE / name, ROOT / name) for name in named}
    assert named
    assert [name for name, paths in places.items() if not any(p.exists() for p in paths)] == []


def imported_by(path: Path) -> list[str]:
    """The modules that a module imports, as dotted names of modules or of what they hold."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return found


def test_import_from_another_wing_goes_through_its_door() -> None:
    inside = {
        ".".join(path.with_suffix("").relative_to(ROOT).parts): path.parent
        for path in MODULES
        if path.parent != PACKAGE
    }
    found = {
        f"{shown(path)} imports {name}"
        for path in [*MODULES, *DOORS]
        for name in imported_by(path)
        if inside.get(name, path.parent) != path.parent and not name.endswith(".sample_inputs")
    }
    assert found == set()
