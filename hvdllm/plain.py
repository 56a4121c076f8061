"""Plain values, as JSON has them: numbers, text, and lists and dicts of these, in records, states and messages."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]

Tree = Any
"""A tensor, or a dict, tuple or list of trees. What other values it holds passes through."""
