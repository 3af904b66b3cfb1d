"""The files of a variant: which are downloaded, and that each is what the Hub lists."""

from __future__ import annotations

import shutil

import pytest

from kernelgraph import get_kernel
from kernelgraph.builds import digest_files
from kernelgraph.hub.client import Hub, Resolved
from kernelgraph.hub.fetcher import fetch, find_damage, list_build
from tests.support.toy_repository import layer_files, variant_files

FILES = {**layer_files(), "data/weights.bin": b"\0" * 300, "_ops.so": b"\x7fELF"}
UNIVERSAL = "build/torch-universal"


@pytest.fixture
def repository(hub):
    repository = hub.repository("org/toy")
    repository.commit(
        {
            **variant_files(FILES),
            **variant_files(FILES, variant="torch-rocm"),
            f"{UNIVERSAL}/__pycache__/layers.cpython-311.pyc": b"\0",
            f"{UNIVERSAL}/old.pyc": b"\0",
            "README.md": b"# Toy",
        },
        branch="v1",
    )
    return repository


@pytest.fixture
def kernel(repository):
    return Resolved("org/toy", "kernel", repository.branches["v1"])


@pytest.fixture
def variant(kernel):
    """The directory of the variant, which is in the cache."""
    return fetched(kernel).directory


def fetched(kernel):
    hub = Hub()
    return fetch(hub, kernel, "torch-universal", list_build(hub, kernel)["torch-universal"])


def names(requests, method="GET"):
    return sorted(r.split("/torch-universal/")[1] for r in requests if f"{method} /kernels" in r)


class TestDownload:
    def test_only_the_variant_without_bytecode_is_downloaded(self, hub, kernel):
        directory = fetched(kernel).directory
        assert names(hub.asked()) == sorted([*FILES, "metadata.json"])
        assert [path.name for path in directory.parent.iterdir()] == ["torch-universal"]
        assert set(digest_files(directory)) == set(FILES)

    def test_variant_is_downloaded_once(self, hub, kernel, variant):
        hub.asked()
        assert fetched(kernel).directory == variant
        assert hub.asked() == []

    def test_missing_files_alone_are_downloaded(self, hub, kernel, variant):
        hub.asked()
        (variant / "layers.py").unlink()
        fetched(kernel)
        assert names(hub.asked()) == []  # the cache still has the blob
        blob = (variant / "layers.py").resolve()
        blob.unlink()
        fetched(kernel)
        assert names(hub.asked()) == ["layers.py"]

    def test_digests_of_all_files_are_returned(self, kernel):
        found = fetched(kernel)
        listed = digest_files(found.directory)
        assert {name: found.sha256[name] for name in listed} == listed

    def test_cached_variant_is_fetched_offline(self, kernel, variant, offline):
        offline()
        assert fetched(kernel).directory == variant

    def test_incomplete_variant_is_refused_offline(self, kernel, variant, offline):
        (variant / "layers.py").unlink()
        offline()
        with pytest.raises(
            OSError, match=r"^org/toy at \w+, variant torch-universal: cannot be loaded from the c"
        ):
            fetched(kernel)

    def test_cached_variant_without_a_listing_is_fetched_offline(
        self, kernel, variant, offline, as_a_new_process
    ):
        """A cache that an older client has written has no listing."""
        shutil.rmtree(variant.parents[3] / "trees")
        offline()
        as_a_new_process()
        assert list_build(Hub(), kernel) == {"torch-universal": {}}
        assert fetched(kernel).directory == variant

    def test_listing_with_a_path_that_leads_out_is_refused(self, hub, repository, kernel):
        repository.commits[kernel.commit] = {"build/torch-universal/../../../../x.py": b""}
        with pytest.raises(ValueError, match=r"^org/toy at \w+: build/.*x.py is no path inside"):
            list_build(Hub(), kernel)

    def test_repository_without_a_build_has_no_variants(self, hub, repository, kernel):
        repository.commits[kernel.commit] = {"README.md": b"#"}
        assert list_build(Hub(), kernel) == {}

    def test_blobs_shared_by_repositories_are_accepted(self, kernel, variant):
        """The client may keep a content of several repositories once, and link to it."""
        blob = (variant / "_ops.so").resolve()
        shared = blob.parents[2] / "blobs" / "ab" / "cdef"
        shared.parent.mkdir(parents=True)
        shutil.move(blob, shared)
        blob.symlink_to(shared)
        assert fetched(kernel).directory == variant

    def test_link_out_of_the_cache_is_refused(self, kernel, variant, tmp_path, offline):
        (tmp_path / "elsewhere.so").write_bytes(FILES["_ops.so"])
        (variant / "_ops.so").unlink()
        (variant / "_ops.so").symlink_to(tmp_path / "elsewhere.so")
        offline()
        with pytest.raises(OSError, match=r"_ops\.so is a link that leads out of it"):
            fetched(kernel)


