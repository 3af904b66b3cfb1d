"""Importing kernels: under names of their own, side by side, and once."""

from __future__ import annotations

import importlib
import inspect
import json
import py_compile
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from kernelgraph.builds.hub_layers import origin_of
from kernelgraph.hub.kernels import get_local_kernel
from kernelgraph.selection.devices import Target
from tests.support.load_variant import load_variant
from tests.support.toy_repository import METADATA, layer_files, write_repository


class TestModules:
    def test_module_name_has_the_kernels_name_and_its_content_hash(self, repo):
        kernel = get_local_kernel(repo)
        prefix, digits = kernel.__name__.rsplit("_", 1)
        assert prefix == "kernelgraph_toy"
        assert len(digits) == 16
        assert origin_of(kernel.layers.Add).revision.startswith(digits)

    def test_odd_name_becomes_an_identifier(self, tmp_path):
        write_repository(tmp_path, metadata={"name": "my-kernel/2.0 é"})
        assert get_local_kernel(tmp_path).__name__.startswith("kernelgraph_my_kernel_2_0___")

    def test_equal_content_is_imported_once(self, repo, tmp_path):
        first = get_local_kernel(repo)
        shutil.copytree(repo, tmp_path / "copy")
        assert get_local_kernel(repo) is first
        assert get_local_kernel(tmp_path / "copy") is first

    def test_two_revisions_are_imported_side_by_side(self, repo):
        old = get_local_kernel(repo)
        write_repository(repo, layer_files(result=10))
        new = get_local_kernel(repo)
        x = torch.ones(1)
        assert old.layers.Add()(x) == 2
        assert new.layers.Add()(x) == 11
        assert origin_of(old.layers.Add).revision != origin_of(new.layers.Add).revision

    @pytest.mark.parametrize("id_", ["_same_1", "json"])
    def test_two_repositories_with_one_id_do_not_meet(self, tmp_path, id_):
        for result in (1, 2):
            metadata = {**METADATA, "id": id_}
            write_repository(tmp_path / f"r{result}", layer_files(result=result), metadata=metadata)
        kernels = [get_local_kernel(tmp_path / f"r{result}") for result in (1, 2)]
        assert [kernel.RESULT for kernel in kernels] == [1, 2]
        assert sys.modules["json"] is json
        assert "_same_1" not in sys.modules

    def test_metadata_belongs_to_the_content(self, tmp_path):
        for name in ("one", "two"):
            write_repository(tmp_path / name, metadata={"name": name})
        names = {
            name: origin_of(get_local_kernel(tmp_path / name).layers.Add).name
            for name in ("one", "two")
        }
        assert names == {"one": "one", "two": "two"}

    def test_package_imports_its_own_modules(self, tmp_path):
        files = {
            "__init__.py": "from .deep.er import value\nfrom . import late\n",
            "deep/er.py": "from ..base import value\n",  # deep/ is a namespace package
            "base.py": "value = 7\n",
            "late.py": "def get():\n    from .later import value\n    return value\n",
            "later.py": "value = 8\n",
        }
        write_repository(tmp_path, files)
        kernel = get_local_kernel(tmp_path)
        assert kernel.value == 7
        assert kernel.late.get() == 8
        assert importlib.import_module(f"{kernel.__name__}.base").value == 7

    def test_other_modules_are_imported_as_usual(self, tmp_path):
        write_repository(tmp_path, {"__init__.py": "import json, colorsys"})
        assert get_local_kernel(tmp_path).json is json

    def test_kernel_reads_files_beside_its_module(self, tmp_path):
        files = {
            "__init__.py": (
                "from importlib.resources import files\nfrom pathlib import Path\n"
                "BY_PATH = (Path(__file__).parent / 'config.json').read_text()\n"
                "BY_PACKAGE = (files(__package__) / 'config.json').read_text()\n"
            ),
            "config.json": "{}",
        }
        write_repository(tmp_path, files)
        kernel = get_local_kernel(tmp_path)
        assert (kernel.BY_PATH, kernel.BY_PACKAGE) == ("{}", "{}")

    def test_source_of_a_layer_can_be_inspected(self, repo):
        assert "x + 1" in inspect.getsource(get_local_kernel(repo).layers.Add)

    def test_missing_submodule_is_an_import_error(self, tmp_path):
        write_repository(tmp_path, {"__init__.py": "from . import nothing"})
        with pytest.raises(ImportError, match="cannot import name 'nothing'"):
            get_local_kernel(tmp_path)


