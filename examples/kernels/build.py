"""Builds the kernel repository in this folder: ``python examples/kernels/build.py [--force]``.

Makes ``build/<variant>/`` for the CPU, compiled for the torch that runs this, and for CUDA, where
Triton compiles at run time. Needs torch and a C++ compiler, nothing else. What is up to date is
left alone.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import errno
import hashlib
import json
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
NAME = "decoder-layers"
PATIENCE_S = 2.0
"""A build that takes longer than this announces itself."""


@dataclass(frozen=True)
class Variant:
    """One build to make: the Python files of ``package`` and what ``sources`` compile to."""

    name: str
    backend: str
    package: Path
    sources: tuple[Path, ...] = ()
    compiler: str = ""
    compiler_version: str = ""
    flags: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """Unique by content; also the namespace of the kernels' torch ops."""
        state = hashlib.sha256()
        for path in self.inputs():
            content = path.read_bytes()
            state.update(f"{path.relative_to(HERE).as_posix()}:{len(content)}:".encode())
            state.update(content)
        # A noarch variant is the same whatever torch it was made with.
        made_with = [torch.__version__, self.compiler_version, *self.flags] if self.sources else []
        state.update(json.dumps([self.name, made_with]).encode())
        return f"{NAME.replace('-', '_')}_{self.backend}_{state.hexdigest()[:10]}"

    def inputs(self) -> list[Path]:
        headers = sorted({header for s in self.sources for header in s.parent.glob("*.h")})
        return [*sorted(self.package.glob("*.py")), *self.sources, *headers]


def build(
    root: Path | str = HERE,
    force: bool = False,
    progress: Callable[[str], None] = print,
    backends: Iterable[str] = ("cpu", "cuda"),
) -> Path:
    """Make ``root/build/`` and return ``root``, the kernel repository.

    Args:
        root: Where to put it; the sources are those beside this file.
        force: Build also what is up to date.
        progress: OutputSpec in one line when a build takes longer than two seconds.
        backends: What to build; for cuda alone no C++ compiler is needed.

    Raises:
        RuntimeError: There is no C++ compiler, or it refused a source; the message says which.
    """
    root = Path(root)
    for backend in backends:
        variant = VARIANTS[backend]()
        directory = root / "build" / variant.name
        if not force and is_up_to_date(directory, variant.id):
            continue
        line = f"building {directory} (once; about 20 seconds on two cores)"
        timer = threading.Timer(PATIENCE_S, progress, [line])
        timer.start()
        try:
            make(variant, directory)
        finally:
            timer.cancel()
    return root


def cuda_variant() -> Variant:
    return Variant("torch-cuda", "cuda", HERE / "decoder_cuda")


def cpu_variant() -> Variant:
    major, minor = torch.__version__.split(".")[:2]
    machine = platform.machine().lower()
    arch = {"arm64": "aarch64", "amd64": "x86_64"}.get(machine, machine)
    system = platform.system().lower()
    abi = "-cxx11" if system == "linux" and torch.compiled_with_cxx11_abi() else ""
    compiler, compiler_version, flags = find_compiler()
    return Variant(
        f"torch{major}{minor}{abi}-cpu-{arch}-{system}",
        "cpu",
        HERE / "decoder_cpu",
        tuple(sorted((HERE / "csrc").glob("*.cpp"))),
        compiler,
        compiler_version,
        flags,
    )


VARIANTS = {"cpu": cpu_variant, "cuda": cuda_variant}


