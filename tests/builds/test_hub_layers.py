"""Hub layers of other packages, and the origin of any layer."""

from __future__ import annotations

import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import kernelgraph
from kernelgraph.builds.check import Origin
from kernelgraph.builds.hub_layers import foreign_origin, load_foreign, origin_of
from kernelgraph.fingerprint import code_hash
from kernelgraph.hub.kernels import get_local_kernel
from kernelgraph.selection.devices import Target
from tests.support.load_variant import load_variant
from tests.support.other_package import write_kernel
from tests.support.toy_repository import layer_files, write_repository
from tests.support.toys import Plus10


class TestOrigin:
    def test_origin_of_a_kernel_has_repository_name_variant_and_content_hash(self, repo):
        kernel = get_local_kernel(repo)
        origin = origin_of(kernel.layers.Add)
        assert (origin.repository, origin.name) == (str(repo), "toy")
        assert origin.variant == "torch-universal"
        assert len(origin.revision) == 64

    @pytest.mark.parametrize("part", ["", "build", "build/torch-universal"])
    def test_name_without_metadata_is_that_of_the_repository(self, tmp_path, part):
        write_repository(tmp_path / "my-kernel", metadata=None)
        kernel = get_local_kernel(tmp_path / "my-kernel" / part)
        assert origin_of(kernel.layers.Add).name == "my-kernel"

    def test_revision_is_the_commit_where_one_is_given(self, repo):
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

    def test_origin_of_content_that_was_loaded_twice_is_the_later_one(self, repo):
        directory = repo / "build/torch-universal"
        for commit in ("1" * 40, "2" * 40):
            kernel = load_variant(
                directory, Target("cpu"), repository="o/n", name="n", revision=commit
            )
            assert origin_of(kernel.layers.Add).revision == commit

    def test_origin_of_any_other_class_is_its_top_level_module(self):
        origin = origin_of(nn.ReLU)
        assert (origin.repository, origin.name, origin.variant) == ("torch", "torch", "")
        assert len(origin.revision) == 64

    def test_revision_of_other_code_is_another_one(self):
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

    def test_revision_depends_on_closure_and_defaults(self):
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

    def test_revision_stays_where_the_closure_counts_calls(self):
        calls = 0

        class A(nn.Module):
            def forward(self, x):
                nonlocal calls
                calls += 1
                return x

        before = origin_of(A)
        A()(1)
        assert origin_of(A) == before

    def test_revision_of_a_function_that_closes_over_itself_is_found(self):
        def make():
            def forward(self, x):
                return x if x > 3 else forward(self, x + 1)

            return type("A", (nn.Module,), {"forward": forward})

        assert origin_of(make()).revision == origin_of(make()).revision

    def test_revision_is_the_same_in_each_process(self):
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


