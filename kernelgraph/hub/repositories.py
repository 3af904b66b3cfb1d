"""Repository objects: the values of a kernel mapping, each of which loads one hub layer."""

from __future__ import annotations

import os
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
from kernelgraph.hub.kernels import load_from_disk, load_from_hub
from kernelgraph.hub.lockfile import Locks, find_locks
from kernelgraph.hub.trust import Trust, parse_trust
from kernelgraph.selection import Target, type_name

if TYPE_CHECKING:
    from torch import nn


_TAKE = {"layer_name": take_layer, "func_name": take_function}


@dataclass(frozen=True)
class KernelRepository:
    """The base class of repository objects: a kernel, and the name of one layer or function of it.

    Repository objects are immutable values: they can be compared, hashed, copied and pickled.
    """

    _member: ClassVar[str]
    """The field with the name of the layer or function."""

    def __post_init__(self) -> None:
        check_name(self._member, getattr(self, self._member))

    def load(self, target: Target | None = None) -> type[nn.Module]:
        """Load the hub layer.

        Args:
            target: The device that the layer is for; by default the accelerator that torch can use
                here, or else the cpu.

        Raises:
            FileNotFoundError: There is no such repository, or no variant in it that fits.
            ValueError: The kernel has no such layer, is not trusted, is for other devices, or is
                not what its metadata says.
            ImportError: The kernel's own code failed.
            OSError: The Hub could not be asked, or does not have the repository.
        """
        if target is not None and not isinstance(target, Target):
            raise TypeError(f"target: expected a Target or None, got {type_name(target)}")
        kernel = self._load_kernel(target or default_target())
        return _TAKE[self._member](kernel, getattr(self, self._member), self._source())

    def __str__(self) -> str:
        return f"{self._source()}: {getattr(self, self._member)}"

    def _load_kernel(self, target: Target) -> ModuleType:
        raise NotImplementedError

    def _source(self) -> str:
        """The repository as errors and reports show it."""
        raise NotImplementedError


@dataclass(frozen=True)
class _LocalRepository(KernelRepository):
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

    def _load_kernel(self, target: Target) -> ModuleType:
        return load_from_disk(
            self._path, target, shown=self._source(), package_name=self.package_name
        )

    def _source(self) -> str:
        return str(self.repo_path)


@dataclass(frozen=True)
class _HubRepository(KernelRepository):
    repo_id: str
    revision: str | None = field(default=None, kw_only=True)
    version: int | str | None = field(default=None, kw_only=True)
    trust_remote_code: Trust = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._wanted()  # checks the arguments
        object.__setattr__(self, "trust_remote_code", parse_trust(self.trust_remote_code))

    def _wanted(self) -> Wanted:
        return Wanted(self.repo_id, self.revision, self.version)

    def _load_kernel(self, target: Target) -> ModuleType:
        return load_from_hub(self._wanted(), target, trust_remote_code=self.trust_remote_code)

    def _source(self) -> str:
        return str(self._wanted())


@dataclass(frozen=True)
class LockedLayerRepository(KernelRepository):
    """A layer of a kernel repository on the Hub, at the commit that a lock file has for it.

    Args:
        repo_id: The repository, ``owner/name``.
        lockfile: The lock file, which is read now; by default the ``kernels.lock`` that the calling
            package was installed with, or else the one in the working directory.
        layer_name: The layer, a class in the kernel's ``layers``.
        trust_remote_code: As for `LayerRepository`.

    Raises:
        TypeError: An argument is of the wrong type.
        FileNotFoundError: There is no such lock file.
        ValueError: The lock file cannot be understood or does not have the repository, or a name
            is malformed.

    Example:
        >>> import kernelgraph as kg
        >>> repository = kg.LockedLayerRepository(
        ...     "kernels-community/activation", layer_name="SiluAndMul"
        ... )
        >>> print(repository)
        kernels-community/activation (locked): SiluAndMul
        >>> repository.load().__name__
        'SiluAndMul'
    """

    repo_id: str
    lockfile: str | os.PathLike[str] | None = field(default=None, kw_only=True, compare=False)
    layer_name: str = field(kw_only=True)
    trust_remote_code: Trust = field(default=False, kw_only=True)
    _locks: Locks = field(init=False, repr=False)
    _member = "layer_name"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_repo_id("repo_id", self.repo_id)
        object.__setattr__(self, "trust_remote_code", parse_trust(self.trust_remote_code))
        locks = find_locks(self.lockfile)
        locks.of(self.repo_id)  # raises if it is not locked
        object.__setattr__(self, "_locks", locks)

    def _load_kernel(self, target: Target) -> ModuleType:
        return load_from_hub(
            self._locks.of(self.repo_id).wanted,
            target,
            trust_remote_code=self.trust_remote_code,
            locks=self._locks,
        )

    def _source(self) -> str:
        return f"{self.repo_id} (locked)"


