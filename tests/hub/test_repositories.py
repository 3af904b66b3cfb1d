"""Repository objects: their arguments, what they load, and who is trusted."""

from __future__ import annotations

import copy
import inspect
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from kernelgraph.devices import Target
from kernelgraph.hub.loading import origin_of
from kernelgraph.hub.repositories import (
    FuncRepository,
    LayerRepository,
    LocalFuncRepository,
    LocalLayerRepository,
    Repository,
)
from tests.hub.toy_repository import layer_files, write_repository

FUNCTIONS = """
import math
CONSTANT = 3
def scale(x, by=2, *, shift=0):
    "Scales."
    return x * by + shift
scale.has_backward = False
def first(x, /, self):
    return x
def _hidden(x): return x
"""


@pytest.fixture
def repo(tmp_path):
    write_repository(tmp_path / "repo")
    return tmp_path / "repo"


@pytest.fixture
def functions(tmp_path):
    write_repository(tmp_path / "functions", {"__init__.py": FUNCTIONS})
    return tmp_path / "functions"


EACH = [
    LocalLayerRepository("some/where", layer_name="L"),
    LocalFuncRepository("some/where", package_name="p", func_name="f"),
    LayerRepository(
        "owner/name", layer_name="L", version=">=0.1", trust_remote_code=["owner/name"]
    ),
    FuncRepository("owner/name", func_name="f", revision="main", trust_remote_code=True),
]


class TestAsValues:
    @pytest.mark.parametrize("repository", EACH, ids=str)
    def test_copies_are_equal(self, repository):
        for same in (
            pickle.loads(pickle.dumps(repository)),
            copy.copy(repository),
            copy.deepcopy(repository),
        ):
            assert same == repository
            assert hash(same) == hash(repository)
            assert repr(same) == repr(repository)
            assert str(same) == str(repository)
        assert isinstance(repository, Repository)

    def test_different_ones_differ(self):
        assert len({*EACH}) == len(EACH)
        assert LayerRepository("a/b", layer_name="L") != LayerRepository("a/b", layer_name="M")
        assert LayerRepository("a/b", layer_name="L") != FuncRepository("a/b", func_name="L")
        one = LayerRepository("a/b", layer_name="L", version=1)
        assert one != LayerRepository("a/b", layer_name="L", version=2)

    @pytest.mark.parametrize("repository", EACH, ids=str)
    def test_frozen(self, repository):
        with pytest.raises(AttributeError):
            repository.layer_name = "other"

    def test_shown(self):
        assert [str(repository) for repository in EACH] == [
            "some/where: L",
            "some/where: f",
            "owner/name version >=0.1: L",
            "owner/name@main: f",
        ]
        assert str(LayerRepository("owner/name", layer_name="RMSNorm")) == "owner/name: RMSNorm"
        assert repr(LocalLayerRepository("x", layer_name="L")) == (
            "LocalLayerRepository(repo_path='x', package_name=None, layer_name='L')"
        )

    def test_a_relative_path_is_where_it_was(self, repo, monkeypatch):
        monkeypatch.chdir(repo.parent)
        repository = LocalLayerRepository("repo", layer_name="Add")
        same = LocalLayerRepository(repo, layer_name="Add")
        monkeypatch.chdir("/")
        assert repository == same
        assert hash(repository) == hash(same)
        assert repository != LocalLayerRepository("repo", layer_name="Add")
        layer = pickle.loads(pickle.dumps(repository)).load()
        assert origin_of(layer).repository == "repo"

    def test_home(self, repo, monkeypatch):
        monkeypatch.setenv("HOME", str(repo.parent))
        assert LocalLayerRepository("~/repo", layer_name="Add").load()


