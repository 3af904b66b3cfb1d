"""Loading kernels as modules: which build is loaded, and kernels that use other kernels."""

from __future__ import annotations

import json
import sys
import warnings

import pytest

from kernelgraph import get_kernel, get_kernel_dep, get_local_kernel, get_locked_kernel, has_kernel
from kernelgraph.builds.importer import module_origin
from kernelgraph.builds.wanted import Wanted
from kernelgraph.hub.client import Hub
from kernelgraph.hub.kernels import load_from_hub
from kernelgraph.hub.lockfile import lock
from kernelgraph.selection.devices import Target
from tests.support.toy_repository import METADATA, layer_files, variant_files, write_repository


@pytest.fixture(autouse=True)
def org(hub):
    """Makes the owner of all repositories in these tests a trusted publisher."""
    hub.organisation("org", trusted=True)


@pytest.fixture
def toy(hub):
    repository = hub.repository("org/toy")
    repository.commit(variant_files(), branch="v1", tag="v0.1.0")
    return repository


class TestGet:
    def test_kernel_is_found_by_version_bound_branch_and_commit(self, toy):
        commit = toy.branches["v1"]
        toy.branches["main"] = commit
        ways = ({"version": 1}, {"version": ">=0.1"}, {"revision": "main"}, {"revision": commit})
        for wanted in ways:
            kernel = get_kernel("org/toy", **wanted)
            assert kernel.RESULT == 1
            assert module_origin(kernel.__name__).revision == commit

    def test_loading_from_main_warns(self, toy):
        toy.branches["main"] = toy.branches["v1"]
        with pytest.warns(UserWarning, match="org/toy is loaded from its branch main") as warned:
            get_kernel("org/toy")
        assert warned[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            get_kernel("org/toy", revision="main")

    def test_two_revisions_are_loaded_side_by_side(self, toy):
        old = get_kernel("org/toy", version=1)
        toy.commit(variant_files(layer_files(result=5)), branch="v1")
        new = get_kernel("org/toy", version=1)
        assert (old.RESULT, new.RESULT) == (1, 5)
        assert old.layers is not new.layers

    def test_metadata_id_shadows_no_module(self, hub):
        hub.repository("org/toy").commit(variant_files(metadata={"id": "json"}), branch="v1")
        get_kernel("org/toy", version=1)
        assert sys.modules["json"] is json

    def test_backend_chooses_the_variant(self, hub):
        files = variant_files(layer_files(result=7), variant="torch-cuda")
        hub.repository("org/toy").commit({**variant_files(), **files}, branch="v1")
        assert get_kernel("org/toy", version=1, backend="cuda").RESULT == 7
        assert get_kernel("org/toy", version=1, backend="cpu").RESULT == 1

    def test_requests_have_the_user_agent(self, hub, toy, monkeypatch):
        seen = []
        answer = hub.answer
        monkeypatch.setattr(hub, "answer", lambda url: seen.append(url) or answer(url))
        from tests.support import loopback

        agents = []
        serve = loopback._Handler._serve

        def recording(handler):
            agents.append(handler.headers["User-Agent"])
            serve(handler)

        monkeypatch.setattr(loopback._Handler, "_serve", recording)
        get_kernel("org/toy", version=1, user_agent={"framework": "mine"})
        assert all("kernelgraph" in agent and "framework/mine" in agent for agent in agents)

    def test_build_for_other_devices_is_refused(self, hub):
        metadata = {**METADATA, "backend": {"type": "cuda", "archs": ["9.0"]}}
        files = variant_files(variant="torch-cuda", metadata=metadata)
        hub.repository("org/toy").commit(files, branch="v1")
        wanted, old = Wanted("org/toy", version=1), Target("cuda", 80)
        with pytest.raises(ValueError, match=r"org/toy, variant torch-cuda: built for 9\.0, and"):
            load_from_hub(wanted, old, trust_remote_code=False)
        assert load_from_hub(wanted, old, trust_remote_code=False, check_arch=False).RESULT == 1
        assert load_from_hub(wanted, Target("cuda", 90), trust_remote_code=False).RESULT == 1

    def test_build_that_differs_from_its_metadata_is_refused(self, hub):
        files = variant_files()
        files["build/torch-universal/layers.py"] += b"\n"
        hub.repository("org/toy").commit(files, branch="v1")
        with pytest.raises(
            ValueError, match=r"^kernel org/toy, variant torch-universal: .*changed: layers\.py$"
        ):
            get_kernel("org/toy", version=1)

    def test_failing_import_names_kernel_revision_and_variant(self, hub):
        files = variant_files({"__init__.py": "1 / 0"})
        commit = hub.repository("org/toy").commit(files, branch="v1")
        with pytest.raises(
            ImportError,
            match=rf"^importing kernel org/toy failed \(revision {commit}, variant "
            r"torch-universal\): ZeroDivisionError: division by zero$",
        ):
            get_kernel("org/toy", version=1)

    @pytest.mark.parametrize(
        "arguments",
        [
            {"revision": "main", "version": 1},
            {"revision": "../../x"},
            {"revision": "a b"},
            {"revision": "-x"},
            {"version": "latest"},
            {"version": 1, "trust_remote_code": ["x"]},
            {"version": 1, "backend": "quantum"},
        ],
        ids=str,
    )
    def test_bad_argument_is_refused_without_a_request(self, hub, arguments):
        for function in (get_kernel, has_kernel):
            with pytest.raises(ValueError, match=r"revision|version|trust_remote_code|device type"):
                function("org/toy", **arguments)
        assert hub.asked() == []


class TestHas:
    def test_has_kernel_downloads_no_code(self, hub, toy):
        assert has_kernel("org/toy", version=1)
        assert [r.rpartition("/")[2] for r in hub.asked() if r.startswith("GET /kernels")] == [
            "metadata.json"
        ]

    def test_has_kernel_is_false_without_a_variant_that_fits(self, hub):
        hub.repository("org/toy").commit(variant_files(variant="torch-rocm"), branch="v1")
        assert not has_kernel("org/toy", version=1, backend="cpu")
        assert has_kernel("org/toy", version=1, backend="rocm")

    def test_has_kernel_is_false_without_repository_or_revision(self, toy):
        assert not has_kernel("org/toy", version=2)
        assert not has_kernel("org/nothing", version=1)

    def test_has_kernel_is_true_for_a_build_without_metadata(self, hub):
        hub.repository("org/toy").commit(variant_files(metadata=None), branch="v1")
        assert has_kernel("org/toy", version=1)

    def test_has_kernel_checks_the_devices_of_a_build(self, hub, monkeypatch):
        metadata = {**METADATA, "backend": {"type": "cuda", "archs": ["9.0"]}}
        files = variant_files(variant="torch-cuda", metadata=metadata)
        hub.repository("org/toy").commit(files, branch="v1")
        monkeypatch.setattr("kernelgraph.hub.kernels.target_of", lambda name: Target(name, 80))
        assert not has_kernel("org/toy", version=1, backend="cuda")
        assert has_kernel("org/toy", version=1, backend="cuda", check_arch=False)

    def test_has_kernel_raises_if_the_hub_cannot_be_reached(self, hub, toy):
        hub.fault("drop")
        with pytest.raises(OSError, match=r"^org/toy: could not be fetched from the Hub"):
            has_kernel("org/toy", version=1)


class TestLocalKernels:
    def test_local_kernel_replaces_a_repository(self, hub, toy, tmp_path, monkeypatch):
        write_repository(tmp_path / "mine", layer_files(result=42))
        monkeypatch.setenv("LOCAL_KERNELS", f"org/other=/x:org/toy={tmp_path / 'mine'}")
        assert get_kernel("org/toy", version=1).RESULT == 42
        assert has_kernel("org/toy", version=1)
        assert hub.asked() == []

    def test_local_kernel_needs_no_trust(self, hub, toy, tmp_path, monkeypatch):
        hub.organisation("org", trusted=False)
        write_repository(tmp_path / "mine", layer_files(result=42))
        monkeypatch.setenv("LOCAL_KERNELS", f"org/toy={tmp_path / 'mine'}")
        assert get_kernel("org/toy", version=1).RESULT == 42

    def test_local_kernel_does_not_replace_a_locked_one(self, toy, tmp_path, monkeypatch):
        (tmp_path / "kernels.lock").write_text(
            lock(Hub(), [Wanted("org/toy", version=1)]).to_json()
        )
        write_repository(tmp_path / "mine", layer_files(result=42))
        monkeypatch.setenv("LOCAL_KERNELS", f"org/toy={tmp_path / 'mine'}")
        assert get_locked_kernel("org/toy", lockfile=tmp_path / "kernels.lock").RESULT == 1


USER = """
from kernelgraph import get_kernel_dep
NOW = get_kernel_dep("org/used").RESULT
def later(): return get_kernel_dep("org/used").RESULT
def another(): return get_kernel_dep("org/another")
"""


def using(*dependencies, code=USER, **more):
    metadata = {**METADATA, "kernel-depends": list(dependencies), **more}
    return variant_files({"__init__.py": code}, metadata=metadata)


USED = {"repo-id": "org/used", "version": 1}


class TestDependencies:
    @pytest.fixture
    def used(self, hub):
        repository = hub.repository("org/used")
        repository.commit(variant_files(layer_files(result=11)), branch="v1")
        return repository

    @pytest.fixture
    def user(self, hub, used):
        repository = hub.repository("org/user")
        repository.commit(using(USED), branch="v1")
        return repository

    def test_used_kernel_is_available_at_import_and_later(self, user):
        kernel = get_kernel("org/user", version=1)
        assert (kernel.NOW, kernel.later()) == (11, 11)

    def test_used_kernel_is_available_through_the_kernels_package(self, hub, used, monkeypatch):
        """A kernel may get the kernels it uses from that package, if it is installed."""
        from contextlib import contextmanager
        from importlib.machinery import ModuleSpec
        from types import ModuleType

        offered = []

        @contextmanager
        def use_kernel_deps(modules):
            offered.append(modules)
            yield

        deps = ModuleType("kernels.deps")
        deps.use_kernel_deps = use_kernel_deps
        package = ModuleType("kernels")
        package.__spec__ = ModuleSpec("kernels", None)
        monkeypatch.setitem(sys.modules, "kernels", package)
        monkeypatch.setitem(sys.modules, "kernels.deps", deps)
        hub.repository("org/user").commit(using(USED, code="NOW = 1"), branch="v1")
        get_kernel("org/user", version=1)
        assert [modules["org/used"].RESULT for modules in offered] == [11]

    def test_kernel_is_imported_again_if_a_used_kernel_changed(self, user, used):
        """Its own content is the same."""
        old = get_kernel("org/user", version=1)
        used.commit(variant_files(layer_files(result=12)), branch="v1")
        new = get_kernel("org/user", version=1)
        assert (old.NOW, new.NOW, old.later(), new.later()) == (11, 12, 11, 12)

    def test_used_kernel_that_is_not_declared_is_refused(self, user):
        with pytest.raises(
            RuntimeError,
            match=r"^kernel org/user does not depend on org/another: .* org/used in ker",
        ):
            get_kernel("org/user", version=1).another()

    def test_used_kernel_outside_of_a_kernel_is_refused(self):
        with pytest.raises(RuntimeError, match=r"test_kernels is no kernel's module$"):
            get_kernel_dep("org/used")

    def test_has_kernel_needs_a_build_of_used_kernels(self, hub, user, used):
        assert has_kernel("org/user", version=1)
        used.commit(variant_files(variant="torch-rocm"), branch="v1")
        assert not has_kernel("org/user", version=1, backend="cpu")

    def test_no_kernel_runs_before_all_are_checked(self, hub, user, used, tmp_path):
        ran = tmp_path / "ran"
        files = variant_files({"__init__.py": f"open({str(ran)!r}, 'w')"})
        hub.repository("org/first").commit(files, branch="v1")
        bad = variant_files()
        bad["build/torch-universal/layers.py"] += b"\n"
        used.commit(bad, branch="v1")
        user.commit(using({"repo-id": "org/first", "version": 1}, USED), branch="v1")
        with pytest.raises(ValueError, match=r"kernel org/used, .*changed: layers\.py"):
            get_kernel("org/user", version=1)
        assert not ran.exists()

    def test_each_repository_needs_trust(self, hub, user):
        metadata = {**METADATA, "kernel-depends": [{"repo-id": "else/where", "version": 1}]}
        hub.repository("else/where").commit(variant_files(), branch="v1")
        user.commit(variant_files(metadata=metadata), branch="v1")
        with pytest.raises(ValueError, match=r"^else/where: loading a kernel runs"):
            get_kernel("org/user", version=1)
        assert get_kernel("org/user", version=1, trust_remote_code=["else/where"])

    @pytest.mark.parametrize("length", [1, 2, 3])
    def test_kernels_in_a_circle_are_refused(self, hub, length, tmp_path):
        names = [f"org/k{i}" for i in range(length)]
        for name, after in zip(names, [*names[1:], names[0]], strict=True):
            files = using({"repo-id": after, "version": 1}, code="raise Exception('run')")
            hub.repository(name).commit(files, branch="v1")
        way = " -> ".join(f"{name} version 1" for name in [*names, names[0]])
        for function in (get_kernel, has_kernel):
            with pytest.raises(ValueError, match=f"^kernels that use each other cannot .*: {way}$"):
                function("org/k0", version=1)
        with pytest.raises(ValueError, match=f"^kernels that use each other cannot .*: {way}$"):
            lock(Hub(), [Wanted("org/k0", version=1)])

    def test_kernel_used_twice_is_no_circle(self, hub, used):
        for name in ("org/left", "org/right"):
            hub.repository(name).commit(using(USED), branch="v1")
        both = [{"repo-id": f"org/{name}", "version": 1} for name in ("left", "right")]
        code = (
            "from kernelgraph import get_kernel_dep as get\n"
            "left, right = get('org/left'), get('org/right')"
        )
        hub.repository("org/top").commit(using(*both, code=code), branch="v1")
        kernel = get_kernel("org/top", version=1)
        assert kernel.left.NOW == kernel.right.NOW == 11

    def test_local_kernel_uses_kernels_on_the_hub(self, used, tmp_path):
        metadata = {**METADATA, "kernel-depends": [USED]}
        write_repository(tmp_path / "mine", {"__init__.py": USER}, metadata=metadata)
        assert get_local_kernel(tmp_path / "mine").NOW == 11

    def test_used_kernel_is_loaded_at_its_locked_commit(self, user, used, tmp_path):
        lockfile = tmp_path / "kernels.lock"
        lockfile.write_text(lock(Hub(), [Wanted("org/user", version=1)]).to_json())
        used.commit(variant_files(layer_files(result=12)), branch="v1")
        assert get_locked_kernel("org/user", lockfile=lockfile).NOW == 11

    def test_missing_python_package_is_an_error_before_the_import(self, hub, tmp_path):
        ran = tmp_path / "ran"
        hub.repository("org/user").commit(
            using(code=f"open({str(ran)!r}, 'w')", **{"python-depends": ["helion"]}), branch="v1"
        )
        with pytest.raises(
            ImportError, match=r"^kernel org/user, .* needs helion, and it is not in"
        ):
            get_kernel("org/user", version=1)
        assert not ran.exists()
