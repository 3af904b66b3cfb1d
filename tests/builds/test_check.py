"""Importing kernels: under names of their own, side by side, once, and only after the checks."""

from __future__ import annotations

import importlib
import json
import py_compile
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from kernelgraph.builds.check import Origin, check_variant
from kernelgraph.builds.hub_layers import origin_of
from kernelgraph.builds.importer import import_checked
from kernelgraph.hub.kernels import get_local_kernel
from kernelgraph.selection.devices import Target
from tests.support.toy_repository import METADATA, layer_files, write_repository


def load_variant(directory, target, **arguments):
    return import_checked(check_variant(directory, target, **arguments))


@pytest.fixture
def repo(tmp_path):
    write_repository(tmp_path / "repo")
    return tmp_path / "repo"


@pytest.fixture(autouse=True)
def no_traces():
    """Each test starts and ends without a toy kernel in the process."""
    yield
    for name in [n for n in sys.modules if n.startswith("kernelgraph_")]:
        del sys.modules[name]


class TestWhere:
    @pytest.mark.parametrize("part", ["", "build", "build/torch-universal"])
    def test_a_repository_its_build_or_one_variant(self, repo, part):
        assert get_local_kernel(repo / part).RESULT == 1

    @pytest.mark.parametrize("part", [".", "build", "build/torch-universal"])
    def test_relative_to_the_working_directory(self, repo, monkeypatch, part):
        monkeypatch.chdir(repo)
        kernel = get_local_kernel(part)
        assert origin_of(kernel.layers.Add).repository == part

    def test_a_variant_under_any_name(self, repo, tmp_path):
        shutil.copytree(repo / "build/torch-universal", tmp_path / "result")
        assert get_local_kernel(tmp_path / "result").RESULT == 1

    def test_a_repository_that_is_itself_a_package(self, repo):
        (repo / "__init__.py").write_text("RESULT = 5")
        assert get_local_kernel(repo).RESULT == 1

    def test_a_variant_with_a_package_called_build(self, tmp_path):
        files = {"__init__.py": "from .build import RESULT", "build/__init__.py": "RESULT = 3"}
        variant = write_repository(tmp_path, files)
        assert get_local_kernel(variant).RESULT == 3

    def test_the_best_variant(self, repo):
        write_repository(repo, layer_files(result=2), variant="torch-cpu")
        write_repository(repo, layer_files(result=3), variant="torch-cuda")
        assert get_local_kernel(repo, backend="cpu").RESULT == 2
        assert get_local_kernel(repo, backend="cuda").RESULT == 3
        assert get_local_kernel(repo, backend="xpu").RESULT == 1

    def test_default_backend(self, repo):
        write_repository(repo, layer_files(result=2), variant="torch-cpu")
        if torch.accelerator.current_accelerator(check_available=True) is None:
            assert get_local_kernel(repo).RESULT == 2

    def test_metal_means_mps(self, repo):
        write_repository(repo, layer_files(result=2), variant="torch-metal")
        assert get_local_kernel(repo, backend="metal").RESULT == 2

    def test_unknown_backend(self, repo):
        with pytest.raises(
            ValueError, match=r'^unknown device type "quantum": there are cpu, cuda'
        ):
            get_local_kernel(repo, backend="quantum")

    @pytest.mark.parametrize("path", ["nowhere", "empty", "file"])
    def test_no_repository(self, tmp_path, path):
        (tmp_path / "empty").mkdir()
        (tmp_path / "file").touch()
        with pytest.raises(
            FileNotFoundError,
            match=r"is not a kernel repository: expected a directory with build/<variant>/ in it",
        ) as caught:
            get_local_kernel(tmp_path / path)
        assert str(tmp_path / path) in str(caught.value)

    def test_no_variant_that_fits(self, tmp_path):
        write_repository(tmp_path, variant="torch-rocm")
        write_repository(tmp_path, variant="torch11-cpu-x86_64-linux")
        write_repository(tmp_path, variant="notes")
        with pytest.raises(FileNotFoundError) as caught:
            get_local_kernel(tmp_path, backend="cpu")
        message = str(caught.value)
        assert message.startswith(f"no build variant of {tmp_path} fits this system (torch ")
        assert "torch-rocm: built for rocm, wanted for cpu" in message
        assert "torch11-cpu-x86_64-linux: built for torch 1.1, this is 2." in message
        assert "notes: not the name of a build variant" in message

    def test_an_empty_build(self, tmp_path):
        (tmp_path / "build").mkdir()
        with pytest.raises(FileNotFoundError, match="its build/ has no variants"):
            get_local_kernel(tmp_path)

    def test_one_variant_has_to_fit_too(self, tmp_path):
        variant = write_repository(tmp_path, variant="torch-rocm")
        with pytest.raises(FileNotFoundError, match="built for rocm, wanted for cpu"):
            get_local_kernel(variant, backend="cpu")