def find_compiler() -> tuple[str, str, tuple[str, ...]]:
    """The C++ compiler, its version, and its flags as far as they don't depend on the paths."""
    names = (os.environ.get("CXX"), "g++", "clang++", "c++")
    compiler = next((found for n in names if n and (found := shutil.which(n))), None)
    if compiler is None:
        raise RuntimeError(
            "building the CPU kernels needs a C++ compiler, and there is none on PATH: install "
            "g++ (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: "
            "xcode-select --install), or set CXX"
        )
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    flags = ["-std=c++20", "-O3", "-fPIC", "-Wall", "-Wno-unknown-pragmas"]
    if "Free Software Foundation" in version:
        # For at::parallel_for, which is compiled in here. Not for clang, whose OpenMP runtime is
        # another one than torch's: its build runs on one thread.
        flags.append("-fopenmp")
    if torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        flags += ["-mavx2", "-mfma", "-mf16c", "-DCPU_CAPABILITY_AVX2", "-DCPU_CAPABILITY=AVX2"]
    else:
        flags += ["-DCPU_CAPABILITY_DEFAULT", "-DCPU_CAPABILITY=DEFAULT"]
    return compiler, version.partition("\n")[0], tuple(flags)


def make(variant: Variant, directory: Path) -> None:
    """Build beside ``directory`` and move the result there in one step."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=directory.parent) as scratch:
        new = Path(scratch, "new")
        shutil.copytree(variant.package, new, ignore=lambda _, names: _all_but_python(names))
        if variant.sources:
            compile_library(variant, Path(scratch), new / "decoder_layers.so")
        metadata = {
            "id": variant.id,
            "name": NAME,
            "version": 1,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": variant.backend},
            "digest": {"algorithm": "sha256", "files": digest_files(new)},
        }
        (new / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
        replace(directory, new, Path(scratch), variant.id)


def replace(directory: Path, new: Path, scratch: Path, variant_id: str) -> None:
    """Put ``new`` in the place of ``directory``, though other processes may be doing the same."""
    for attempt in range(100):
        with contextlib.suppress(FileNotFoundError):
            directory.rename(scratch / f"old{attempt}")
        try:
            new.rename(directory)
            return
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
        # Another process was faster. What it built of the same sources is as good.
        if is_up_to_date(directory, variant_id):
            return
    raise RuntimeError(f"other processes keep writing {directory}")


def _all_but_python(names: list[str]) -> list[str]:
    return [name for name in names if not name.endswith(".py")]


def compile_library(variant: Variant, scratch: Path, library: Path) -> None:
    """Compile each source by itself, side by side, and link the results into ``library``."""
    torch_home = Path(torch.__file__).parent
    include = [torch_home / "include", torch_home / "include/torch/csrc/api/include"]
    common = [
        *(variant.compiler, *variant.flags, f"-DKERNEL_NAMESPACE={variant.id}"),
        *(argument for path in include for argument in ("-isystem", str(path))),
    ]
    objects = [scratch / f"{source.stem}.o" for source in variant.sources]
    commands = [
        [*common, "-c", str(source), "-o", str(target)]
        for source, target in zip(variant.sources, objects, strict=True)
    ]
    with ThreadPoolExecutor() as pool:
        list(pool.map(_run, commands))
    # No -fopenmp here: the OpenMP functions are found at run time in the runtime that torch uses.
    # Linking the compiler's own would make it two runtimes with two thread pools.
    libraries = [f"-L{torch_home / 'lib'}", "-ltorch_cpu", "-lc10"]
    undefined = ["-undefined", "dynamic_lookup"] if platform.system() == "Darwin" else []
    _run(
        [
            *(variant.compiler, "-shared", *undefined),
            *map(str, objects),
            *libraries,
            *("-o", str(library)),
        ]
    )


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the compiler failed: {' '.join(command)}\n{done.stderr.strip()}")


def is_up_to_date(directory: Path, variant_id: str) -> bool:
    """Whether ``directory`` is a whole, unchanged build of that id."""
    try:
        metadata = json.loads((directory / "metadata.json").read_text())
        files: dict[str, str] = metadata["digest"]["files"]
        return bool(metadata["id"] == variant_id and files == digest_files(directory))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def digest_files(directory: Path) -> dict[str, str]:
    """The base64 SHA-256 of each file but ``metadata.json`` and Python's bytecode."""
    return {
        path.relative_to(directory).as_posix(): base64.b64encode(
            hashlib.sha256(path.read_bytes()).digest()
        ).decode()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != "metadata.json" and "__pycache__" not in path.parts
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--force", action="store_true", help="build also what is up to date")
    print(build(force=parser.parse_args().force) / "build")
