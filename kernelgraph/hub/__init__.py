"""TODO."""

from kernelgraph.hub.client import REPO_TYPES, Hub, Resolved, cache_alone
from kernelgraph.hub.fetcher import compare, content_digest, list_build, read_remote_metadata
from kernelgraph.hub.finder import Finder
from kernelgraph.hub.kernels import (
    check,
    check_on_disk,
    get_kernel,
    get_local_kernel,
    get_locked_kernel,
    has_kernel,
)
from kernelgraph.hub.lockfile import LOCKFILE, Lock, Locks, find_locks, lock, read_dependencies
from kernelgraph.hub.repositories import (
    FuncRepository,
    LayerRepository,
    LocalFuncRepository,
    LocalLayerRepository,
    LockedLayerRepository,
    Repository,
)
from kernelgraph.hub.resolver import list_versions, resolve
from kernelgraph.hub.trust import Trust, allowed, check_trust

__all__ = [
    "LOCKFILE",
    "REPO_TYPES",
    "Finder",
    "FuncRepository",
    "Hub",
    "LayerRepository",
    "LocalFuncRepository",
    "LocalLayerRepository",
    "Lock",
    "LockedLayerRepository",
    "Locks",
    "Repository",
    "Resolved",
    "Trust",
    "allowed",
    "cache_alone",
    "check",
    "check_on_disk",
    "check_trust",
    "compare",
    "content_digest",
    "find_locks",
    "get_kernel",
    "get_local_kernel",
    "get_locked_kernel",
    "has_kernel",
    "list_build",
    "list_versions",
    "lock",
    "read_dependencies",
    "read_remote_metadata",
    "resolve",
]
