"""Plain values: numbers, text, lists and dicts of them, as JSON has them in records, states and messages."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]
