"""Versions: the tag that a specifier picks, and the values that are refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernelgraph.builds.wanted import check_version, pick, tag_version

TAGS = ["v0.0.3", "v0.0.10", "v0.1.0", "v0.2.0rc1", "main", "v1", "v0.5", "0.0.9", "v0.0.11x"]


@pytest.mark.parametrize(
    ("specifier", "tag"),
    [
        (">=0.0.3", "v0.1.0"),
        (">=0.0.3,<0.1.0", "v0.0.10"),
        ("==0.0.3", "v0.0.3"),
        ("~=0.0.3", "v0.0.10"),
        ("!=0.1.0", "v0.0.10"),
        (">=0.2.0rc1", "v0.2.0rc1"),
        (">0.1.0", None),
        ("<0.0.1", None),
    ],
)
def test_highest_tag_that_fits_is_picked(specifier, tag):
    assert pick(TAGS, specifier) == tag
    assert pick(reversed(TAGS), specifier) == tag


def test_prerelease_is_picked_only_where_the_specifier_mentions_one():
    assert pick(["v1.0.0rc1"], ">=0.1") is None
    assert pick(["v1.0.0rc1"], "==1.0.0rc1") == "v1.0.0rc1"


numbers = st.tuples(*[st.integers(0, 12)] * 3)


@given(st.lists(numbers, unique=True), numbers, numbers)
def test_highest_tag_within_any_bounds_is_picked(versions, low, high):
    def shown(version):
        return ".".join(map(str, version))

    fitting = [version for version in versions if low <= version < high]
    expected = f"v{shown(max(fitting))}" if fitting else None
    tags = [f"v{shown(version)}" for version in versions]
    assert pick(tags, f">={shown(low)},<{shown(high)}") == expected


@given(st.text())
def test_any_text_is_read_as_a_tag_without_an_error(tag):
    tag_version(tag)
    tag_version(f"v1.2.3{tag}")


@pytest.mark.parametrize("version", [0, 1, 17, ">=0.0.4,<0.1.0", "==1.*", "~=1.2"])
def test_version_number_or_specifier_passes(version):
    check_version(version)


@pytest.mark.parametrize("version", ["", " ", "1", "v1", "latest", ">=", ">=1,<"])
def test_malformed_specifier_is_refused(version):
    with pytest.raises(ValueError, match=r'expected an int or a version specifier such as ">=0.1'):
        check_version(version)


def test_negative_version_is_refused():
    with pytest.raises(ValueError, match=r"^version: expected 0 or more, got -1$"):
        check_version(-1)


@pytest.mark.parametrize("version", [True, 1.0, b">=1", None])
def test_version_of_a_wrong_type_is_refused(version):
    with pytest.raises(TypeError, match=r"^version: expected an int or a version specifier, got"):
        check_version(version)