class TestKernelsPackage:
    """Layers and functions that the ``kernels`` package, or the stand-in for it, has loaded."""

    def test_layer_has_the_origin_that_our_own_repository_gives_it(
        self, theirs: Any, tmp_path: Path
    ) -> None:
        path = write_kernel(tmp_path / "kernel", result=30)
        layer = load_foreign(theirs.LocalLayerRepository(path, layer_name="Add"))
        assert layer()(1) == 31
        assert not layer.__module__.startswith("kernelgraph")
        # An equal origin, and so the same names of ops, as our own repository gives it.
        ours = kernelgraph.LocalLayerRepository(path, layer_name="Add").load()
        assert origin_of(layer) == origin_of(ours)
        assert origin_of(layer).repository == str(path)

    def test_other_content_is_another_revision(self, theirs: Any, tmp_path: Path) -> None:
        # The number is in another file: the code of the forward is the same.
        source = str(layer_files()["layers.py"])
        source = source.replace("return x + 1", "from . import RESULT; return x + RESULT")
        revisions = set()
        for number in (1, 2):
            path = write_kernel(tmp_path / str(number), number, source)
            layer = theirs.LocalLayerRepository(path, layer_name="Add").load()
            assert layer()(1) == 1 + number
            revisions.add(origin_of(layer).revision)
        assert len(revisions) == 2

    def test_two_kernels_of_one_id_have_their_own_origins(
        self, stand_in: Any, tmp_path: Path
    ) -> None:
        """The kernel that is imported last takes the module name of the one before."""
        repositories = []
        for number in (1, 2):
            path = write_kernel(tmp_path / str(number), number)
            metadata = path / "build" / "torch-universal" / "metadata.json"
            metadata.write_text(re.sub(r"_toy_foreign_\d+", "_toy_one_id", metadata.read_text()))
            repositories.append(stand_in.LocalLayerRepository(path, "Add"))
        for layer in [repository.load() for repository in repositories]:
            origin = origin_of(layer)
            assert origin.repository == str(tmp_path / str(layer()(0)))

    @pytest.mark.parametrize(("name", "expected"), [("shifted", 17), ("plain", -3), ("relu", 7)])
    def test_function_is_one_class_of_its_name(
        self, theirs: Any, name: str, expected: int, tmp_path: Path
    ) -> None:
        path = write_kernel(tmp_path / "kernel", result=10)
        loads = [load_foreign(theirs.LocalFuncRepository(path, func_name=name)) for _ in range(2)]
        assert loads[0] is loads[1]
        layer = loads[0]
        assert layer.__name__ == name
        assert layer()(torch.tensor(7)).item() == expected
        assert getattr(layer, "can_torch_compile", False) is (name == "shifted")
        ours = kernelgraph.LocalFuncRepository(path, func_name=name).load()
        # An op is the same object in all kernels that have it, so any of them may be named.
        assert origin_of(layer) == origin_of(ours) or name == "relu"
        assert origin_of(layer).name == "toy"

    def test_another_librarys_function_in_a_kernel_has_the_kernels_origin(
        self, theirs: Any, tmp_path: Path
    ) -> None:
        path = write_kernel(tmp_path / "kernel")
        layer = load_foreign(theirs.LocalFuncRepository(path, func_name="mean"))
        assert layer()([1, 3]) == 2
        assert origin_of(layer).name == "toy"

    @pytest.mark.parametrize("kind", ["kernels", "models"])
    def test_revision_of_a_kernel_in_a_cache_of_the_hub_is_the_commit(
        self, kind: str, stand_in: Any, tmp_path: Path
    ) -> None:
        commit = "0123456789abcdef0123456789abcdef01234567"
        path = write_kernel(tmp_path / f"{kind}--some-org--a-kernel" / "snapshots" / commit)
        origin = foreign_origin(stand_in.LocalLayerRepository(path, "Add").load())
        assert origin is not None
        assert (origin.repository, origin.revision) == ("some-org/a-kernel", commit)
        assert (origin.name, origin.variant) == ("toy", "torch-universal")

    def test_origin_of_a_kernel_in_the_older_layout_is_found(
        self, stand_in: Any, tmp_path: Path
    ) -> None:
        files = {f"toy/{name}": content for name, content in layer_files().items()}
        write_repository(tmp_path, files, variant="torch-cpu", metadata={"id": "_toy_older"})
        layer = stand_in.LocalLayerRepository(tmp_path, "Add").load()
        assert layer.__module__ == "_toy_older.layers"
        origin = foreign_origin(layer)
        assert origin is not None
        assert (origin.name, origin.variant) == (tmp_path.name, "torch-cpu")

    def test_class_in_no_kernel_has_no_such_origin(self, tmp_path: Path) -> None:
        assert foreign_origin(Plus10) is None
        # A directory with the name of a variant that is none, such as an environment.
        file = tmp_path / "torch-cpu" / "lib" / "package" / "layers.py"
        file.parent.mkdir(parents=True)
        namespace: dict[str, Any] = {}
        exec(compile(layer_files()["layers.py"], str(file), "exec"), namespace)
        assert foreign_origin(namespace["Add"]) is None

    def test_origin_of_a_layer_with_a_decorated_forward_is_found(
        self, theirs: Any, tmp_path: Path
    ) -> None:
        source = str(layer_files()["layers.py"])
        source = source.replace("    def forward", "    @torch.no_grad()\n    def forward")
        path = write_kernel(tmp_path / "kernel", layers=source)
        layer = theirs.LocalLayerRepository(path, layer_name="Add").load()
        assert layer()(1) == 2
        assert origin_of(layer).repository == str(path)

    @pytest.mark.parametrize("package", [types.ModuleType("kernels"), None])
    def test_layer_of_a_package_that_does_not_list_its_kernels_has_an_unknown_origin(
        self, package: Any, stand_in: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """Its repository is the module, and its revision the hash of its code."""
        monkeypatch.setitem(sys.modules, "kernels", package)
        layer = load_foreign(stand_in.LocalLayerRepository(write_kernel(tmp_path), "Add"))
        assert layer()(1) == 2
        assert foreign_origin(layer) is None
        module = layer.__module__.partition(".")[0]
        assert origin_of(layer) == Origin(module, module, code_hash(layer.forward), "")