class TestBytecode:
    def plant(self, source: Path, where: Path) -> None:
        evil = source.with_name("evil_source.txt")
        evil.write_text("RESULT = 666\nclass Add: pass\n")
        where.parent.mkdir(exist_ok=True)
        # The import system uses unchecked bytecode without a look at the source.
        mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
        py_compile.compile(str(evil), cfile=str(where), invalidation_mode=mode, doraise=True)
        evil.unlink()

    def test_bytecode_in_pycache_is_not_used(self, repo):
        for name in ("__init__", "layers"):
            source = repo / f"build/torch-universal/{name}.py"
            self.plant(source, Path(importlib.util.cache_from_source(str(source))))
        kernel = get_local_kernel(repo)
        assert kernel.RESULT == 1
        assert kernel.layers.Add()(torch.ones(1)) == 2

    @pytest.mark.parametrize(
        "place", ["hidden.pyc", "__pycache__/hidden.py", "hidden/__init__.pyc"]
    )
    def test_bytecode_without_a_source_is_not_found(self, tmp_path, place):
        variant = write_repository(tmp_path, {"__init__.py": "from .hidden import RESULT"})
        self.plant(variant / "__init__.py", variant / place)
        with pytest.raises(ImportError, match=r"ModuleNotFoundError: No module named '.*\.hidden'"):
            get_local_kernel(tmp_path)

    def test_directory_of_bytecode_is_no_package(self, tmp_path):
        variant = write_repository(tmp_path, {"__init__.py": "from .__pycache__ import hidden"})
        self.plant(variant / "__init__.py", variant / "__pycache__/hidden.pyc")
        with pytest.raises(ImportError, match=r"No module named '.*__pycache__'"):
            get_local_kernel(tmp_path)

    def test_no_bytecode_is_written(self, repo, monkeypatch):
        monkeypatch.setattr(sys, "dont_write_bytecode", False)
        get_local_kernel(repo)
        assert not list(repo.rglob("*.pyc"))


def test_submodule_that_changed_after_the_check_is_refused(tmp_path):
    files = {"__init__.py": "def get():\n    from . import late\n", "late.py": ""}
    variant = write_repository(tmp_path, files, digest=False)
    kernel = get_local_kernel(tmp_path)
    (variant / "late.py").write_text("x = 1")
    with pytest.raises(ImportError, match=r"late\.py has changed since the kernel was loaded$"):
        kernel.get()
    (variant / "late.py").write_text("")
    kernel.get()


def test_late_submodule_comes_from_the_place_of_the_first_load(tmp_path):
    files = {"__init__.py": "def get():\n    from . import late\n    return late", "late.py": ""}
    first = write_repository(tmp_path / "first", files)
    kernel = get_local_kernel(first)
    assert get_local_kernel(write_repository(tmp_path / "second", files)) is kernel
    assert kernel.get().__file__ == str(first / "late.py")


def test_submodule_that_was_added_after_the_check_is_not_found(tmp_path):
    variant = write_repository(tmp_path, {"__init__.py": ""}, digest=False)
    kernel = get_local_kernel(tmp_path)
    (variant / "late.py").write_text("")
    with pytest.raises(ModuleNotFoundError, match="late"):
        importlib.import_module(f"{kernel.__name__}.late")


BAD = {
    "__init__.py": "from . import good, bad\n",
    "good.py": "import colorsys\n",
    "bad.py": "raise KeyError('oh no')\n",
}