class TestArguments:
    @pytest.mark.parametrize("make", [LayerRepository, FuncRepository])
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"repo_id": 1}, TypeError, "^repo_id: expected a str, got int$"),
            ({"repo_id": ""}, ValueError, "^repo_id: expected a name, got an empty str$"),
            ({"repo_id": "name"}, ValueError, "^repo_id: expected owner/name, got 'name'$"),
            ({"repo_id": "a/b/c"}, ValueError, "^repo_id: expected owner/name, got 'a/b/c'$"),
            ({"repo_id": "../x"}, ValueError, "^repo_id: expected owner/name, got '../x'$"),
            ({"repo_id": "a/b\n"}, ValueError, "^repo_id: expected owner/name"),
            ({"revision": 1}, TypeError, "^revision: expected a str, got int$"),
            ({"revision": ""}, ValueError, "^revision: expected a name, got an empty str$"),
            ({"version": True}, TypeError, "^version: expected an int or a version specifier"),
            ({"version": -1}, ValueError, "^version: expected 0 or more, got -1$"),
            ({"version": "1"}, ValueError, "^version: expected an int or a version specifier"),
            (
                {"version": 1, "revision": "main"},
                ValueError,
                "^owner/name: pass revision or version, not both$",
            ),
            (
                {"trust_remote_code": "owner/name"},
                TypeError,
                "^trust_remote_code: expected a bool or a list of repository ids, got 'owner/name'",
            ),
            ({"trust_remote_code": None}, TypeError, "^trust_remote_code: expected a bool or"),
            (
                {"trust_remote_code": ["owner"]},
                ValueError,
                "^trust_remote_code: expected owner/name, got 'owner'$",
            ),
        ],
    )
    def test_hub(self, make, arguments, error, message):
        name = {"layer_name" if make is LayerRepository else "func_name": "x"}
        with pytest.raises(error, match=message):
            make(**{"repo_id": "owner/name", **name, **arguments})

    @pytest.mark.parametrize(
        ("make", "name"),
        [
            (LayerRepository, "layer_name"),
            (LocalLayerRepository, "layer_name"),
            (FuncRepository, "func_name"),
            (LocalFuncRepository, "func_name"),
        ],
    )
    def test_names(self, make, name):
        with pytest.raises(TypeError, match=f"^{name}: expected a str, got NoneType$"):
            make("a/b", **{name: None})
        with pytest.raises(ValueError, match=f"^{name}: expected a name, got an empty str$"):
            make("a/b", **{name: ""})
        with pytest.raises(TypeError, match=name):
            make("a/b")
        with pytest.raises(TypeError, match="positional"):
            make("a/b", "x")

    def test_local(self):
        with pytest.raises(TypeError, match=r"^repo_path: expected a path, got int$"):
            LocalLayerRepository(1, layer_name="L")
        with pytest.raises(TypeError, match=r"^package_name: expected a str, got int$"):
            LocalLayerRepository("x", package_name=1, layer_name="L")

    def test_target(self, repo):
        with pytest.raises(TypeError, match=r"^target: expected a Target or None, got str$"):
            LocalLayerRepository(repo, layer_name="Add").load("cpu")


