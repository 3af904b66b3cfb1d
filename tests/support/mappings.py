"""Repositories, devices and mappings for tests of what is registered; nothing here needs torch."""

from __future__ import annotations

from hypothesis import strategies as st

from kernelgraph.selection.devices import CUDAProperties, Device, ROCMProperties, Target
from kernelgraph.selection.mapping import KernelMapping
from kernelgraph.selection.modes import Mode


class Repo:
    """A repository with a name, which fails if it is loaded or copied."""

    def __init__(self, name=""):
        self.name = name

    def __repr__(self):
        return f"Repo({self.name!r})"

    def load(self):
        raise AssertionError("nothing is loaded in order to choose")

    def __deepcopy__(self, memo):
        raise AssertionError("repositories are not copied")


class Unhashable(Repo):
    """A repository that cannot be registered."""

    __hash__ = None


A, B, C = Repo("a"), Repo("b"), Repo("c")
INF, TRA, FALL = Mode.INFERENCE, Mode.TRAINING, Mode.FALLBACK
INF_C, TRA_C = INF | Mode.TORCH_COMPILE, TRA | Mode.TORCH_COMPILE
MODES = [INF, INF_C, TRA, TRA_C, FALL]


def cuda(low, high):
    return Device("cuda", CUDAProperties(low, high))


def rocm(low, high):
    return Device("rocm", ROCMProperties(low, high))


def view(mapping):
    """A mapping as plain data: per layer, (device, modes), the newest last."""
    return {
        layer: [(one.device, dict(one.repositories)) for one in registered]
        for layer, registered in mapping.layers.items()
    }


def parsed(*mappings):
    """The mapping of dicts that are registered one after another."""
    merged = KernelMapping()
    for mapping in mappings:
        merged = merged.merge(KernelMapping.parse(mapping))
    return merged


# --- strategies: any mapping and target ----------------------------------------------------------

BOUNDS = [70, 75, 80, 86, 90, 100]
INTERVALS = st.tuples(st.sampled_from(BOUNDS), st.sampled_from(BOUNDS)).map(sorted)
DEVICE_KEYS = st.one_of(
    st.sampled_from(["cpu", "cuda", "rocm", "mps", "metal", Device("cuda"), Device("metal")]),
    INTERVALS.map(lambda bounds: cuda(*bounds)),
    INTERVALS.map(lambda bounds: cuda(*bounds)),
    INTERVALS.map(lambda bounds: rocm(*bounds)),
)
REPOS = st.builds(Repo)
MAPPINGS = st.dictionaries(
    st.sampled_from(["Norm", "Gate"]),
    st.dictionaries(
        DEVICE_KEYS, st.one_of(REPOS, st.dictionaries(st.sampled_from(MODES), REPOS)), max_size=5
    ),
    max_size=2,
)
TARGETS = st.one_of(
    st.sampled_from([Target("cpu"), Target("mps"), Target("npu"), Target("rocm", 80)]),
    st.sampled_from([*BOUNDS, 69, 85, 101, None]).map(
        lambda capability: Target("cuda", capability)
    ),
)
