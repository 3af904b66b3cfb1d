"""Digests of a variant's files: their values, changes that are found, and links."""

from __future__ import annotations

import base64
import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernelgraph.builds.digests import digest_files, verify
from kernelgraph.builds.metadata import Digest, Metadata, read_metadata
from tests.support.toy_repository import write_repository

FILES = {"__init__.py": "x = 1\n", "sub/data.bin": b"\x00\x01\x02", "sub/empty.py": b""}


@pytest.fixture
def variant(tmp_path):
    return write_repository(tmp_path / "repo", FILES)


def check(variant: Path) -> None:
    verify(variant, read_metadata(variant))


class TestDigest:
    def test_digests_are_base64_of_sha256(self, variant):
        def expected(data: bytes) -> str:
            return base64.b64encode(hashlib.sha256(data).digest()).decode()

        assert digest_files(variant) == {
            "__init__.py": expected(b"x = 1\n"),
            "sub/data.bin": expected(b"\x00\x01\x02"),
            "sub/empty.py": expected(b""),
        }
        check(variant)

    @pytest.mark.parametrize("algorithm", ["sha256", "sha384", "sha512", "blake2b"])
    def test_each_algorithm_finds_a_change(self, variant, algorithm):
        files = digest_files(variant, algorithm)
        metadata = Metadata(digest=Digest(algorithm, tuple(files.items())))
        verify(variant, metadata)
        (variant / "__init__.py").write_text("x = 2\n")
        with pytest.raises(ValueError, match=r"changed: __init__\.py$"):
            verify(variant, metadata)

    @pytest.mark.parametrize("algorithm", ["md5", "sha1", "SHA256", "shake_128", ""])
    def test_unknown_algorithm_is_refused(self, variant, algorithm):
        with pytest.raises(ValueError, match=r"^unknown digest algorithm '.*': there are sha256, "):
            digest_files(variant, algorithm)
        with pytest.raises(ValueError, match="unknown digest algorithm"):
            verify(variant, Metadata(digest=Digest(algorithm, ())))

    def test_metadata_without_a_digest_passes(self, variant):
        verify(variant, Metadata())

    def test_each_single_changed_byte_is_found(self, variant):
        metadata = read_metadata(variant)
        for file in ("__init__.py", "sub/data.bin"):
            original = (variant / file).read_bytes()
            for place in range(len(original)):
                changed = bytearray(original)
                changed[place] ^= 1
                (variant / file).write_bytes(bytes(changed))
                with pytest.raises(ValueError, match=f"changed: {file}$"):
                    verify(variant, metadata)
            (variant / file).write_bytes(original)
        verify(variant, metadata)

    def test_missing_file_is_named(self, variant):
        (variant / "sub/empty.py").unlink()
        with pytest.raises(ValueError, match=r"^.*metadata\.json: missing: sub/empty\.py$"):
            check(variant)

    @pytest.mark.parametrize("name", ["added.py", "sub/added.so", "sub/metadata.json", ".hidden"])
    def test_added_file_is_named(self, variant, name):
        (variant / name).write_text("")
        with pytest.raises(ValueError, match=f"not listed: {name}$"):
            check(variant)

    def test_all_problems_are_named(self, variant):
        (variant / "sub/empty.py").unlink()
        (variant / "__init__.py").write_text("y")
        (variant / "new.py").write_text("y")
        (variant / "new2.py").write_text("y")
        expected = r"missing: sub/empty.py; changed: __init__.py; not listed: new.py, new2.py$"
        with pytest.raises(ValueError, match=expected):
            check(variant)

    def test_bytecode_and_the_signature_are_left_out(self, variant):
        (variant / "__pycache__").mkdir()
        (variant / "__pycache__/__init__.cpython-311.pyc").write_bytes(b"x")
        (variant / "sub/__pycache__").mkdir()
        (variant / "sub/__pycache__/anything").write_bytes(b"x")
        (variant / "sub/evil.pyc").write_bytes(b"x")
        (variant / "metadata.json.sigstore").write_text("{}")
        check(variant)

    def test_listed_bytecode_may_be_missing(self, variant):
        files = {**digest_files(variant), "__pycache__/a.pyc": "x", "b.pyc": "x"}
        verify(variant, Metadata(digest=Digest("sha256", tuple(files.items()))))

    @given(data=st.data())
    def test_any_change_is_found(self, tmp_path_factory, data):
        names = st.sampled_from(["__init__.py", "a.py", "b/c.so", "b/d.json"])
        before = data.draw(st.dictionaries(names, st.binary(max_size=4)))
        after = data.draw(st.dictionaries(names, st.binary(max_size=4)) | st.just(before))
        path = tmp_path_factory.mktemp("any")
        metadata = read_metadata(write_repository(path, before))
        variant = write_repository(path, after)
        if before == after:
            verify(variant, metadata)
        else:
            with pytest.raises(ValueError, match="does not match the digest"):
                verify(variant, metadata)


class TestLinks:
    def test_link_out_of_the_variant_is_refused(self, tmp_path, variant):
        (tmp_path / "outside.py").write_text("x")
        (variant / "link.py").symlink_to(tmp_path / "outside.py")
        with pytest.raises(ValueError, match=r"link\.py is a link that leads out of it$"):
            check(variant)
        with pytest.raises(ValueError, match="leads out"):
            digest_files(variant)

    def test_link_to_a_directory_outside_is_refused(self, tmp_path, variant):
        (variant / "sub/link").symlink_to(tmp_path, target_is_directory=True)
        with pytest.raises(ValueError, match=r"sub/link is a link that leads out of it$"):
            digest_files(variant)

    def test_link_out_through_a_link_inside_is_refused(self, tmp_path, variant):
        (tmp_path / "outside").write_text("x")
        (variant / "a").symlink_to("b")
        (variant / "b").symlink_to("../../../outside")
        with pytest.raises(ValueError, match=r"a is a link that leads out of it$"):
            digest_files(variant)

    def test_link_inside_is_followed(self, variant):
        (variant / "same.bin").symlink_to("sub/data.bin")
        files = digest_files(variant)
        assert files["same.bin"] == files["sub/data.bin"]

    @pytest.mark.parametrize("target", ["sub", "nowhere", "loop"])
    def test_link_to_no_file_is_refused(self, variant, target):
        (variant / "loop").symlink_to(target)
        with pytest.raises(ValueError, match=r"loop is neither a file nor a directory$"):
            digest_files(variant)

    def test_pipe_is_refused(self, variant):
        os.mkfifo(variant / "pipe")
        with pytest.raises(ValueError, match=r"pipe is neither a file nor a directory$"):
            digest_files(variant)

    def test_variant_may_itself_be_a_link(self, tmp_path, variant):
        (tmp_path / "elsewhere").symlink_to(variant, target_is_directory=True)
        assert digest_files(tmp_path / "elsewhere") == digest_files(variant)

    def test_link_into_the_blobs_of_a_hub_cache_is_followed(self, tmp_path):
        snapshot = tmp_path / "kernels--o--n/snapshots/abc/build/torch-universal"
        (tmp_path / "kernels--o--n/blobs").mkdir(parents=True)
        (tmp_path / "kernels--o--n/blobs/123").write_text("x = 1\n")
        snapshot.mkdir(parents=True)
        (snapshot / "__init__.py").symlink_to("../../../../blobs/123")
        assert list(digest_files(snapshot)) == ["__init__.py"]

    def test_missing_directory_is_an_error(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            digest_files(tmp_path / "nowhere")