class TestLayers:
    def test_load(self, repo):
        layer = LocalLayerRepository(repo, layer_name="Add").load()
        assert layer()(torch.ones(1)) == 2
        assert layer is LocalLayerRepository(repo, layer_name="Add").load()
        assert origin_of(layer).name == "toy"

    def test_the_target_decides(self, repo):
        write_repository(repo, layer_files(result=5), variant="torch-cuda")
        repository = LocalLayerRepository(repo, layer_name="Add")
        x = torch.ones(1)
        assert repository.load(Target("cpu"))()(x) == 2
        assert repository.load(Target("cuda", 90))()(x) == 6
        assert repository.load(Target("cpu"))()(x) == 2

    def test_the_capability_decides(self, tmp_path):
        metadata = {"backend": {"type": "cuda", "archs": ["9.0"]}}
        write_repository(tmp_path, variant="torch-cuda", metadata=metadata)
        repository = LocalLayerRepository(tmp_path, layer_name="Add")
        assert repository.load(Target("cuda", 90))
        with pytest.raises(ValueError, match=r"built for 9\.0, and this device is cuda 8\.0$"):
            repository.load(Target("cuda", 80))

    def test_no_layers(self, functions):
        repository = LocalLayerRepository(functions, layer_name="Add")
        with pytest.raises(ValueError, match=r"functions: the kernel defines no layers$"):
            repository.load()

    def test_no_such_layer(self, repo):
        repository = LocalLayerRepository(repo, layer_name="Mul")
        with pytest.raises(ValueError, match=r"repo: the kernel has no layer 'Mul'; it has: Add$"):
            repository.load()

    def test_no_such_repository(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="nowhere is not a kernel repository"):
            LocalLayerRepository(tmp_path / "nowhere", layer_name="Add").load()

    def test_package_name(self, tmp_path):
        files = {f"{p}/{n}": t for p in "ab" for n, t in layer_files(result=ord(p)).items()}
        write_repository(tmp_path, files)
        repository = LocalLayerRepository(tmp_path, package_name="b", layer_name="Add")
        assert repository.load()()(torch.zeros(1)) == ord("b")


class TestFunctions:
    def test_load(self, functions):
        layer = LocalFuncRepository(functions, func_name="scale").load()
        assert issubclass(layer, torch.nn.Module)
        assert "__init__" not in vars(layer)
        assert layer()(torch.ones(1), 3, shift=1) == 4
        assert layer.__name__ == "scale"
        assert layer.forward.__doc__ == "Scales."
        assert origin_of(layer).repository == str(functions)
        assert layer is LocalFuncRepository(functions, func_name="scale").load()

    def test_signature(self, functions):
        layer = LocalFuncRepository(functions, func_name="scale").load()
        assert str(inspect.signature(layer.forward)) == "(self, x, by=2, *, shift=0)"
        assert str(inspect.signature(layer().forward)) == "(x, by=2, *, shift=0)"

    def test_flags(self, functions):
        layer = LocalFuncRepository(functions, func_name="scale").load()
        assert layer.has_backward is False
        assert not hasattr(layer, "can_torch_compile")

    def test_odd_parameters(self, functions):
        layer = LocalFuncRepository(functions, func_name="first").load()
        assert str(inspect.signature(layer.forward)) == "(_self, x, /, self)"
        assert layer().forward(5, self=6) == 5

    @pytest.mark.parametrize("name", ["missing", "CONSTANT"])
    def test_no_such_function(self, functions, name):
        repository = LocalFuncRepository(functions, func_name=name)
        message = f"the kernel has no function '{name}'; it has: first, scale$"
        with pytest.raises(ValueError, match=message):
            repository.load()

    def test_builtin(self, tmp_path):
        write_repository(tmp_path, {"__init__.py": "import operator\nf = dict.fromkeys\ng = max"})
        layer = LocalFuncRepository(tmp_path, func_name="g").load()
        assert layer()(1, 2) == 2


class TestTrust:
    @pytest.mark.parametrize("trust", [False, [], ["owner/other"]])
    @pytest.mark.parametrize("make", [LayerRepository, FuncRepository])
    def test_refusal_before_anything_is_asked(self, monkeypatch, make, trust):
        monkeypatch.setattr("kernelgraph.hub.repositories.fetch", None)
        name = {"layer_name" if make is LayerRepository else "func_name": "x"}
        repository = make("owner/name", version=1, trust_remote_code=trust, **name)
        with pytest.raises(
            ValueError, match=r"^owner/name: loading a kernel runs its repository's"
        ):
            repository.load(Target("cpu"))

    def test_the_three_ways_out(self):
        with pytest.raises(ValueError, match="trust") as caught:
            LayerRepository("owner/name", layer_name="L", version=1).load()
        message = str(caught.value)
        assert "pass trust_remote_code=True" in message
        assert 'trust_remote_code=["owner/name"]' in message
        assert "LocalLayerRepository" in message