def change_content(variant):
    (variant / "layers.py").resolve().write_text("poison")


def change_large_file(variant):
    (variant / "data/weights.bin").resolve().write_bytes(b"\1" * 300)


def change_metadata(variant):
    (variant / "metadata.json").resolve().write_text("{}")


def replace_link(variant):
    (variant / "layers.py").unlink()
    (variant / "layers.py").write_text("poison")


def cut_short(variant):
    (variant / "__init__.py").resolve().write_text("")


def add_file(variant):
    (variant / "more.py").write_text("poison")


def lead_out(variant):
    (variant / "more.py").symlink_to("/etc/hostname")


def break_link(variant):
    (variant / "layers.py").resolve().unlink()


def directory_for_file(variant):
    (variant / "layers.py").unlink()
    (variant / "layers.py").mkdir()
    (variant / "layers.py" / "__init__.py").write_text("poison")


def empty_directory_for_file(variant):
    (variant / "layers.py").unlink()
    (variant / "layers.py").mkdir()


def file_for_directory(variant):
    shutil.rmtree(variant)
    variant.write_text("poison")


def link_for_directory(variant):
    shutil.move(variant, variant.parents[4] / "moved")
    variant.symlink_to(variant.parents[4] / "moved")


def corrupt_listing(variant):
    (listing,) = (variant.parents[3] / "trees").iterdir()
    text = listing.read_text()
    id_ = text.split('"blob_id": "')[3][:40]
    listing.write_text(text.replace(id_, "0" * 40))


DAMAGES = [
    change_content,
    change_large_file,
    change_metadata,
    replace_link,
    cut_short,
    add_file,
    lead_out,
    break_link,
    directory_for_file,
    empty_directory_for_file,
    file_for_directory,
    link_for_directory,
    corrupt_listing,
]


class TestDamage:
    @pytest.mark.parametrize("damage", DAMAGES)
    def test_damaged_variant_is_replaced_online(
        self, hub, kernel, variant, as_a_new_process, damage
    ):
        whole = digest_files(variant)
        damage(variant)
        as_a_new_process()
        assert fetched(kernel).directory == variant
        assert digest_files(variant) == whole
        hub.asked()
        files = list_build(Hub(), kernel, refresh=True)["torch-universal"]
        assert not find_damage(variant, files)[0]

    @pytest.mark.parametrize("damage", DAMAGES)
    def test_damaged_variant_is_refused_offline(
        self, kernel, variant, offline, as_a_new_process, damage
    ):
        damage(variant)
        as_a_new_process()
        offline()
        with pytest.raises(OSError, match=r"^org/toy at \w+, variant torch-universal: cannot be"):
            fetched(kernel)

    def test_damaged_variant_that_the_hub_no_longer_lists_is_refused(
        self, repository, kernel, variant
    ):
        (variant / "layers.py").resolve().write_text("poison")
        repository.commits[kernel.commit] = {"build/torch-rocm/__init__.py": b""}
        with pytest.raises(ValueError, match=r"torch-universal: the Hub does not list it any more"):
            fetched(kernel)

    def test_damaged_variant_is_refused_if_the_hub_cannot_be_reached(self, hub, kernel, variant):
        (variant / "layers.py").resolve().write_text("poison")
        hub.fault("drop")
        message = r"^org/toy: could not be fetched .* not whole: changed: lay"
        with pytest.raises(OSError, match=message):
            fetched(kernel)

    def test_damaged_code_is_never_run(self, hub, kernel, variant, offline, tmp_path):
        (variant / "__init__.py").resolve().write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        offline()
        with pytest.raises(OSError, match=r"changed: __init__\.py"):
            get_kernel("org/toy", revision=kernel.commit, trust_remote_code=True)
        assert not (tmp_path / "ran").exists()

    def test_byte_changed_once_on_the_way_is_corrected(self, hub, kernel):
        hub.fault("corrupt", "layers.py", times=1, method="GET")
        directory = fetched(kernel).directory
        assert (directory / "layers.py").read_text() == FILES["layers.py"]

    def test_byte_changed_each_time_on_the_way_is_an_error(self, hub, kernel):
        hub.fault("corrupt", "layers.py", method="GET")
        with pytest.raises(
            ValueError,
            match=r"^org/toy at \w+, variant torch-universal: what was downloaded is not what "
            r"the Hub lists: changed: layers\.py$",
        ):
            fetched(kernel)
        hub.faults.clear()
        assert (fetched(kernel).directory / "layers.py").read_text() == FILES["layers.py"]