class TestPackages:
    def nested(self, *packages: str) -> dict[str, str | bytes]:
        return {f"{p}/{name}": text for p in packages for name, text in layer_files().items()}

    def test_older_layout(self, tmp_path):
        write_repository(tmp_path, self.nested("toy"))
        kernel = get_local_kernel(tmp_path)
        assert kernel.layers.Add().forward(torch.ones(1)) == 2
        assert kernel.layers.__name__ == f"{kernel.__name__}.layers"

    def test_the_name_in_the_metadata_decides(self, tmp_path):
        files = {**self.nested("other"), "my_toy/__init__.py": "RESULT = 5"}
        write_repository(tmp_path, files, metadata={"name": "my-toy"})
        assert get_local_kernel(tmp_path).RESULT == 5

    def test_the_argument_decides(self, tmp_path):
        files = {"one/__init__.py": "RESULT = 1", "two/__init__.py": "RESULT = 2"}
        write_repository(tmp_path, files)
        assert get_local_kernel(tmp_path, package_name="one").RESULT == 1
        assert get_local_kernel(tmp_path, package_name="two").RESULT == 2

    def test_the_newer_layout_comes_first(self, tmp_path):
        files = {**layer_files(), "toy/__init__.py": "raise Exception('for old clients')"}
        write_repository(tmp_path, files)
        assert get_local_kernel(tmp_path).RESULT == 1
        assert get_local_kernel(tmp_path, package_name="toy").RESULT == 1

    @pytest.mark.parametrize(
        ("files", "package_name", "message"),
        [
            ({"x.py": ""}, None, "in a directory toy/ of it; no package there"),
            (
                {"a/__init__.py": "", "b/__init__.py": ""},
                None,
                "in a directory toy/ of it; the packages there: a, b",
            ),
            (
                {"a/__init__.py": ""},
                "b",
                "in a directory b/ of it; the packages there: a",
            ),
        ],
    )
    def test_no_package(self, tmp_path, files, package_name, message):
        write_repository(tmp_path, files)
        with pytest.raises(
            FileNotFoundError, match=r"expected an __init__.py in it, or "
        ) as caught:
            get_local_kernel(tmp_path, package_name=package_name)
        assert message in str(caught.value)
        assert "variant torch-universal" in str(caught.value)


class TestModules:
    def test_name(self, repo):
        kernel = get_local_kernel(repo)
        prefix, digits = kernel.__name__.rsplit("_", 1)
        assert prefix == "kernelgraph_toy"
        assert len(digits) == 16
        assert origin_of(kernel.layers.Add).revision.startswith(digits)

    def test_odd_names_become_identifiers(self, tmp_path):
        write_repository(tmp_path, metadata={"name": "my-kernel/2.0 é"})
        assert get_local_kernel(tmp_path).__name__.startswith("kernelgraph_my_kernel_2_0___")

    def test_imported_once(self, repo, tmp_path):
        first = get_local_kernel(repo)
        shutil.copytree(repo, tmp_path / "copy")
        assert get_local_kernel(repo) is first
        assert get_local_kernel(tmp_path / "copy") is first

    def test_two_revisions_side_by_side(self, repo):
        old = get_local_kernel(repo)
        write_repository(repo, layer_files(result=10))
        new = get_local_kernel(repo)
        x = torch.ones(1)
        assert old.layers.Add()(x) == 2
        assert new.layers.Add()(x) == 11
        assert origin_of(old.layers.Add).revision != origin_of(new.layers.Add).revision

    @pytest.mark.parametrize("id_", ["_same_1", "json"])
    def test_two_repositories_with_one_id(self, tmp_path, id_):
        for result in (1, 2):
            metadata = {**METADATA, "id": id_}
            write_repository(tmp_path / f"r{result}", layer_files(result=result), metadata=metadata)
        kernels = [get_local_kernel(tmp_path / f"r{result}") for result in (1, 2)]
        assert [kernel.RESULT for kernel in kernels] == [1, 2]
        assert sys.modules["json"] is json
        assert "_same_1" not in sys.modules

    def test_the_metadata_belongs_to_the_content(self, tmp_path):
        for name in ("one", "two"):
            write_repository(tmp_path / name, metadata={"name": name})
        names = {
            name: origin_of(get_local_kernel(tmp_path / name).layers.Add).name
            for name in ("one", "two")
        }
        assert names == {"one": "one", "two": "two"}

    def test_imports_inside_the_package(self, tmp_path):
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

    def test_other_modules_are_imported_as_ever(self, tmp_path):
        write_repository(tmp_path, {"__init__.py": "import json, colorsys"})
        assert get_local_kernel(tmp_path).json is json

    def test_files_beside_the_module(self, tmp_path):
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

    def test_source_can_be_had(self, repo):
        import inspect

        assert "x + 1" in inspect.getsource(get_local_kernel(repo).layers.Add)

    def test_a_missing_submodule(self, tmp_path):
        write_repository(tmp_path, {"__init__.py": "from . import nothing"})
        with pytest.raises(ImportError, match="cannot import name 'nothing'"):
            get_local_kernel(tmp_path)


