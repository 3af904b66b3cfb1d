"""One cache with many processes and threads, and with a process that was killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

from kernelgraph import get_kernel
from kernelgraph.hub.client import Hub, Resolved
from kernelgraph.hub.fetcher import find_damage, list_build
from tests.support.toy_repository import layer_files, variant_files

FILES = {**layer_files(), **{f"data/{i}.bin": bytes([i]) * 5000 for i in range(6)}}

# torch is imported once, before the processes fork; each process has its own client.
SCRIPT = """
import json, os, sys, threading
import torch, huggingface_hub.hf_api
from kernelgraph import get_kernel

processes, threads = map(int, sys.argv[1:])
start = threading.Event()
results = []

def load():
    start.wait()
    try:
        kernel = get_kernel("org/toy", version=1)
        results.append([kernel.RESULT, kernel.layers.Add().forward(1), kernel.__name__])
    except BaseException as error:
        results.append(repr(error))

for _ in range(processes):
    if processes == 1 or os.fork() == 0:
        workers = [threading.Thread(target=load) for _ in range(threads)]
        for worker in workers: worker.start()
        start.set()
        for worker in workers: worker.join()
        os.write(1, (json.dumps(results) + "\\n").encode())
        os._exit(0)
for _ in range(processes):
    os.wait()
"""


@pytest.fixture
def kernel(hub):
    hub.organisation("org", trusted=True)
    commit = hub.repository("org/toy").commit(variant_files(FILES), branch="v1")
    return Resolved("org/toy", "kernel", commit)


def start(hub, *arguments):
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", SCRIPT, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def check_cache(kernel, tmp_path):
    """The variant in the cache is whole, and there are no temporary files."""
    hub = Hub()
    directory = hub.snapshot(kernel) / "build/torch-universal"
    assert not find_damage(directory, list_build(hub, kernel)["torch-universal"])[0]
    assert not [
        path for path in Path(tmp_path).rglob("*") if path.suffix in (".tmp", ".incomplete")
    ]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_processes_with_threads_share_a_cold_cache(hub, kernel, tmp_path):
    output, _ = start(hub, 8, 4).communicate(timeout=120)
    results = [result for line in output.splitlines() for result in json.loads(line)]
    assert len(results) == 32
    assert {tuple(result) for result in results} == {(1, 2, results[0][2])}
    downloads = Counter(request for request in hub.asked() if request.startswith("GET /kernels"))
    assert set(downloads.values()) == {1}, "no file is downloaded twice"
    assert len(downloads) == len(FILES) + 1
    check_cache(kernel, tmp_path)


@pytest.mark.parametrize("place", ["/tree/", "data/3.bin", "layers.py"])
def test_killed_process_leaves_a_cache_that_the_next_one_repairs(hub, kernel, tmp_path, place):
    reached = threading.Event()

    def look(method, path):
        if place in path and method == "GET":
            reached.set()

    hub.hooks.append(look)
    hub.fault("stall", place, method="GET")
    process = start(hub, 1, 1)
    assert reached.wait(60)
    process.kill()
    process.communicate(timeout=60)
    hub.faults.clear()
    kernel_module = get_kernel("org/toy", version=1)
    assert (kernel_module.RESULT, kernel_module.layers.Add().forward(1)) == (1, 2)
    for leftover in Path(tmp_path).rglob("*.incomplete"):
        leftover.unlink()  # the killed process left it, and nothing reads it
    check_cache(kernel, tmp_path)


def test_threads_repair_a_damaged_cache_together(hub, kernel, tmp_path):
    get_kernel("org/toy", version=1)
    directory = Hub().snapshot(kernel) / "build/torch-universal"
    (directory / "layers.py").resolve().write_text("poison")
    (directory / "data/1.bin").unlink()
    results = []

    def load():
        results.append(get_kernel("org/toy", version=1).RESULT)

    workers = [threading.Thread(target=load) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert results == [1] * 8
    check_cache(kernel, tmp_path)


def test_one_process_at_a_time_downloads_a_repository(hub, kernel):
    """While one downloads, no other asks for a file of the repository."""
    others, interfered = [], threading.Event()

    def look(method, path):
        if "layers.py" not in path:
            return
        if others:
            interfered.set()
        elif method == "GET":
            others.append(threading.Thread(target=get_kernel, args=["org/toy"], kwargs=wanted))
            others[0].start()
            interfered.wait(0.3)

    wanted = {"version": 1}
    hub.hooks.append(look)
    assert get_kernel("org/toy", **wanted).RESULT == 1
    others[0].join()
    assert not interfered.is_set()
