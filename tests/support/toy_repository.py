"""Small kernel repositories for tests, as directories and as the files of a commit."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from kernelgraph.builds import digest_files

METADATA: Mapping[str, object] = {
    "id": "_toy_1",
    "name": "toy",
    "version": 1,
    "license": "apache-2.0",
}

LAYERS = """
import torch
from torch import nn

class {layer}(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + {result}
"""


def layer_files(layer: str = "Add", result: int = 1) -> dict[str, str | bytes]:
    """The files of a kernel with one layer, which adds ``result`` to show which kernel ran."""
    return {
        "__init__.py": f"from . import layers\nRESULT = {result}\n",
        "layers.py": LAYERS.format(layer=layer, result=result),
    }


def write_repository(
    path: Path,
    files: Mapping[str, str | bytes] | None = None,
    *,
    variant: str = "torch-universal",
    metadata: Mapping[str, object] | None = METADATA,
    digest: bool = True,
) -> Path:
    """Write one variant of a kernel repository, and return the variant's directory.

    An earlier variant of this name is replaced, other variants in ``path`` stay. If ``metadata`` is
    None there is no ``metadata.json``; with ``digest`` it lists the files' digests.
    """
    directory = path / "build" / variant
    shutil.rmtree(directory, ignore_errors=True)
    for name, content in (layer_files() if files is None else files).items():
        file = directory / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    directory.mkdir(parents=True, exist_ok=True)
    if metadata is not None:
        listed = dict(metadata)
        if digest:
            listed["digest"] = {"algorithm": "sha256", "files": digest_files(directory)}
        (directory / "metadata.json").write_text(json.dumps(listed))
    return directory


def variant_files(
    files: Mapping[str, str | bytes] | None = None,
    *,
    variant: str = "torch-universal",
    metadata: Mapping[str, object] | None = METADATA,
    digest: bool = True,
) -> dict[str, bytes]:
    """The files that `write_repository` writes, as those of a commit."""
    with tempfile.TemporaryDirectory() as directory:
        write_repository(Path(directory), files, variant=variant, metadata=metadata, digest=digest)
        return {
            path.relative_to(directory).as_posix(): path.read_bytes()
            for path in Path(directory).rglob("*")
            if path.is_file()
        }