class TestBytecode:
    def plant(self, source: Path, where: Path) -> None:
        evil = source.with_name("evil_source.txt")
        evil.write_text("RESULT = 666\nclass Add: pass\n")
        where.parent.mkdir(exist_ok=True)
        # Unchecked bytecode is what the import system takes without a look at the source.
        mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
        py_compile.compile(str(evil), cfile=str(where), invalidation_mode=mode, doraise=True)
        evil.unlink()

    def test_in_pycache_is_not_used(self, repo):
        for name in ("__init__", "layers"):
            source = repo / f"build/torch-universal/{name}.py"
            self.plant(source, Path(importlib.util.cache_from_source(str(source))))
        kernel = get_local_kernel(repo)
        assert kernel.RESULT == 1
        assert kernel.layers.Add()(torch.ones(1)) == 2

    @pytest.mark.parametrize(
        "place", ["hidden.pyc", "__pycache__/hidden.py", "hidden/__init__.pyc"]
    )
    def test_without_a_source_is_not_found(self, tmp_path, place):
        variant = write_repository(tmp_path, {"__init__.py": "from .hidden import RESULT"})
        self.plant(variant / "__init__.py", variant / place)
        with pytest.raises(ImportError, match=r"ModuleNotFoundError: No module named '.*\.hidden'"):
            get_local_kernel(tmp_path)

    def test_a_directory_of_bytecode_is_no_package(self, tmp_path):
        variant = write_repository(tmp_path, {"__init__.py": "from .__pycache__ import hidden"})
        self.plant(variant / "__init__.py", variant / "__pycache__/hidden.pyc")
        with pytest.raises(ImportError, match=r"No module named '.*__pycache__'"):
            get_local_kernel(tmp_path)

    def test_none_is_written(self, repo, monkeypatch):
        monkeypatch.setattr(sys, "dont_write_bytecode", False)
        get_local_kernel(repo)
        assert not list(repo.rglob("*.pyc"))


TELLS = {"__init__.py": "import sys\nsys.modules['json'].toy_ran = True\n", "sub.py": ""}


class TestChecks:
    """What is refused before anything of the kernel runs."""

    @pytest.fixture
    def variant(self, tmp_path):
        yield write_repository(tmp_path / "repo", TELLS)
        assert not hasattr(json, "toy_ran")

    def test_a_changed_file(self, variant):
        (variant / "sub.py").write_text("#")
        with pytest.raises(ValueError, match=r"variant torch-universal: .* changed: sub\.py$"):
            get_local_kernel(variant)

    def test_a_file_more(self, variant):
        (variant / "more.py").touch()
        with pytest.raises(ValueError, match=r"not listed: more\.py$"):
            get_local_kernel(variant)

    def test_a_file_less(self, variant):
        (variant / "sub.py").unlink()
        with pytest.raises(ValueError, match=r"missing: sub\.py$"):
            get_local_kernel(variant)

    def test_metadata(self, variant):
        (variant / "metadata.json").write_text("{")
        with pytest.raises(ValueError, match=r"metadata\.json: expected a JSON object"):
            get_local_kernel(variant)

    def test_a_link_out(self, variant, tmp_path):
        (tmp_path / "x.py").touch()
        (variant / "x.py").symlink_to(tmp_path / "x.py")
        with pytest.raises(ValueError, match=r"x\.py is a link that leads out of it$"):
            get_local_kernel(variant)

    def test_archs(self, tmp_path):
        metadata = {"backend": {"type": "cuda", "archs": ["8.0", "9.0a"]}}
        variant = write_repository(tmp_path, TELLS, variant="torch-cuda", metadata=metadata)
        with pytest.raises(ValueError) as caught:  # noqa: PT011 (the whole message is compared)
            load_variant(variant, Target("cuda", 100), repository="o/n", name="n")
        assert str(caught.value) == (
            "kernel o/n, variant torch-cuda: built for 8.0, 9.0a, and this device is cuda 10.0"
        )


