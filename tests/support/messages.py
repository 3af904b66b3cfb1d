"""Patterns for error messages."""

from __future__ import annotations

import re


def whole(message: str) -> str:
    """A pattern for ``pytest.raises(match=...)`` that matches ``message`` alone."""
    return rf"\A{re.escape(message)}\Z"
