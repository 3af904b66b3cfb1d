"""Repository objects: their arguments, the layers that they load, and trust."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings

import pytest
import torch

from kernelgraph.builds import origin_of
from kernelgraph.builds.wanted import Wanted
from kernelgraph.hub.lockfile import Lock, Locks
from kernelgraph.hub.repositories import (
    FuncRepository,
    KernelRepository,
    LayerRepository,
    LocalFuncRepository,
    LocalLayerRepository,
    LockedLayerRepository,
)
from kernelgraph.selection.devices import Target
from tests.support.toy_repository import layer_files, variant_files, write_repository

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


class TestValues:
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
        assert isinstance(repository, KernelRepository)

    def test_different_repositories_differ(self):
        assert len({*EACH}) == len(EACH)
        assert LayerRepository("a/b", layer_name="L") != LayerRepository("a/b", layer_name="M")
        assert LayerRepository("a/b", layer_name="L") != FuncRepository("a/b", func_name="L")
        one = LayerRepository("a/b", layer_name="L", version=1)
        assert one != LayerRepository("a/b", layer_name="L", version=2)

    @pytest.mark.parametrize("repository", EACH, ids=str)
    def test_repositories_are_immutable(self, repository):
        with pytest.raises(AttributeError):
            repository.layer_name = "other"

    def test_repositories_are_shown_with_source_and_name(self):
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

    def test_relative_path_is_made_absolute_at_once(self, repo, monkeypatch):
        monkeypatch.chdir(repo.parent)
        repository = LocalLayerRepository("repo", layer_name="Add")
        same = LocalLayerRepository(repo, layer_name="Add")
        monkeypatch.chdir("/")
        assert repository == same
        assert hash(repository) == hash(same)
        assert repository != LocalLayerRepository("repo", layer_name="Add")
        layer = pickle.loads(pickle.dumps(repository)).load()
        assert origin_of(layer).repository == "repo"

    def test_tilde_in_a_path_is_the_home_directory(self, repo, monkeypatch):
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
    def test_bad_argument_of_a_hub_repository_is_refused(self, make, arguments, error, message):
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
    def test_bad_name_of_a_layer_or_function_is_refused(self, make, name):
        with pytest.raises(TypeError, match=f"^{name}: expected a str, got NoneType$"):
            make("a/b", **{name: None})
        with pytest.raises(ValueError, match=f"^{name}: expected a name, got an empty str$"):
            make("a/b", **{name: ""})
        with pytest.raises(TypeError, match=name):
            make("a/b")
        with pytest.raises(TypeError, match="positional"):
            make("a/b", "x")

    def test_bad_argument_of_a_local_repository_is_refused(self):
        with pytest.raises(TypeError, match=r"^repo_path: expected a path, got int$"):
            LocalLayerRepository(1, layer_name="L")
        with pytest.raises(TypeError, match=r"^package_name: expected a str, got int$"):
            LocalLayerRepository("x", package_name=1, layer_name="L")

    def test_target_of_another_type_is_refused(self, repo):
        with pytest.raises(TypeError, match=r"^target: expected a Target or None, got str$"):
            LocalLayerRepository(repo, layer_name="Add").load("cpu")


class TestLayers:
    def test_layer_is_loaded_once(self, repo):
        layer = LocalLayerRepository(repo, layer_name="Add").load()
        assert layer()(torch.ones(1)) == 2
        assert layer is LocalLayerRepository(repo, layer_name="Add").load()
        assert origin_of(layer).name == "toy"

    def test_target_chooses_the_variant(self, repo):
        write_repository(repo, layer_files(result=5), variant="torch-cuda")
        repository = LocalLayerRepository(repo, layer_name="Add")
        x = torch.ones(1)
        assert repository.load(Target("cpu"))()(x) == 2
        assert repository.load(Target("cuda", 90))()(x) == 6
        assert repository.load(Target("cpu"))()(x) == 2

    def test_build_for_another_capability_is_refused(self, tmp_path):
        metadata = {"backend": {"type": "cuda", "archs": ["9.0"]}}
        write_repository(tmp_path, variant="torch-cuda", metadata=metadata)
        repository = LocalLayerRepository(tmp_path, layer_name="Add")
        assert repository.load(Target("cuda", 90))
        with pytest.raises(ValueError, match=r"built for 9\.0, and this device is cuda 8\.0$"):
            repository.load(Target("cuda", 80))

    def test_kernel_without_layers_is_an_error(self, functions):
        repository = LocalLayerRepository(functions, layer_name="Add")
        with pytest.raises(ValueError, match=r"functions: the kernel defines no layers$"):
            repository.load()

    def test_missing_layer_is_an_error_that_names_the_others(self, repo):
        repository = LocalLayerRepository(repo, layer_name="Mul")
        with pytest.raises(ValueError, match=r"repo: the kernel has no layer 'Mul'; it has: Add$"):
            repository.load()

    def test_missing_repository_is_an_error(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="nowhere is not a kernel repository"):
            LocalLayerRepository(tmp_path / "nowhere", layer_name="Add").load()

    def test_package_name_chooses_the_package(self, tmp_path):
        files = {f"{p}/{n}": t for p in "ab" for n, t in layer_files(result=ord(p)).items()}
        write_repository(tmp_path, files)
        repository = LocalLayerRepository(tmp_path, package_name="b", layer_name="Add")
        assert repository.load()()(torch.zeros(1)) == ord("b")


class TestFunctions:
    def test_function_is_loaded_as_a_layer(self, functions):
        layer = LocalFuncRepository(functions, func_name="scale").load()
        assert issubclass(layer, torch.nn.Module)
        assert "__init__" not in vars(layer)
        assert layer()(torch.ones(1), 3, shift=1) == 4
        assert layer.__name__ == "scale"
        assert layer.forward.__doc__ == "Scales."
        assert origin_of(layer).repository == str(functions)
        assert layer is LocalFuncRepository(functions, func_name="scale").load()

    def test_function_layer_has_the_functions_signature(self, functions):
        layer = LocalFuncRepository(functions, func_name="scale").load()
        assert str(inspect.signature(layer.forward)) == "(self, x, by=2, *, shift=0)"
        assert str(inspect.signature(layer().forward)) == "(x, by=2, *, shift=0)"

    def test_function_layer_has_the_functions_flags(self, functions):
        layer = LocalFuncRepository(functions, func_name="scale").load()
        assert layer.has_backward is False
        assert not hasattr(layer, "can_torch_compile")

    def test_parameter_named_self_is_kept(self, functions):
        layer = LocalFuncRepository(functions, func_name="first").load()
        assert str(inspect.signature(layer.forward)) == "(_self, x, /, self)"
        assert layer().forward(5, self=6) == 5

    @pytest.mark.parametrize("name", ["missing", "CONSTANT"])
    def test_missing_function_is_an_error_that_names_the_others(self, functions, name):
        repository = LocalFuncRepository(functions, func_name=name)
        message = f"the kernel has no function '{name}'; it has: first, scale$"
        with pytest.raises(ValueError, match=message):
            repository.load()

    def test_builtin_function_is_loaded_as_a_layer(self, tmp_path):
        write_repository(tmp_path, {"__init__.py": "import operator\nf = dict.fromkeys\ng = max"})
        layer = LocalFuncRepository(tmp_path, func_name="g").load()
        assert layer()(1, 2) == 2


class TestHub:
    """Repositories on the Hub, beyond what the tests of `get_kernel` cover."""

    @pytest.fixture
    def commit(self, hub):
        hub.organisation("owner", trusted=True)
        return hub.repository("owner/name").commit(variant_files(), branch="v1")

    def test_layers_and_functions_are_loaded_from_the_hub(self, commit):
        layer = LayerRepository("owner/name", layer_name="Add", version=1).load()
        assert layer()(torch.ones(1)) == 2
        assert list(vars(origin_of(layer)).values()) == [
            "owner/name",
            "toy",
            commit,
            "torch-universal",
        ]
        function = FuncRepository("owner/name", func_name="layers", revision=commit)
        with pytest.raises(ValueError, match=r"owner/name@.*the kernel has no function 'layers'"):
            function.load()

    def test_no_request_is_sent_before_the_load(self, hub):
        repository = LayerRepository("owner/name", layer_name="Add", version=1)
        assert hash(repository) == hash(copy.deepcopy(repository))
        assert hub.asked() == []

    def test_loading_from_main_without_a_bound_warns(self, hub, commit):
        hub.repository("owner/name").branches["main"] = commit
        with pytest.warns(UserWarning, match=r"^owner/name is loaded from its branch main, which"):
            LayerRepository("owner/name", layer_name="Add").load()
        for bound in ({"version": 1}, {"revision": "main"}):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                LayerRepository("owner/name", layer_name="Add", **bound).load()

    @pytest.mark.parametrize("make", [LayerRepository, FuncRepository])
    def test_untrusted_repository_is_refused(self, hub, make):
        hub.organisation("owner", trusted=False)
        hub.repository("owner/name").commit(variant_files(), branch="v1")
        name = {"layer_name" if make is LayerRepository else "func_name": "layers"}
        with pytest.raises(ValueError, match="does not call its owner owner a trusted publisher"):
            make("owner/name", version=1, **name).load()
        with pytest.raises(ValueError, match=r"no layer 'layers'|no function 'layers'"):
            make("owner/name", version=1, trust_remote_code=["owner/name"], **name).load()


class TestLocked:
    @pytest.fixture
    def lockfile(self, hub, tmp_path):
        hub.organisation("owner", trusted=True)
        commit = hub.repository("owner/name").commit(variant_files(), branch="v1")
        path = tmp_path / "kernels.lock"
        path.write_text(Locks((Lock(Wanted("owner/name", version=1), commit),)).to_json())
        return path

    def test_locked_commit_is_loaded(self, hub, lockfile):
        repository = LockedLayerRepository("owner/name", lockfile=lockfile, layer_name="Add")
        hub.repository("owner/name").commit(variant_files(layer_files(result=9)), branch="v1")
        assert repository.load()()(torch.ones(1)) == 2
        assert str(repository) == "owner/name (locked): Add"

    def test_copies_of_a_locked_repository_are_equal(self, lockfile):
        repository = LockedLayerRepository("owner/name", lockfile=lockfile, layer_name="Add")
        for same in (
            pickle.loads(pickle.dumps(repository)),
            copy.copy(repository),
            copy.deepcopy(repository),
        ):
            assert same == repository
            assert hash(same) == hash(repository)
        other = LockedLayerRepository("owner/name", lockfile=lockfile, layer_name="Mul")
        assert repository != other

    def test_lock_file_in_the_working_directory_is_read_at_once(self, lockfile, monkeypatch):
        monkeypatch.chdir(lockfile.parent)
        repository = LockedLayerRepository("owner/name", layer_name="Add")
        monkeypatch.chdir("/")
        assert repository.load()()(torch.ones(1)) == 2

    def test_repository_that_is_not_locked_is_refused(self, lockfile):
        with pytest.raises(
            ValueError, match=r"^owner/other is not in .*kernels\.lock, which locks owner/name ver"
        ):
            LockedLayerRepository("owner/other", lockfile=lockfile, layer_name="Add")

    def test_bad_argument_of_a_locked_repository_is_refused(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(FileNotFoundError, match=r"^there is no kernels\.lock in the working"):
            LockedLayerRepository("owner/name", layer_name="Add")
        with pytest.raises(FileNotFoundError, match=r"^there is no lock file x\.lock: run"):
            LockedLayerRepository("owner/name", lockfile="x.lock", layer_name="Add")
        with pytest.raises(TypeError, match=r"^lockfile: expected a path or None, got int$"):
            LockedLayerRepository("owner/name", lockfile=1, layer_name="Add")
        with pytest.raises(ValueError, match=r"^repo_id: expected owner/name, got 'name'$"):
            LockedLayerRepository("name", layer_name="Add")