COMMIT = "0123456789" * 4

# One process for many loads, because huggingface_hub reads its settings when it is imported.
SCRIPT = """
import os, sys, warnings
from kernelgraph.devices import Target
from kernelgraph.hub.loading import origin_of
from kernelgraph.hub.repositories import LayerRepository
warnings.simplefilter("ignore")
for cache, arguments in eval(sys.argv[1]):
    os.environ["KERNELS_CACHE"] = cache
    repository = LayerRepository(
        "owner/name", layer_name="Add", trust_remote_code=True, **arguments
    )
    try:
        layer = repository.load(Target("cpu"))
    except Exception as error:
        print(type(error).__name__, str(error).splitlines()[0])
    else:
        print(layer()(1), *vars(origin_of(layer)).values())
"""


def loaded_in_a_process(*loads: tuple[str, dict[str, object]], **environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, repr(loads)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def write_cache(cache: Path, repo_type: str) -> str:
    """What is left of an earlier download: a snapshot, the refs to it and its list of files."""
    from huggingface_hub._tree_cache import TreeCacheEntry, write_tree_cache

    storage = cache / f"{repo_type}s--owner--name"
    root = storage / "snapshots" / COMMIT
    write_repository(root, metadata={"name": repo_type})
    for ref in ("main", "v1"):
        (storage / "refs").mkdir(exist_ok=True)
        (storage / "refs" / ref).write_text(COMMIT)
    files = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
    entry = TreeCacheEntry(size=1, blob_id="0", lfs_sha256=None, lfs_size=None, xet_hash=None)
    write_tree_cache(str(storage), COMMIT, dict.fromkeys(files, entry))
    return str(cache)


class TestHub:
    UNREACHABLE = "OSError owner/name: could not be had from the Hub: "

    def test_unreachable(self, tmp_path):
        cache = str(tmp_path)
        loads = [(cache, {}), (cache, {"version": 1}), (cache, {"version": ">=1"})]
        said = loaded_in_a_process(*loads, HF_ENDPOINT="http://127.0.0.1:9")
        assert [line[: len(self.UNREACHABLE)] for line in said] == [self.UNREACHABLE] * 3

    def test_offline(self, tmp_path):
        kernel = write_cache(tmp_path / "1", "kernel")
        model = write_cache(tmp_path / "2", "model")
        nothing = str(tmp_path / "3")
        loads = [
            (kernel, {}),
            (kernel, {"version": 1}),
            (kernel, {"revision": COMMIT}),
            (model, {"version": 1}),
            (model, {"revision": COMMIT}),
            (kernel, {"version": 2}),
            (nothing, {}),
        ]
        *found, no_version, no_cache = loaded_in_a_process(*loads, HF_HUB_OFFLINE="1")
        from_kernel = f"2 owner/name kernel {COMMIT} torch-universal"
        from_model = f"2 owner/name model {COMMIT} torch-universal"
        assert found == [from_kernel] * 3 + [from_model] * 2
        assert no_version.startswith(self.UNREACHABLE)
        assert no_cache.startswith(self.UNREACHABLE)

    def test_main_without_a_bound_is_warned_of(self, monkeypatch):
        def fetch(*args, **kwargs):
            raise OSError("not now")

        monkeypatch.setattr("kernelgraph.hub.repositories.fetch", fetch)
        repository = LayerRepository("owner/name", layer_name="L", trust_remote_code=True)
        with (
            pytest.warns(UserWarning, match=r"^owner/name is loaded from its branch main, which"),
            pytest.raises(OSError, match="not now"),
        ):
            repository.load()
        for bound in ({"version": 1}, {"revision": "main"}):
            bounded = LayerRepository("o/n", layer_name="L", trust_remote_code=["o/n"], **bound)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                with pytest.raises(OSError, match="not now"):
                    bounded.load()
