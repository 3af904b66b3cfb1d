"""One build of a kernel on a disk: which one is wanted, whether it fits, its check and its import.

`wanted` names a revision of a repository. `variants` chooses among the builds of that revision by
their names. `metadata` parses the ``metadata.json`` of the chosen one, `digests` compares its files
with the digests there, and `requirements` compares its archs and Python packages with this machine.
`check` makes all of these checks in order (`check_variant`), and `importer` imports the result
(`import_checked`). `hub_layers` takes layers and functions out of the imported kernel, and finds
the origin of a layer, also of one that the ``kernels`` package has loaded. Everything here works on
files on a disk; `kernelgraph.hub` finds and downloads them.

Invariants:
    - No code of a kernel runs before all checks of its variant, and of the kernels that it uses,
      have passed.
    - The only files of a kernel that are imported are those that were checked. A source that has
      changed since is refused, and bytecode is neither read nor written.
    - A link that leads out of the variant is refused, except into the blobs of huggingface_hub's
      cache, and a digest lists no path that leads out.
    - A kernel's module has a name of our own that contains the hash of its content and of the
      kernels that it uses: equal content is imported once, other content gets another name, and no
      kernel shadows another module.
    - After a failed import nothing of the kernel is left in ``sys.modules``.
    - A kernel that we or the ``kernels`` package loaded has its full commit, or the hash of its
      whole content, as the revision of its origin.
    - The error for a build that is refused, or whose import fails, names the repository and the
      variant.
    - Importing this wing imports neither torch nor huggingface_hub.
"""

from kernelgraph.builds.check import (
    Checked,
    Origin,
    builds_at,
    check_variant,
    default_target,
    variant_at,
)
from kernelgraph.builds.digests import (
    UNLISTED,
    content_hash,
    digest_files,
    encoded_digest,
    files_in,
    hash_files,
    is_bytecode,
    verify,
)
from kernelgraph.builds.hub_layers import (
    load_foreign,
    origin_of,
    take_function,
    take_layer,
)
from kernelgraph.builds.importer import (
    get_kernel_dep,
    import_checked,
    module_kernel,
)
from kernelgraph.builds.metadata import (
    METADATA,
    Metadata,
    leads_out,
    read_metadata,
    read_wanted,
)
from kernelgraph.builds.requirements import (
    OtherDevice,
    check_archs,
    gfx_of,
)
from kernelgraph.builds.variants import (
    Release,
    System,
    choose,
    no_variant,
    parse_variant,
)
from kernelgraph.builds.wanted import (
    Wanted,
    below,
    branch_version,
    check_name,
    check_repo_id,
    check_version,
    is_commit,
    pick,
    tag_version,
)

__all__ = [
    "METADATA",
    "UNLISTED",
    "Checked",
    "Metadata",
    "Origin",
    "OtherDevice",
    "Release",
    "System",
    "Wanted",
    "below",
    "branch_version",
    "builds_at",
    "check_archs",
    "check_name",
    "check_repo_id",
    "check_variant",
    "check_version",
    "choose",
    "content_hash",
    "default_target",
    "digest_files",
    "encoded_digest",
    "files_in",
    "get_kernel_dep",
    "gfx_of",
    "hash_files",
    "import_checked",
    "is_bytecode",
    "is_commit",
    "leads_out",
    "load_foreign",
    "module_kernel",
    "no_variant",
    "origin_of",
    "parse_variant",
    "pick",
    "read_metadata",
    "read_wanted",
    "tag_version",
    "take_function",
    "take_layer",
    "variant_at",
    "verify",
]