def test_a_submodule_that_changed_since(tmp_path):
    files = {"__init__.py": "def get():\n    from . import late\n", "late.py": ""}
    variant = write_repository(tmp_path, files, digest=False)
    kernel = get_local_kernel(tmp_path)
    (variant / "late.py").write_text("x = 1")
    with pytest.raises(ImportError, match=r"late\.py has changed since the kernel was loaded$"):
        kernel.get()
    (variant / "late.py").write_text("")
    kernel.get()


def test_a_late_submodule_after_the_same_content_was_loaded_from_elsewhere(tmp_path):
    files = {"__init__.py": "def get():\n    from . import late\n    return late", "late.py": ""}
    first = write_repository(tmp_path / "first", files)
    kernel = get_local_kernel(first)
    assert get_local_kernel(write_repository(tmp_path / "second", files)) is kernel
    assert kernel.get().__file__ == str(first / "late.py")


def test_a_submodule_that_was_added_since(tmp_path):
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
    def test_nothing_is_left(self, tmp_path):
        write_repository(tmp_path, BAD)
        before = {name for name in sys.modules if name != "colorsys"}
        for _ in range(2):
            with pytest.raises(ImportError) as caught:
                get_local_kernel(tmp_path)
            assert {name for name in sys.modules if name != "colorsys"} == before
        assert isinstance(caught.value.__cause__, KeyError)

    def test_message(self, tmp_path):
        variant = write_repository(tmp_path, BAD)
        with pytest.raises(ImportError) as caught:
            load_variant(variant, Target("cpu"), repository="o/n", name="n", revision="abc")
        assert str(caught.value) == (
            "importing kernel o/n failed (revision abc, variant torch-universal): KeyError: 'oh no'"
        )

    def test_corrected_content_loads(self, tmp_path):
        write_repository(tmp_path, BAD)
        with pytest.raises(ImportError, match="oh no"):
            get_local_kernel(tmp_path)
        write_repository(tmp_path, {**BAD, "bad.py": ""})
        assert get_local_kernel(tmp_path).good

    def test_a_failure_that_passes(self, tmp_path):
        files = {"__init__.py": "import json\nfrom . import a\njson.toy_may_load", "a.py": ""}
        write_repository(tmp_path, files)
        with pytest.raises(ImportError, match="toy_may_load"):
            get_local_kernel(tmp_path)
        json.toy_may_load = True
        try:
            assert get_local_kernel(tmp_path).a
        finally:
            del json.toy_may_load

    def test_an_interrupt_is_not_an_import_error(self, tmp_path):
        files = {"__init__.py": "from . import a\nraise KeyboardInterrupt", "a.py": ""}
        write_repository(tmp_path, files)
        before = set(sys.modules)
        with pytest.raises(KeyboardInterrupt):
            get_local_kernel(tmp_path)
        assert set(sys.modules) == before

    def test_a_failing_submodule_later_leaves_the_kernel(self, tmp_path):
        files = {"__init__.py": "def late():\n    from . import bad", "bad.py": "1 / 0"}
        write_repository(tmp_path, files)
        kernel = get_local_kernel(tmp_path)
        with pytest.raises(ZeroDivisionError):
            kernel.late()
        assert sys.modules[kernel.__name__] is kernel
        assert f"{kernel.__name__}.bad" not in sys.modules


class TestThreads:
    def test_imported_once(self, tmp_path):
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

    def test_kernels_that_load_each_other(self, tmp_path):
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

    def test_all_see_the_failure(self, tmp_path):
        write_repository(tmp_path, {"__init__.py": "import time\ntime.sleep(0.01)\n1 / 0"})
        before = set(sys.modules)

        def load(_):
            with pytest.raises(ImportError, match="ZeroDivisionError"):
                get_local_kernel(tmp_path)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(load, range(4)))
        assert set(sys.modules) == before


