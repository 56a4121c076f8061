"""Imports point one way, between rooms and between files, and importing hvdllm costs nothing."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "hvdllm"
FILES = {
    path.relative_to(ROOT.parent).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}
# What stands outside the rooms, from the ground up; each may import what stands before it, and the ground of a room.
GROUND = (
    *(
        "errors",
        "faults",
        "pulse",
        "plain",
        "canvas",
        "screen",
        "interpreter",
        "durations",
        "tables",
        "flat",
        "untrusted",
        "sums",
        "settings",
        "registry",
        "paths",
    ),
    *("device", "squeue"),
)
# room: the rooms, or files of them, that it may import beside the ground and itself
MAY = {
    "order": (),
    "world": (),
    "text": (),
    "task": ("order", "text", "models", "runs", "world.base"),
    "online": ("task", "order", "text", "exchange.base", "world.base"),
    "models": (),
    "optim": (),
    "exchange": ("world",),
    "config": ("models.size", "models.parts", "models.hugging", "world.detect", "world.parts"),  # all without torch
    "lock": ("world.detect",),
    "runs": ("config", "lock"),
    "track": ("config", "runs"),
    "checkpoint": ("exchange.base", "world.base", "runs", "models.hugging", "models.parts"),
    "trainer": (
        *(
            "world",
            "task",
            "order",
            "online",
            "text",
            "models",
            "config",
            "lock",
            "runs",
            "checkpoint",
            "track.mirror",
        ),
        *("exchange.base", "exchange.wire.build", "exchange.wire.plain", "optim.update", "optim.schedule"),
    ),
    "report": (),  # reads folders that this version may not have written
    "launch": ("config", "runs", "lock", "world.detect", "trainer.resume"),
    "bench": ("",),
    "cli": ("",),
    "session": ("",),
    "ddp_hook": ("config", "exchange.base", "exchange.wire.build", "world.torch"),
    "__main__": ("cli",),
    "__init__": ("session", "ddp_hook"),
}


def imports(path: Path) -> set[str]:
    """Modules and names that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def file_of(module: str) -> str:
    while module not in FILES:
        module = module.rpartition(".")[0]
    return module


GRAPH = {
    name: {file_of(module) for module in imports(path) if module.split(".")[0] == "hvdllm"} - {name, "hvdllm"}
    for name, path in FILES.items()
}


def room_of(name: str) -> str:
    return [*name.split("."), "__init__"][1]


@pytest.mark.parametrize("name", sorted(FILES))
def test_direction(name: str) -> None:
    room = room_of(name)
    for module in GRAPH[name]:
        inner = module.removeprefix("hvdllm.")
        if room in GROUND:
            assert inner in GROUND[: GROUND.index(room)], f"{name} imports {module}"
        else:
            allowed = (*GROUND, room, *MAY[room])
            assert any(inner == each or inner.startswith(f"{each}.".lstrip(".")) for each in allowed), (
                f"{name} imports {module}"
            )


def test_there_is_no_circle() -> None:
    """Neither between files, types included, nor between rooms."""
    rooms: dict[str, set[str]] = {}
    for name, used in GRAPH.items():
        rooms.setdefault(room_of(name), set()).update({room_of(each) for each in used} - {room_of(name)})
    for graph in (GRAPH, rooms):
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


def test_who_imports_horovod() -> None:
    """One file initialises it. Two run the server by which ranks meet, which initialises nothing."""
    for name, path in FILES.items():
        for module in imports(path):
            if module.split(".")[0] == "horovod":
                meets = name in ("hvdllm.launch.inside", "hvdllm.launch.meeting")
                assert name == "hvdllm.world.hvd" or (meets and module.startswith("horovod.runner.")), name


def test_who_imports_ray() -> None:
    """The driver of a run, which is a process of its own, so nobody else needs Ray."""
    users = {name for name, path in FILES.items() if "ray" in {module.split(".")[0] for module in imports(path)}}
    assert users == {"hvdllm.launch.ray_driver"}
    assert not [name for name, used in GRAPH.items() if users & used]


def test_settings_and_sizes_do_not_name_torch() -> None:
    light = ("registry", "settings", "runs", "models.size", "world.detect", "cli.main")
    for name, path in FILES.items():
        inner = name.removeprefix("hvdllm.")
        if inner.startswith("config.") or inner.endswith("parts") or inner in light:
            heavy = {module.split(".")[0] for module in imports(path)} & {"torch", "horovod", "numpy"}
            assert not heavy, f"{name} imports {heavy}"


@pytest.mark.parametrize("words", ["import hvdllm", "import hvdllm.cli.main; hvdllm.cli.main.main([])"])
def test_nothing_heavy_is_loaded(words: str) -> None:
    heavy = "('torch', 'horovod', 'numpy', 'hydra', 'ray')"
    code = f"{words}; import sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "code",
    [
        "import hvdllm.models.size, hvdllm.config.check, hvdllm.world.detect, hvdllm.runs",
        "from pathlib import Path; import hvdllm.cli.checkpoint as c, hvdllm.checkpoint.whole; c.problem_of(Path('.'))",
        "import hvdllm.report.page, hvdllm.report.draw, hvdllm.cli.report",
        "from hvdllm import registry; [registry.parts(group) for group in (*registry.GROUPS, 'transport')]",
        "from hvdllm.cli.main import main; main(['train', '--help'])",
        "from hvdllm.cli.main import main; main(['train', '--cfg', 'job', 'exchange=acco'])",
    ],
)
def test_no_torch(code: str) -> None:
    code = f"{code}; import sys; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
