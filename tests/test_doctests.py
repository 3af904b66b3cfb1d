"""The examples in the docstrings of the public names run, and print what they say.

An example runs as a program in a clone does: ``torch`` and ``kg`` are imported, no kernel is
registered, ``examples/kernels`` is built, and the working directory has a ``kernels.lock``. On the
Hub there is ``kernels-community/activation``, from a trusted publisher.
"""

from __future__ import annotations

import doctest

import pytest
import torch

import kernelgraph
from kernelgraph import use_kernel_mapping
from kernelgraph.cli import main
from kernelgraph.selection import current_mapping
from tests.support.sources import EXAMPLES
from tests.support.toy_repository import METADATA, variant_files

WITHOUT_EXAMPLE = {
    "aot_compile": "it compiles for 24 s; tests/programs/test_export_compiled.py does the same",
    "aot_load": "torch 2.11 may crash in it; tests/programs/test_export_compiled.py does the same",
}
"""The names that need no example, with the reason."""

ACTIVATION = {
    "__init__.py": """
import torch

def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up

from . import layers
""",
    "layers.py": """
import torch

from . import silu_and_mul

class SiluAndMul(torch.nn.Module):
    has_backward = True
    can_torch_compile = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return silu_and_mul(x)
""",
}
"""The kernel on the Hub: a layer and a function, in plain torch."""

OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def example_of(name: str) -> doctest.DocTest:
    """The example in the docstring of a public name."""
    namespace = {"__name__": "__main__", "torch": torch, "kg": kernelgraph}
    docstring = getattr(kernelgraph, name).__doc__ or ""
    return doctest.DocTestParser().get_doctest(docstring, namespace, name, None, 0)


@pytest.fixture
def clone(hub, as_a_new_process, repository, tmp_path, monkeypatch):
    """A working directory like that of a clone, and the Hub."""
    hub.organisation("kernels-community", trusted=True)
    files = variant_files(ACTIVATION, metadata={**METADATA, "name": "activation"})
    hub.repository("kernels-community/activation").commit(files, branch="v1", tag="v0.1.0")
    as_a_new_process()

    directory = tmp_path / "clone"
    directory.mkdir()
    (directory / "examples").symlink_to(EXAMPLES)
    (directory / "pyproject.toml").write_text(
        '[tool.kernels.dependencies]\n"kernels-community/activation" = 1\n'
    )
    assert main(["lock", str(directory)]) == 0
    monkeypatch.chdir(directory)


@pytest.mark.usefixtures("clone")
@pytest.mark.parametrize("name", kernelgraph.__all__)
def test_the_example_of_a_public_name_runs(name):
    example = example_of(name)
    if not example.examples and name in WITHOUT_EXAMPLE:
        pytest.skip(WITHOUT_EXAMPLE[name])
    assert example.examples, f"the docstring of kernelgraph.{name} has no example"
    before = current_mapping()
    output: list[str] = []
    with use_kernel_mapping({}, inherit_mapping=False):
        result = doctest.DocTestRunner(optionflags=OPTIONS).run(example, out=output.append)
    assert result.failed == 0, "".join(output)
    assert current_mapping() is before


def test_names_without_an_example_are_few_and_public():
    assert set(kernelgraph.__all__) >= set(WITHOUT_EXAMPLE)
    assert [name for name in WITHOUT_EXAMPLE if example_of(name).examples] == []