class TestRepair:
    """The download of a damaged variant, and the files that it must not touch."""

    def test_damaged_variant_is_downloaded_again_whole(self, hub, kernel, variant):
        hub.asked()
        change_content(variant)
        fetched(kernel)
        assert names(hub.asked()) == sorted([*FILES, "metadata.json"])

    def test_whole_contents_are_linked_again_without_a_download(self, hub, kernel, variant):
        hub.asked()
        add_file(variant)
        fetched(kernel)
        assert names(hub.asked()) == []

    def test_repair_leaves_other_variants_alone(self, kernel, variant):
        hub = Hub()
        other = fetch(hub, kernel, "torch-rocm", list_build(hub, kernel)["torch-rocm"]).directory
        (other / "own.txt").write_text("of the user")
        change_large_file(variant)
        fetched(kernel)
        assert (other / "own.txt").read_text() == "of the user"

    @pytest.mark.parametrize("name", ["layers.py", "more.py"])
    def test_repair_deletes_a_link_and_not_its_target(self, kernel, variant, tmp_path, name):
        (tmp_path / "outside.py").write_text("of the user")
        (variant / name).unlink(missing_ok=True)
        (variant / name).symlink_to(tmp_path / "outside.py")
        fetched(kernel)
        assert (tmp_path / "outside.py").read_text() == "of the user"

    def test_repair_deletes_a_link_and_not_its_target_directory(self, kernel, variant, tmp_path):
        (tmp_path / "outside").mkdir()
        (tmp_path / "outside" / "file.py").write_text("of the user")
        (variant / "more").symlink_to(tmp_path / "outside")
        fetched(kernel)
        assert not (variant / "more").exists()
        assert (tmp_path / "outside" / "file.py").read_text() == "of the user"

    def test_repair_of_a_variant_that_is_a_link_deletes_the_link_alone(self, kernel, variant):
        link_for_directory(variant)
        moved = variant.resolve()
        before = sorted(path.name for path in moved.iterdir())
        fetched(kernel)
        assert not variant.is_symlink()
        assert sorted(path.name for path in moved.iterdir()) == before

    def test_repair_deletes_nothing_where_a_link_leads_out_of_the_cache(
        self, hub, kernel, variant, tmp_path
    ):
        build, outside = variant.parent, tmp_path / "outside"
        shutil.move(build, outside)
        build.symlink_to(outside)
        own = outside / "torch-universal" / "own.txt"
        own.write_text("of the user")
        hub.asked()
        with pytest.raises(OSError, match=r"^org/toy: .*build leads out of the cache, where noth"):
            fetched(kernel)
        assert own.read_text() == "of the user"
        assert names(hub.asked()) == []

    def test_repair_deletes_no_listing_where_a_link_leads_out_of_the_cache(
        self, kernel, variant, tmp_path
    ):
        listings, outside = variant.parents[3] / "trees", tmp_path / "outside"
        shutil.move(listings, outside)
        listings.symlink_to(outside)
        change_content(variant)
        with pytest.raises(OSError, match=r"^org/toy: .*trees leads out of the cache, where noth"):
            fetched(kernel)
        assert (outside / f"{kernel.commit}.json").exists()

    def test_repository_whose_folder_is_a_link_is_repaired(self, kernel, variant, tmp_path):
        """A user may keep a large repository on another disk."""
        storage = Hub().storage("org/toy", "kernel")
        shutil.move(storage, tmp_path / "other-disk")
        storage.symlink_to(tmp_path / "other-disk")
        add_file(variant)
        assert fetched(kernel).directory == variant
        assert not (variant / "more.py").exists()
