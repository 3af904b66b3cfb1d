"""The parser of metadata.json: what it accepts, and the errors for the rest."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelgraph.builds.metadata import Digest, Metadata, parse_metadata, read_metadata
from kernelgraph.builds.requirements import check_archs
from kernelgraph.builds.wanted import Wanted
from kernelgraph.selection.devices import Target


def parse(content: object) -> Metadata:
    return parse_metadata(json.dumps(content).encode(), "metadata.json")


def parse_or_message(data: bytes) -> Metadata | str:
    try:
        return parse_metadata(data, "metadata.json")
    except ValueError as error:
        return str(error)


class TestParse:
    def test_all_keys_are_read(self):
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

    def test_missing_keys_and_a_missing_file_are_empty(self, tmp_path):
        assert parse({}) == parse({"id": None, "digest": None, "backend": None}) == Metadata()
        assert read_metadata(tmp_path) == Metadata()

    def test_requirements_of_the_own_backend_count(self):
        by_backend = {"general": ["einops"], "cuda": ["nvidia-cutlass-dsl"], "xpu": ["onednn"]}
        found = parse({"python-depends": by_backend, "backend": {"type": "cuda"}})
        assert found.python_depends == ("einops", "nvidia-cutlass-dsl")

    def test_metadata_is_hashable(self):
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
    def test_value_of_a_wrong_type_is_refused(self, content, message):
        with pytest.raises(ValueError) as caught:  # noqa: PT011 (the whole message is compared)
            parse(content)
        assert str(caught.value) == f"metadata.json: {message}"

    @pytest.mark.parametrize(
        "name",
        ["/etc/passwd", "../up.py", "a/../../b", "..\\up.py", "C:\\x", "\\\\host\\x", ""],
    )
    def test_digest_lists_only_paths_inside_the_variant(self, name):
        with pytest.raises(ValueError, match=r'"digest.files": expected paths inside the variant'):
            parse({"digest": {"algorithm": "sha256", "files": {name: "x"}}})

    @pytest.mark.parametrize(
        "data",
        [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"version": ' + b"1" * 5000 + b"}", b"nul"],
    )
    def test_corrupt_file_is_refused(self, tmp_path, data):
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
    def test_dependency_has_a_version_or_a_revision(self, entry, wanted):
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
    def test_malformed_dependency_is_refused(self, value, message):
        with pytest.raises(ValueError, match=message):
            parse({"kernel-depends": value})


class TestFuzz:
    @settings(max_examples=150)
    @given(json_values | nearly_right)
    def test_any_json_is_metadata_or_a_value_error(self, content):
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
    def test_any_bytes_are_metadata_or_a_value_error(self, data):
        metadata = parse_or_message(data)
        assert isinstance(metadata, Metadata) or metadata.startswith("metadata.json: ")
