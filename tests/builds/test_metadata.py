"""metadata.json: what it may hold, the digests, and the devices that a build is for."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelgraph.builds.digests import digest_files, verify
from kernelgraph.builds.metadata import Digest, Metadata, parse_metadata, read_metadata
from kernelgraph.builds.requirements import check_archs
from kernelgraph.builds.wanted import Wanted
from kernelgraph.selection.devices import Target
from tests.support.toy_repository import write_repository


def parse(content: object) -> Metadata:
    return parse_metadata(json.dumps(content).encode(), "metadata.json")


def parse_or_message(data: bytes) -> Metadata | str:
    try:
        return parse_metadata(data, "metadata.json")
    except ValueError as error:
        return str(error)


class TestParse:
    def test_everything(self):
        assert parse(
            {
                "id": "_act_cuda_0ed0691",
                "name": "act",
                "version": 1,
                "license": "apache-2.0",
                "python-depends": ["einops"],
                "backend": {"type": "cuda", "archs": ["8.0", "9.0a"]},
                "digest": {"algorithm": "sha512", "files": {"b.py": "eA==", "a/c.so": "eQ=="}},
                "provenance": {"something": "new"},
            }
        ) == Metadata(
            id="_act_cuda_0ed0691",
            name="act",
            version=1,
            license="apache-2.0",
            python_depends=("einops",),
            backend="cuda",
            archs=("8.0", "9.0a"),
            digest=Digest("sha512", (("a/c.so", "eQ=="), ("b.py", "eA=="))),
        )

    def test_nothing(self, tmp_path):
        assert parse({}) == parse({"id": None, "digest": None, "backend": None}) == Metadata()
        assert read_metadata(tmp_path) == Metadata()

    def test_requirements_by_backend(self):
        by_backend = {"general": ["einops"], "cuda": ["nvidia-cutlass-dsl"], "xpu": ["onednn"]}
        found = parse({"python-depends": by_backend, "backend": {"type": "cuda"}})
        assert found.python_depends == ("einops", "nvidia-cutlass-dsl")

    def test_is_hashable(self):
        metadata = parse({"digest": {"algorithm": "sha256", "files": {"a": "b"}}})
        assert len({metadata, metadata}) == 1

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ([], "expected a JSON object, got []"),
            ({"id": 1}, '"id": expected a string, got 1'),
            ({"name": []}, '"name": expected a string, got []'),
            ({"version": True}, '"version": expected a number or a string, got True'),
            ({"version": 1.5}, '"version": expected a number or a string, got 1.5'),
            ({"license": {}}, '"license": expected a string, got {}'),
            ({"python-depends": "x"}, "\"python-depends\": expected a list of strings, got 'x'"),
            (
                {"python-depends": {"xpu": [1]}},
                '"python-depends.xpu": expected a list of strings, got [1]',
            ),
            ({"backend": "cuda"}, "\"backend\": expected an object, got 'cuda'"),
            ({"backend": {"type": 1}}, '"backend.type": expected a string, got 1'),
            (
                {"backend": {"archs": ["8.0", 9]}},
                "\"backend.archs\": expected a list of strings, got ['8.0', 9]",
            ),
            ({"digest": []}, '"digest": expected an object, got []'),
            (
                {"digest": {"algorithm": "md5", "files": {}}},
                "\"digest.algorithm\": expected one of sha256, sha384, sha512, blake2b, got 'md5'",
            ),
            ({"digest": {"algorithm": "sha256"}}, '"digest.files": expected an object, got None'),
            (
                {"digest": {"algorithm": "sha256", "files": {"a.py": 1}}},
                '"digest.files.a.py": expected a string, got 1',
            ),
        ],
    )
    def test_wrong_shapes(self, content, message):
        with pytest.raises(ValueError) as caught:  # noqa: PT011 (the whole message is compared)
            parse(content)
        assert str(caught.value) == f"metadata.json: {message}"

    @pytest.mark.parametrize(
        "name",
        ["/etc/passwd", "../up.py", "a/../../b", "..\\up.py", "C:\\x", "\\\\host\\x", ""],
    )
    def test_a_digest_lists_only_what_is_inside(self, name):
        with pytest.raises(ValueError, match=r'"digest.files": expected paths inside the variant'):
            parse({"digest": {"algorithm": "sha256", "files": {name: "x"}}})

    @pytest.mark.parametrize(
        "data",
        [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"version": ' + b"1" * 5000 + b"}", b"nul"],
    )
    def test_corrupt(self, tmp_path, data):
        (tmp_path / "metadata.json").write_bytes(data)
        with pytest.raises(ValueError, match=r"metadata\.json: expected a JSON object") as caught:
            read_metadata(tmp_path)
        assert str(tmp_path) in str(caught.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
KEYS = ["id", "name", "version", "license", "python-depends", "backend", "digest"]
nearly_right = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(KEYS, json_values),
        "kernel-depends": st.lists(
            json_values
            | st.fixed_dictionaries(
                {"repo-id": st.just("org/a") | json_values},
                optional={"version": json_values, "revision": st.text() | json_values},
            ),
            max_size=3,
        ),
        "backend": json_values | st.fixed_dictionaries({"type": json_values, "archs": json_values}),
        "digest": json_values
        | st.fixed_dictionaries(
            {
                "algorithm": st.sampled_from(["sha256", "md5"]),
                "files": json_values | st.dictionaries(st.text(), st.text() | json_values),
            }
        ),
    },
)


class TestKernelDepends:
    @pytest.mark.parametrize(
        ("entry", "wanted"),
        [
            ({"repo-id": "org/a", "version": 1}, Wanted("org/a", version=1)),
            ({"repo-id": "org/a", "version": ">=0.1"}, Wanted("org/a", version=">=0.1")),
            ({"repo-id": "org/a", "revision": "main"}, Wanted("org/a", "main")),
            ({"repo-id": "org/a", "revision": "v1", "version": None}, Wanted("org/a", "v1")),
        ],
    )
    def test_forms(self, entry, wanted):
        assert parse({"kernel-depends": [entry]}).kernel_depends == (wanted,)
        assert parse({"kernel-depends": None}).kernel_depends == ()

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            ({}, r'"kernel-depends": expected a list of objects, got \{\}$'),
            (["org/a"], r'"kernel-depends\[0\]": expected an object, got \'org/a\'$'),
            ([{}], 'expected "repo-id", and either "version" or "revision"$'),
            ([{"repo-id": "org/a"}], 'expected "repo-id", and either "version" or "revision"$'),
            ([{"repo-id": "org/a", "version": 1, "revision": "x"}], 'either "version" or "revis'),
            ([{"repo-id": "a", "version": 1}], "repo_id: expected owner/name, got 'a'$"),
            ([{"repo-id": "org/a", "version": True}], r'version": expected a number or a string'),
            ([{"repo-id": "org/a", "version": -1}], "version: expected 0 or more, got -1$"),
            ([{"repo-id": "org/a", "revision": "../x"}], "revision: expected a branch, a tag or"),
            ([{"repo-id": "org/a", "revision": "\ud800"}], "revision: expected a branch, a tag or"),
        ],
    )
    def test_malformed(self, value, message):
        with pytest.raises(ValueError, match=message):
            parse({"kernel-depends": value})


class TestFuzz:
    @settings(max_examples=150)
    @given(json_values | nearly_right)
    def test_right_or_value_error(self, content):
        metadata = parse_or_message(json.dumps(content).encode())
        if isinstance(metadata, str):
            assert metadata.startswith("metadata.json: ")
            return
        assert isinstance(content, dict)
        assert metadata.id == content.get("id")
        assert metadata.name == content.get("name")
        assert metadata.archs == tuple((content.get("backend") or {}).get("archs") or ())
        assert (metadata.digest is None) == (content.get("digest") is None)
        check_archs(replace(metadata, backend="rocm"), Target("cuda", 90))

    @given(st.binary())
    def test_bytes(self, data):
        metadata = parse_or_message(data)
        assert isinstance(metadata, Metadata) or metadata.startswith("metadata.json: ")

    @given(st.text(), st.integers(0, 200))
    def test_any_arch(self, arch, capability):
        runs_on([arch, f"9.0{arch}"], capability)


FILES = {"__init__.py": "x = 1\n", "sub/data.bin": b"\x00\x01\x02", "sub/empty.py": b""}


@pytest.fixture
def variant(tmp_path):
    return write_repository(tmp_path / "repo", FILES)


def check(variant: Path) -> None:
    verify(variant, read_metadata(variant))


class TestDigest:
    def test_values(self, variant):
        def expected(data: bytes) -> str:
            return base64.b64encode(hashlib.sha256(data).digest()).decode()

        assert digest_files(variant) == {
            "__init__.py": expected(b"x = 1\n"),
            "sub/data.bin": expected(b"\x00\x01\x02"),
            "sub/empty.py": expected(b""),
        }
        check(variant)

    @pytest.mark.parametrize("algorithm", ["sha256", "sha384", "sha512", "blake2b"])
    def test_algorithms(self, variant, algorithm):
        files = digest_files(variant, algorithm)
        metadata = Metadata(digest=Digest(algorithm, tuple(files.items())))
        verify(variant, metadata)
        (variant / "__init__.py").write_text("x = 2\n")
        with pytest.raises(ValueError, match=r"changed: __init__\.py$"):
            verify(variant, metadata)

    @pytest.mark.parametrize("algorithm", ["md5", "sha1", "SHA256", "shake_128", ""])
    def test_unknown_algorithm(self, variant, algorithm):
        with pytest.raises(ValueError, match=r"^unknown digest algorithm '.*': there are sha256, "):
            digest_files(variant, algorithm)
        with pytest.raises(ValueError, match="unknown digest algorithm"):
            verify(variant, Metadata(digest=Digest(algorithm, ())))

    def test_without_a_digest_nothing_is_checked(self, variant):
        verify(variant, Metadata())

    def test_every_single_changed_byte(self, variant):
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

    def test_missing(self, variant):
        (variant / "sub/empty.py").unlink()
        with pytest.raises(ValueError, match=r"^.*metadata\.json: missing: sub/empty\.py$"):
            check(variant)

    @pytest.mark.parametrize("name", ["added.py", "sub/added.so", "sub/metadata.json", ".hidden"])
    def test_added(self, variant, name):
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

    def test_listed_bytecode_is_not_missed(self, variant):
        files = {**digest_files(variant), "__pycache__/a.pyc": "x", "b.pyc": "x"}
        verify(variant, Metadata(digest=Digest("sha256", tuple(files.items()))))

    @given(data=st.data())
    def test_any_change(self, tmp_path_factory, data):
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
    def test_out_of_the_variant(self, tmp_path, variant):
        (tmp_path / "outside.py").write_text("x")
        (variant / "link.py").symlink_to(tmp_path / "outside.py")
        with pytest.raises(ValueError, match=r"link\.py is a link that leads out of it$"):
            check(variant)
        with pytest.raises(ValueError, match="leads out"):
            digest_files(variant)

    def test_to_a_directory_outside(self, tmp_path, variant):
        (variant / "sub/link").symlink_to(tmp_path, target_is_directory=True)
        with pytest.raises(ValueError, match=r"sub/link is a link that leads out of it$"):
            digest_files(variant)

    def test_through_a_link_inside(self, tmp_path, variant):
        (tmp_path / "outside").write_text("x")
        (variant / "a").symlink_to("b")
        (variant / "b").symlink_to("../../../outside")
        with pytest.raises(ValueError, match=r"a is a link that leads out of it$"):
            digest_files(variant)

    def test_inside(self, variant):
        (variant / "same.bin").symlink_to("sub/data.bin")
        files = digest_files(variant)
        assert files["same.bin"] == files["sub/data.bin"]

    @pytest.mark.parametrize("target", ["sub", "nowhere", "loop"])
    def test_to_no_file(self, variant, target):
        (variant / "loop").symlink_to(target)
        with pytest.raises(ValueError, match=r"loop is neither a file nor a directory$"):
            digest_files(variant)

    def test_pipe(self, variant):
        os.mkfifo(variant / "pipe")
        with pytest.raises(ValueError, match=r"pipe is neither a file nor a directory$"):
            digest_files(variant)

    def test_the_variant_may_itself_be_a_link(self, tmp_path, variant):
        (tmp_path / "elsewhere").symlink_to(variant, target_is_directory=True)
        assert digest_files(tmp_path / "elsewhere") == digest_files(variant)

    def test_into_the_blobs_of_a_hub_cache(self, tmp_path):
        snapshot = tmp_path / "kernels--o--n/snapshots/abc/build/torch-universal"
        (tmp_path / "kernels--o--n/blobs").mkdir(parents=True)
        (tmp_path / "kernels--o--n/blobs/123").write_text("x = 1\n")
        snapshot.mkdir(parents=True)
        (snapshot / "__init__.py").symlink_to("../../../../blobs/123")
        assert list(digest_files(snapshot)) == ["__init__.py"]

    def test_no_such_directory(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            digest_files(tmp_path / "nowhere")


def runs_on(archs: list[str], capability: int | None, backend: str = "cuda") -> bool:
    try:
        check_archs(Metadata(backend="cuda", archs=tuple(archs)), Target(backend, capability))
    except ValueError:
        return False
    return True


class TestArchs:
    @pytest.mark.parametrize(
        ("arch", "fits"),
        [
            ("8.0", [80, 86, 89]),
            ("8.6", [86, 89]),
            ("9.0", [90]),
            ("9.0a", [90]),
            ("10.0f", [100, 103]),
            ("8.0+PTX", [80, 86, 89, 90, 100, 103, 120]),
            ("9.0+PTX", [90, 100, 103, 120]),
            ("9.0a+PTX", [90]),
            ("10.0", [100, 103]),
            ("12.0", [120]),
            ("some future notation", [75, 80, 86, 89, 90, 100, 103, 120]),
        ],
    )
    def test_cuda(self, arch, fits):
        assert [c for c in (75, 80, 86, 89, 90, 100, 103, 120) if runs_on([arch], c)] == fits

    def test_any_of_several(self):
        assert runs_on(["7.5", "9.0"], 90)
        assert not runs_on(["7.5", "9.0"], 80)

    def test_nothing_known_refuses_nothing(self):
        assert runs_on([], 90)
        assert runs_on(["8.0"], None)
        assert runs_on(["8.0"], None, backend="cpu")
        assert runs_on(["8.0"], 90, backend="rocm")

    def test_message(self):
        metadata = Metadata(backend="cuda", archs=("8.0", "9.0a"))
        with pytest.raises(ValueError, match=r"^built for 8\.0, 9\.0a, and this device is cuda 10"):
            check_archs(metadata, Target("cuda", 100))

    def test_rocm_by_name(self):
        metadata = Metadata(backend="rocm", archs=("gfx90a", "gfx942"))
        target = Target("rocm", 94)
        check_archs(metadata, target, "gfx942")
        check_archs(metadata, target, "gfx90a:sramecc+:xnack-")
        check_archs(metadata, target)
        with pytest.raises(
            ValueError, match=r"^built for gfx90a, gfx942, and this device is gfx110"
        ):
            check_archs(metadata, target, "gfx1100")
