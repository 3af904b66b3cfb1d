"""Repository objects: what a mapping holds, and what `kernelize` loads hub layers from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, ClassVar

from kernelgraph.builds import (
    Wanted,
    check_name,
    check_repo_id,
    default_target,
    take_function,
    take_layer,
)
from kernelgraph.hub.kernels import load, load_from_disk
from kernelgraph.hub.lockfile import Locks, find_locks
from kernelgraph.hub.trust import allowed
from kernelgraph.selection import Target, type_name

if TYPE_CHECKING:
    from torch import nn


_TAKE = {"layer_name": take_layer, "func_name": take_function}


@dataclass(frozen=True)
class Repository:
    """What all kinds have in common: a kernel from somewhere, and one thing to take of it."""

    _member: ClassVar[str]
    """The field that names what is taken."""

    def __post_init__(self) -> None:
        check_name(self._member, getattr(self, self._member))

    def load(self, target: Target | None = None) -> type[nn.Module]:
        """The hub layer.

        Args:
            target: The device that it is for; by default the accelerator that torch can use here,
                or else the cpu.

        Raises:
            FileNotFoundError: There is no such repository, or no variant in it that fits.
            ValueError: The kernel has no such layer, may not be run, is for other devices, or is
                not what its metadata says.
            ImportError: The kernel's own code failed.
            OSError: The Hub could not be asked, or does not have it.
        """
        if target is not None and not isinstance(target, Target):
            raise TypeError(f"target: expected a Target or None, got {type_name(target)}")
        kernel = self._kernel(target or default_target())
        return _TAKE[self._member](kernel, getattr(self, self._member), self._where())

    def __str__(self) -> str:
        return f"{self._where()}: {getattr(self, self._member)}"

    def _kernel(self, target: Target) -> ModuleType:
        raise NotImplementedError

    def _where(self) -> str:
        raise NotImplementedError


@dataclass(frozen=True)
class _Local(Repository):
    repo_path: str | os.PathLike[str] = field(compare=False)
    package_name: str | None = field(default=None, kw_only=True)
    _path: Path = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.repo_path, (str, os.PathLike)):
            raise TypeError(f"repo_path: expected a path, got {type_name(self.repo_path)}")
        if self.package_name is not None:
            check_name("package_name", self.package_name)
        # Absolute now, so that a later chdir does not make it another repository.
        path = Path(os.path.abspath(os.path.expanduser(self.repo_path)))
        object.__setattr__(self, "_path", path)

    def _kernel(self, target: Target) -> ModuleType:
        return load_from_disk(
            self._path, target, shown=self._where(), package_name=self.package_name
        )

    def _where(self) -> str:
        return str(self.repo_path)


@dataclass(frozen=True)
class _Hub(Repository):
    repo_id: str
    revision: str | None = field(default=None, kw_only=True)
    version: int | str | None = field(default=None, kw_only=True)
    trust_remote_code: bool | Sequence[str] = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._wanted()
        object.__setattr__(self, "trust_remote_code", allowed(self.trust_remote_code))

    def _wanted(self) -> Wanted:
        return Wanted(self.repo_id, self.revision, self.version)

    def _kernel(self, target: Target) -> ModuleType:
        return load(self._wanted(), target, trust_remote_code=self.trust_remote_code)

    def _where(self) -> str:
        return str(self._wanted())


@dataclass(frozen=True)
class LockedLayerRepository(Repository):
    """A layer of a kernel repository on the Hub, at the commit that a lock file has for it.

    Args:
        repo_id: The repository, ``owner/name``.
        lockfile: The lock file, read now; by default the ``kernels.lock`` that the calling package
            was installed with, or else the one in the working directory.
        layer_name: The layer, a class in the kernel's ``layers``.
        trust_remote_code: As for `LayerRepository`.

    Raises:
        TypeError: An argument is of the wrong type.
        FileNotFoundError: There is no such lock file.
        ValueError: The lock file cannot be understood, or has no such repository; or a name is
            malformed.
    """

    repo_id: str
    lockfile: str | os.PathLike[str] | None = field(default=None, kw_only=True, compare=False)
    layer_name: str = field(kw_only=True)
    trust_remote_code: bool | Sequence[str] = field(default=False, kw_only=True)
    _locks: Locks = field(init=False, repr=False)
    _member = "layer_name"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_repo_id("repo_id", self.repo_id)
        object.__setattr__(self, "trust_remote_code", allowed(self.trust_remote_code))
        locks = find_locks(self.lockfile)
        locks.of(self.repo_id)
        object.__setattr__(self, "_locks", locks)

    def _kernel(self, target: Target) -> ModuleType:
        return load(
            self._locks.of(self.repo_id).wanted,
            target,
            trust_remote_code=self.trust_remote_code,
            locks=self._locks,
        )

    def _where(self) -> str:
        return f"{self.repo_id} (locked)"


@dataclass(frozen=True)
class LocalLayerRepository(_Local):
    """A layer of a kernel repository on this machine, which is taken for the user's own code.

    Args:
        repo_path: The repository, its ``build/``, or one variant in it. A relative path is taken
            from where the process is now.
        package_name: The package in the variant; older builds only.
        layer_name: The layer, a class in the kernel's ``layers``.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: A name is empty.
    """

    layer_name: str = field(kw_only=True)
    _member = "layer_name"


@dataclass(frozen=True)
class LocalFuncRepository(_Local):
    """A function of a kernel repository on this machine, as a layer.

    Args:
        repo_path, package_name: As for `LocalLayerRepository`.
        func_name: The function, an attribute of the kernel module.

    Raises:
        TypeError, ValueError: As for `LocalLayerRepository`.
    """

    func_name: str = field(kw_only=True)
    _member = "func_name"


@dataclass(frozen=True)
class LayerRepository(_Hub):
    """A layer of a kernel repository on the Hub. Nothing is asked of the Hub before ``load``.

    Args:
        repo_id: The repository, ``owner/name``.
        layer_name: The layer, a class in the kernel's ``layers``.
        revision: A branch, a tag or a commit.
        version: ``N`` for the branch ``v<N>``; or a PEP 440 specifier such as ``">=0.1,<0.2"``,
            for the highest of the tags ``v<major>.<minor>.<patch>`` that fits.
        trust_remote_code: Whether the repository's code may be run: True, or a list of the
            repository ids that are trusted.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: ``repo_id`` or ``version`` is malformed, a name is empty, or both ``revision``
            and ``version`` are given.
    """

    layer_name: str = field(kw_only=True)
    _member = "layer_name"


@dataclass(frozen=True)
class FuncRepository(_Hub):
    """A function of a kernel repository on the Hub, as a layer.

    Args:
        repo_id, revision, version, trust_remote_code: As for `LayerRepository`.
        func_name: The function, an attribute of the kernel module.

    Raises:
        TypeError, ValueError: As for `LayerRepository`.
    """

    func_name: str = field(kw_only=True)
    _member = "func_name"
