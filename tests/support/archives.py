"""Saved programs for tests, and copies of them with changed parts."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim

from kernelgraph import Mode, export, kernelize
from tests.support.exporting import scales
from tests.support.toy_models import Chain

TRUSTED = {"trust_remote_code": True}


def exported(repository: Any, strict: bool = False) -> Any:
    """Export a `Chain` with the kernels of ``repository``."""
    torch.manual_seed(0)
    model = Chain(4).eval()
    with scales(repository):
        dynamic = ({0: Dim.AUTO},)
        x = torch.randn(3, 4)
        return export(model, (x,), mode=Mode.INFERENCE, dynamic_shapes=dynamic, strict=strict)


def expected(repository: Any, x: torch.Tensor) -> torch.Tensor:
    """Return the result of the same model, kernelized."""
    torch.manual_seed(0)
    with scales(repository), torch.no_grad():
        result: torch.Tensor = kernelize(Chain(4).eval(), mode=Mode.INFERENCE)(x)
        return result


def with_parts(path: Path, change: Callable[[str, bytes], bytes | None]) -> Path:
    """Copy an archive with changed parts, without those that ``change`` returns None for."""
    made = path.with_name(f"changed-{path.name}")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(made, "w") as new:
        for name in old.namelist():
            content = change(name, old.read(name))
            if content is not None:
                new.writestr(name, content)
    return made


def with_manifest(path: Path, change: Callable[[Any], object]) -> Path:
    """Copy an archive with its manifest changed, and a digest that fits."""
    manifest: dict[str, bytes] = {}

    def changed(name: str, content: bytes) -> bytes:
        if name.endswith("kernelgraph/manifest.json"):
            data = json.loads(content)
            change(data)
            content = manifest["now"] = json.dumps(data).encode()
        if name.endswith("kernelgraph/manifest.sha256"):
            content = hashlib.sha256(manifest["now"]).hexdigest().encode()
        return content

    return with_parts(path, changed)