class TestFailures:
    def test_failed_import_leaves_nothing_in_sys_modules(self, tmp_path):
        write_repository(tmp_path, BAD)
        before = {name for name in sys.modules if name != "colorsys"}
        for _ in range(2):
            with pytest.raises(ImportError) as caught:
                get_local_kernel(tmp_path)
            assert {name for name in sys.modules if name != "colorsys"} == before
        assert isinstance(caught.value.__cause__, KeyError)

    def test_message_names_repository_revision_and_variant(self, tmp_path):
        variant = write_repository(tmp_path, BAD)
        with pytest.raises(ImportError) as caught:
            load_variant(variant, Target("cpu"), repository="o/n", name="n", revision="abc")
        assert str(caught.value) == (
            "importing kernel o/n failed (revision abc, variant torch-universal): KeyError: 'oh no'"
        )

    def test_corrected_content_loads_after_a_failure(self, tmp_path):
        write_repository(tmp_path, BAD)
        with pytest.raises(ImportError, match="oh no"):
            get_local_kernel(tmp_path)
        write_repository(tmp_path, {**BAD, "bad.py": ""})
        assert get_local_kernel(tmp_path).good

    def test_same_content_loads_once_the_cause_of_a_failure_is_gone(self, tmp_path):
        files = {"__init__.py": "import json\nfrom . import a\njson.toy_may_load", "a.py": ""}
        write_repository(tmp_path, files)
        with pytest.raises(ImportError, match="toy_may_load"):
            get_local_kernel(tmp_path)
        json.toy_may_load = True
        try:
            assert get_local_kernel(tmp_path).a
        finally:
            del json.toy_may_load

    def test_interrupt_is_not_an_import_error(self, tmp_path):
        files = {"__init__.py": "from . import a\nraise KeyboardInterrupt", "a.py": ""}
        write_repository(tmp_path, files)
        before = set(sys.modules)
        with pytest.raises(KeyboardInterrupt):
            get_local_kernel(tmp_path)
        assert set(sys.modules) == before

    def test_late_submodule_that_fails_leaves_the_kernel_imported(self, tmp_path):
        files = {"__init__.py": "def late():\n    from . import bad", "bad.py": "1 / 0"}
        write_repository(tmp_path, files)
        kernel = get_local_kernel(tmp_path)
        with pytest.raises(ZeroDivisionError):
            kernel.late()
        assert sys.modules[kernel.__name__] is kernel
        assert f"{kernel.__name__}.bad" not in sys.modules


class TestThreads:
    def test_threads_import_a_kernel_once(self, tmp_path):
        files = {
            "__init__.py": (
                "import json, time\njson.toy_imports = getattr(json, 'toy_imports', 0) + 1\n"
                "time.sleep(0.05)\nfrom . import sub\nREADY = True\n"
            ),
            "sub.py": "import time\ntime.sleep(0.02)\n",
        }
        write_repository(tmp_path, files)
        barrier = threading.Barrier(8)

        def load(_):
            barrier.wait()
            kernel = get_local_kernel(tmp_path)
            return kernel, kernel.READY

        try:
            with ThreadPoolExecutor(8) as pool:
                loaded = list(pool.map(load, range(8)))
            assert len(set(loaded)) == 1
            assert json.toy_imports == 1
        finally:
            del json.toy_imports

    def test_kernels_that_load_each_other_do_not_deadlock(self, tmp_path):
        one, two = tmp_path / "one", tmp_path / "two"
        for own, other in ((one, two), (two, one)):
            source = (
                "import time\nfrom kernelgraph.hub.kernels import get_local_kernel\n"
                f"time.sleep(0.05)\nother = get_local_kernel({str(other)!r})\n"
            )
            write_repository(own, {"__init__.py": source})
        with ThreadPoolExecutor(2) as pool:
            futures = [pool.submit(get_local_kernel, path) for path in (one, two)]
            kernels = [future.result(timeout=20) for future in futures]
        assert kernels[0].other is kernels[1]
        assert kernels[1].other is kernels[0]

    def test_all_threads_see_the_failure(self, tmp_path):
        write_repository(tmp_path, {"__init__.py": "import time\ntime.sleep(0.01)\n1 / 0"})
        before = set(sys.modules)

        def load(_):
            with pytest.raises(ImportError, match="ZeroDivisionError"):
                get_local_kernel(tmp_path)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(load, range(4)))
        assert set(sys.modules) == before
