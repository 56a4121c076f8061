"""Imports point one way, and importing hvdllm costs nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "hvdllm"
FILES = {
    path.relative_to(ROOT.parent).with_suffix("").as_posix().replace("/", "."): path for path in ROOT.rglob("*.py")
}
# room: what it may import of hvdllm, besides errors, flat, screen, sums, untrusted, config.schema and itself
MAY = {
    "text": ("config.paths", "device"),
    "models": (),
    "config": ("models.size", "world.detect"),  # both without torch
    "world": ("device",),
    "exchange": ("world", "device"),
    "optim": ("device",),
    "checkpoint": ("exchange.base", "world.base", "runs"),
    "trainer": (
        "exchange.base",
        "world",
        "device",
        "runs",
        "lock",
        "checkpoint",
        "config.compose",
        "config.paths",
        "config.words",
        "text.shards",
    ),
    "report": ("canvas",),  # reads folders that this version may not have written
    "launch": ("config", "runs", "lock", "world.detect", "trainer.resume", "bench.lab", "bench.group", "device"),
    "track": ("config.compose", "runs"),
    "bench": ("",),
    "cli": ("",),
}
MAKE_OBJECTS = ("hvdllm.trainer.build", "hvdllm.trainer.restore")  # the files of trainer that know concrete parts


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("name", sorted(FILES))
def test_direction(name: str) -> None:
    room = name.split(".")[1] if "." in name else ""
    for module in imports(FILES[name]):
        if module.split(".")[0] == "horovod":
            # These run the server by which ranks meet; that initialises nothing.
            meets = name in ("hvdllm.launch.inside", "hvdllm.launch.meeting") and module.startswith("horovod.runner.")
            assert name == "hvdllm.world.hvd" or meets, f"{name} imports {module}"
        if not module.startswith("hvdllm.") or room not in MAY or name in MAKE_OBJECTS:
            continue
        allowed = ("errors", "flat", "config.schema", "screen", "sums", "untrusted", room, *MAY[room])
        inner = module.removeprefix("hvdllm.")
        assert any(inner.startswith(prefix) for prefix in allowed), f"{name} imports {module}"


@pytest.mark.parametrize("words", ["import hvdllm", "import hvdllm.cli.main; hvdllm.cli.main.main([])"])
def test_nothing_heavy_is_loaded(words: str) -> None:
    code = f"{words}; import sys; print([m for m in ('torch', 'horovod', 'numpy', 'hydra') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "module",
    [
        *["models.size", "config.compose", "config.check", "world.detect", "runs"],
        "report.page",
        "report.draw",
        "cli.report",
    ],
)
def test_no_torch(module: str) -> None:
    code = f"import hvdllm.{module}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
