"""Kernel repositories on the Hub: which commit is meant, whether it is trusted, and its files.

`client` sends the requests and knows the cache. `resolver` finds the commit of a revision or
version, `trust` decides whether its code may be run, `fetcher` puts the files of one variant into
the cache, and `lockfile` pins commits and contents. `finder` makes these the one way from a
repository id to files. `kernels` has the functions that find, fetch, check and import a kernel, and
`repositories` the objects that a mapping holds. Once a build is on the disk, `kernelgraph.builds`
checks and imports it.

Invariants:
    - No code of a repository is downloaded before the user or the Hub trusts its commit.
    - No code of a kernel is run before all its files and those of the kernels that it uses are
      checked.
    - At every load each file of the variant is what the Hub lists, and with a lock file that has
      digests also what was locked. Offline and without a listing in the cache, only the digest in
      the metadata is checked, and a lock with digests stops the load.
    - A kernel is loaded from one commit, also if its branch or tag moves during the load.
    - Each request has a time limit, and each error in one names the repository.
    - Offline, a revision or version means the commit that it meant when the Hub last answered.
    - A repair deletes a variant's directory and its commit's listing in the cache, never the target
      of a link and nothing outside of the cache.
    - Importing this wing imports neither torch nor huggingface_hub.
"""

from kernelgraph.hub.client import REPO_TYPES, Hub, Resolved, cache_only
from kernelgraph.hub.fetcher import content_digest, find_damage, list_build, read_remote_metadata
from kernelgraph.hub.finder import Finder
from kernelgraph.hub.kernels import (
    check_kernel,
    check_local_kernel,
    get_kernel,
    get_local_kernel,
    get_locked_kernel,
    has_kernel,
)
from kernelgraph.hub.lockfile import LOCKFILE, Lock, Locks, find_locks, lock, read_dependencies
from kernelgraph.hub.repositories import (
    FuncRepository,
    KernelRepository,
    LayerRepository,
    LocalFuncRepository,
    LocalLayerRepository,
    LockedLayerRepository,
)
from kernelgraph.hub.resolver import list_versions, resolve
from kernelgraph.hub.trust import Trust, check_trust, parse_trust

__all__ = [
    "LOCKFILE",
    "REPO_TYPES",
    "Finder",
    "FuncRepository",
    "Hub",
    "KernelRepository",
    "LayerRepository",
    "LocalFuncRepository",
    "LocalLayerRepository",
    "Lock",
    "LockedLayerRepository",
    "Locks",
    "Resolved",
    "Trust",
    "cache_only",
    "check_kernel",
    "check_local_kernel",
    "check_trust",
    "content_digest",
    "find_damage",
    "find_locks",
    "get_kernel",
    "get_local_kernel",
    "get_locked_kernel",
    "has_kernel",
    "list_build",
    "list_versions",
    "lock",
    "parse_trust",
    "read_dependencies",
    "read_remote_metadata",
    "resolve",
]
