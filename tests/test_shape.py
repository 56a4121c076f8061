"""No class holds more than it can be understood with: at most 15 attributes, counted over all of hvdllm."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] / "hvdllm"
MOST = 15


def attributes(cls: ast.ClassDef) -> set[str]:
    """Names that its methods assign to self, in whatever form."""
    stored = (node for node in ast.walk(cls) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store))
    return {node.attr for node in stored if isinstance(node.value, ast.Name) and node.value.id == "self"}


def test_no_class_has_more_than_fifteen_attributes() -> None:
    found = set()
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and len(attributes(node)) > MOST:
                found.add(f"{path.relative_to(ROOT).as_posix()}:{node.name}")
    assert not found


def test_every_form_of_an_assignment_counts() -> None:
    lines = ("self.a = self.b = 1", "self.c, self.d = 1, 2", "self.e: int = 1", "self.f += 1", "x.g = 1")
    text = "class A:\n def f(self):\n  " + "\n  ".join(lines)
    (cls,) = ast.parse(text).body
    assert isinstance(cls, ast.ClassDef) and attributes(cls) == set("abcdef")


def test_any_hides_few_seams() -> None:
    """Any is for JSON, state and batches of any form, which have names of their own (plain.py)."""
    names = [
        node
        for path in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Name)
    ]
    assert sum(node.id == "Any" for node in names) <= 120