@dataclass(frozen=True)
class LocalLayerRepository(_LocalRepository):
    """A layer of a kernel repository on this machine, which is trusted as the user's own code.

    Args:
        repo_path: The repository, its ``build/``, or one variant in it. A relative path is made
            absolute now.
        package_name: The package in the variant; only older builds need it.
        layer_name: The layer, a class in the kernel's ``layers``.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: A name is empty.

    Example:
        >>> import kernelgraph as kg
        >>> repository = kg.LocalLayerRepository("examples/kernels", layer_name="RMSNorm")
        >>> print(repository)
        examples/kernels: RMSNorm
        >>> repository.load().__name__
        'RMSNorm'
    """

    layer_name: str = field(kw_only=True)
    _member = "layer_name"


@dataclass(frozen=True)
class LocalFuncRepository(_LocalRepository):
    """A function of a kernel repository on this machine, as a layer.

    Args:
        repo_path, package_name: As for `LocalLayerRepository`.
        func_name: The function, an attribute of the kernel module.

    Raises:
        TypeError, ValueError: As for `LocalLayerRepository`.

    Example:
        >>> import kernelgraph as kg
        >>> repository = kg.LocalFuncRepository("examples/kernels", func_name="silu_and_mul")
        >>> print(repository)
        examples/kernels: silu_and_mul
        >>> repository.load().__name__
        'silu_and_mul'
    """

    func_name: str = field(kw_only=True)
    _member = "func_name"


@dataclass(frozen=True)
class LayerRepository(_HubRepository):
    """A layer of a kernel repository on the Hub. No request is sent before `load`.

    Args:
        repo_id: The repository, ``owner/name``.
        layer_name: The layer, a class in the kernel's ``layers``.
        revision: A branch, a tag or a commit.
        version: ``N`` for the branch ``v<N>``; or a PEP 440 specifier such as ``">=0.1,<0.2"``,
            for the highest of the tags ``v<major>.<minor>.<patch>`` that fits.
        trust_remote_code: Whether to run the repository's code even if the Hub does not call its
            owner a trusted publisher: True, or a list of the repository ids that are trusted.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: ``repo_id`` or ``version`` is malformed, a name is empty, or both ``revision``
            and ``version`` are given.

    Example:
        >>> import kernelgraph as kg
        >>> repository = kg.LayerRepository(
        ...     "kernels-community/activation", layer_name="SiluAndMul", version=1
        ... )
        >>> print(repository)
        kernels-community/activation version 1: SiluAndMul
        >>> repository.load().__name__
        'SiluAndMul'
    """

    layer_name: str = field(kw_only=True)
    _member = "layer_name"


@dataclass(frozen=True)
class FuncRepository(_HubRepository):
    """A function of a kernel repository on the Hub, as a layer.

    Args:
        repo_id, revision, version, trust_remote_code: As for `LayerRepository`.
        func_name: The function, an attribute of the kernel module.

    Raises:
        TypeError, ValueError: As for `LayerRepository`.

    Example:
        >>> import kernelgraph as kg
        >>> repository = kg.FuncRepository(
        ...     "kernels-community/activation", func_name="silu_and_mul", version=">=0.1"
        ... )
        >>> print(repository)
        kernels-community/activation version >=0.1: silu_and_mul
        >>> repository.load().__name__
        'silu_and_mul'
    """

    func_name: str = field(kw_only=True)
    _member = "func_name"