class TestOrigin:
    def test_of_a_kernel(self, repo):
        kernel = get_local_kernel(repo)
        origin = origin_of(kernel.layers.Add)
        assert (origin.repository, origin.name) == (str(repo), "toy")
        assert origin.variant == "torch-universal"
        assert len(origin.revision) == 64

    @pytest.mark.parametrize("part", ["", "build", "build/torch-universal"])
    def test_name_without_metadata(self, tmp_path, part):
        write_repository(tmp_path / "my-kernel", metadata=None)
        kernel = get_local_kernel(tmp_path / "my-kernel" / part)
        assert origin_of(kernel.layers.Add).name == "my-kernel"

    def test_a_commit_is_the_revision(self, repo):
        kernel = load_variant(
            repo / "build/torch-universal",
            Target("cpu"),
            repository="owner/name",
            name="name",
            revision="0" * 40,
        )
        assert origin_of(kernel.layers.Add) == Origin(
            "owner/name", "toy", "0" * 40, "torch-universal"
        )

    def test_of_the_same_content_from_elsewhere_is_the_later(self, repo):
        directory = repo / "build/torch-universal"
        for commit in ("1" * 40, "2" * 40):
            kernel = load_variant(
                directory, Target("cpu"), repository="o/n", name="n", revision=commit
            )
            assert origin_of(kernel.layers.Add).revision == commit

    def test_of_any_other_class(self):
        origin = origin_of(nn.ReLU)
        assert (origin.repository, origin.name, origin.variant) == ("torch", "torch", "")
        assert len(origin.revision) == 64

    def test_other_code_is_another_revision(self):
        def make(source: str) -> type[nn.Module]:
            scope: dict = {"nn": nn}
            exec(f"class A(nn.Module):\n    def forward(self, x, y=1):\n        {source}", scope)
            return scope["A"]

        sources = [
            "return x",
            "return x + 1",
            "return x + 1.0",
            "return x.sin()",
            "return x.cos()",
            "return (lambda z: z + 1)(x)",
            "return (lambda z: z + 2)(x)",
            "return x[1:2]",
            "return x[1:3]",
            "return x in {'a', 'b'}",
            "return x in {'a', 'c'}",
        ]
        revisions = [origin_of(make(source)).revision for source in sources]
        assert len(set(revisions)) == len(sources)
        assert revisions == [origin_of(make(source)).revision for source in sources]

    def test_what_the_code_closes_over_counts(self):
        def make(scale: object, default: int = 0) -> type[nn.Module]:
            class A(nn.Module):
                def forward(self, x, y=default):
                    super().__init__()
                    return x * scale + y

            return A

        def helper(n):
            return lambda: n

        variants = [
            (1,),
            (2,),
            (1.0,),
            (1, 1),
            ((1, 2),),
            (helper(1),),
            (helper(2),),
            ([],),
            (int,),
            (torch.float16,),
            (torch.bfloat16,),
            (len,),
            (abs,),
            (torch.relu,),
            (torch.ops.aten.relu,),
            (torch.ops.aten.relu.default,),
            (torch.ops.aten.tanh.default,),
        ]
        revisions = [origin_of(make(*arguments)).revision for arguments in variants]
        assert len(set(revisions)) == len(variants)

    def test_a_closure_that_counts_keeps_its_revision(self):
        calls = 0

        class A(nn.Module):
            def forward(self, x):
                nonlocal calls
                calls += 1
                return x

        before = origin_of(A)
        A()(1)
        assert origin_of(A) == before

    def test_a_function_that_closes_over_itself(self):
        def make():
            def forward(self, x):
                return x if x > 3 else forward(self, x + 1)

            return type("A", (nn.Module,), {"forward": forward})

        assert origin_of(make()).revision == origin_of(make()).revision

    def test_the_same_in_each_process(self):
        code = (
            "class A:\n"
            "    def forward(self, x, *, k=('a', None)):\n"
            "        return [y for y in x if y in {'a', 'b', 'c', 'd', 'e'}], lambda: len\n"
            "from kernelgraph.builds.hub_layers import origin_of\n"
            "print(origin_of(A).revision)\n"
        )
        runs = [
            subprocess.run(
                [sys.executable, "-c", code],
                env={"PYTHONHASHSEED": seed},
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for seed in ("1", "2")
        ]
        assert runs[0] == runs[1]
        assert len(runs[0].strip()) == 64
