from __future__ import annotations

from tests.examples.conftest import repository  # noqa: F401 (a fixture)
