"""What test_imports.py leaves open: the files outside the rooms, and who may know a concrete part."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] / "hvdllm"
CONCRETE = ("hvdllm.exchange.allreduce", "hvdllm.exchange.wire", "hvdllm.models.gpt", "hvdllm.text.stream")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


GRAPH = {path.relative_to(ROOT).as_posix(): imports(path) for path in sorted(ROOT.rglob("*.py"))}


def test_nothing_stands_on_the_commands() -> None:
    users = {name for name, found in GRAPH.items() if any(module.startswith("hvdllm.cli") for module in found)}
    assert users - {name for name in users if name.startswith("cli/")} == {"__main__.py"}


def test_who_knows_a_concrete_exchange_model_or_stream() -> None:
    users = {name for name, found in GRAPH.items() if any(module.startswith(CONCRETE) for module in found)}
    inside = {name for name in users if name.startswith(("exchange/", "models/", "text/"))}
    assert users - inside == {"trainer/build.py", "trainer/restore.py", "bench/step.py"}


def test_only_the_maker_of_objects_knows_exchanges_and_wires_in_trainer() -> None:
    for name, found in GRAPH.items():
        if name.startswith("trainer/") and name != "trainer/build.py":
            used = {module for module in found if module.startswith("hvdllm.exchange.")}
            assert all(module.startswith("hvdllm.exchange.base.") for module in used), (name, used)


def test_the_files_outside_the_rooms_stand_on_little() -> None:
    may = {
        "__init__.py": (),
        "errors.py": (),
        "device.py": ("hvdllm.errors",),
        "canvas.py": (),
        "flat.py": (),
        "screen.py": (),
        "untrusted.py": (),
        "sums.py": ("hvdllm.untrusted",),
        "lock.py": ("hvdllm.errors", "hvdllm.world.detect", "hvdllm.launch.slurm"),
        "runs.py": (
            "hvdllm.errors",
            "hvdllm.config",
            "hvdllm.lock",
            "hvdllm.screen",
            "hvdllm.sums",
            "hvdllm.untrusted",
        ),
        "__main__.py": ("hvdllm.cli.main",),
    }
    assert {name for name in GRAPH if "/" not in name} == {*may}
    for name, allowed in may.items():
        used = {module for module in GRAPH[name] if module.startswith("hvdllm")}
        assert all(module.startswith(allowed) for module in used), (name, used)


def test_config_and_sizes_do_not_name_torch() -> None:
    for name, found in GRAPH.items():
        if name.startswith("config/") or name in ("models/size.py", "world/detect.py", "runs.py", "cli/main.py"):
            assert not any(module.split(".")[0] in ("torch", "horovod", "numpy") for module in found), name
