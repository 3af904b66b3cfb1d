"""The cache on disk: it has whole values or none, whatever else happens to its directory."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernelgraph import cache


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    monkeypatch.setenv("KERNELGRAPH_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_complained", False)
    return tmp_path / "cache"


def file_of(directory: Path) -> Path:
    (path,) = directory.glob("*/*.json")
    return path


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(), values)
def test_a_value_is_read_as_it_was_written(key, value):
    """Any JSON value under any key is read as it was last written."""
    cache.write("kind", key, "before")
    cache.write("kind", key, value)
    assert cache.read("kind", key) == value


def test_values_of_other_kinds_and_keys_are_others():
    cache.write("a", "key", 1)
    cache.write("b", "key", 2)
    cache.write("a", "other", 3)
    assert [cache.read(*at) for at in (("a", "key"), ("b", "key"), ("a", "other"))] == [1, 2, 3]
    assert cache.read("b", "other") is None
    assert cache.entries() == {"a": 2, "b": 1}


def test_another_process_reads_a_value():
    cache.write("kind", "key", [1, "é"])
    program = "from kernelgraph import cache; print(cache.read('kind', 'key') == [1, 'é'])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


def test_the_cache_imports_neither_torch_nor_the_hub_client():
    program = (
        "import sys; from kernelgraph import cache; cache.write('k', 'k', 1); cache.read('k', 'k');"
        "print({'torch', 'huggingface_hub'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_the_directory_is_named_by_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("KERNELGRAPH_CACHE_DIR", "~/own")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.directory() == tmp_path / "own"
    monkeypatch.delenv("KERNELGRAPH_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.directory() == tmp_path / "xdg" / "kernelgraph"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache.directory() == tmp_path / ".cache" / "kernelgraph"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"[" * 100_000,
        b'{"value": 1}',
        b'{"form": 1, "key": "another", "value": 1}',
        b'{"form": 0, "key": "key", "value": 1}',
    ],
    ids=lambda content: repr(content[:20]),
)
def test_a_damaged_or_foreign_file_is_ignored_and_written_over(directory, content, caplog):
    cache.write("kind", "key", 1)
    path = file_of(directory)
    path.write_bytes(content)
    assert cache.read("kind", "key") is None
    assert cache.read("kind", "key") is None
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert record.getMessage().startswith(f"{path} in the cache is not what kernelgraph writes")
    cache.write("kind", "key", 2)
    assert cache.read("kind", "key") == 2


def test_nothing_is_kept_where_nothing_can_be_written(directory, caplog):
    directory.write_text("a file")  # root may write into any directory
    caplog.set_level(logging.DEBUG, "kernelgraph")
    cache.write("kind", "key", 1)
    assert cache.read("kind", "key") is None
    assert [r.levelno for r in caplog.records] == [logging.DEBUG] * 2
    assert cache.entries() == {}


@pytest.mark.skipif(os.name != "posix" or os.getuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory_is_read(directory):
    cache.write("kind", "key", 1)
    (directory / "kind").chmod(0o500)
    cache.write("kind", "key", 2)
    cache.write("kind", "other", 2)
    assert (cache.read("kind", "key"), cache.read("kind", "other")) == (1, None)
    (directory / "kind").chmod(0o700)


def test_nothing_is_kept_without_a_home_directory(monkeypatch):
    monkeypatch.delenv("KERNELGRAPH_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def home():
        raise RuntimeError

    monkeypatch.setattr(Path, "home", home)
    cache.write("kind", "key", 1)
    assert cache.read("kind", "key") is None
    with pytest.raises(FileNotFoundError, match="set KERNELGRAPH_CACHE_DIR"):
        cache.directory()


def test_a_value_that_is_not_json_is_an_error(directory):
    for value in ({1, 2}, float("nan")):
        with pytest.raises((TypeError, ValueError)):
            cache.write("kind", "key", value)
    assert not directory.exists()


def test_a_failed_write_leaves_the_old_value_and_nothing_else(directory, monkeypatch):
    cache.write("kind", "key", 1)

    def fails(source, target):
        raise OSError("full")

    monkeypatch.setattr(os, "replace", fails)
    cache.write("kind", "key", 2)
    assert cache.read("kind", "key") == 1
    assert os.listdir(directory / "kind") == [file_of(directory).name]


def test_clear_removes_values_and_what_killed_writers_left(directory):
    for kind, key in (("a", "1"), ("a", "2"), ("b", "1")):
        cache.write(kind, key, 0)
    (directory / "b" / f"{'0' * 32}killed.tmp").write_text("half")
    (directory / "own.txt").write_text("the user's")
    assert cache.clear("a") == 2
    assert cache.entries() == {"b": 1}
    assert cache.clear() == 1
    assert cache.clear() == 0
    assert sorted(p.name for p in directory.rglob("*") if p.is_file()) == ["own.txt"]


# --- threads and processes -----------------------------------------------------------------------

BIG = 20_000


def test_threads_write_and_read_whole_values():
    found = []

    def work(number: int) -> None:
        for _ in range(30):
            cache.write("kind", "key", [number] * BIG)
            found.append(cache.read("kind", "key"))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 120
    assert all(len(value) == BIG and len(set(value)) == 1 for value in found)


def test_processes_write_and_read_whole_values(directory):
    program = f"""
import sys
from kernelgraph import cache
for _ in range(50):
    cache.write("kind", "key", [int(sys.argv[1])] * {BIG})
    value = cache.read("kind", "key")
    assert len(value) == {BIG} and len(set(value)) == 1
"""
    running = [
        subprocess.Popen([sys.executable, "-c", program, str(n)], stderr=subprocess.PIPE, text=True)
        for n in range(3)
    ]
    errors = [process.communicate()[1] for process in running]
    assert [process.returncode for process in running] == [0] * 3, errors
    assert len(set(json.loads(file_of(directory).read_text())["value"])) == 1
    assert len(os.listdir(directory / "kind")) == 1


# --- within a process ----------------------------------------------------------------------------


def test_a_full_table_is_emptied_before_it_grows():
    known: dict[int, str] = {}
    for number in range(3):
        cache.remember(known, number, str(number), most=3)
    assert known == {0: "0", 1: "1", 2: "2"}
    cache.remember(known, 3, "3", most=3)
    assert known == {3: "3"}
