"""The wheel alone: in an environment that has what it requires and nothing else, hvdllm trains without Horovod.

The environment sees exactly the packages that follow from the wheel's requirements, linked from this one, so the
test needs no network; pip is told to use no index and so fails if one is missing.
"""

import importlib.metadata
import json
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def closure(requirements: list[str]) -> dict[str, importlib.metadata.Distribution]:
    """What these requirements install, without any extra that they do not ask for."""
    found: dict[str, importlib.metadata.Distribution] = {}
    waiting = [Requirement(text) for text in requirements]
    seen = set()
    while waiting:
        one = waiting.pop()
        if (one.name, *one.extras) in seen:
            continue
        seen.add((one.name, *one.extras))
        found[one.name] = importlib.metadata.distribution(one.name)
        for text in found[one.name].requires or []:
            needed = Requirement(text)
            if not needed.marker or any(needed.marker.evaluate({"extra": e}) for e in ("", *one.extras)):
                waiting.append(needed)
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: a build leaves folders in the tree."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("hvdllm", "conf"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    stale = copy / "build" / "lib" / "hvdllm" / "conf" / "stale.yaml"  # left by an earlier `pip install .`
    stale.parent.mkdir(parents=True)
    stale.touch()
    call(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", ".", cwd=copy)
    (file,) = copy.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def hvdllm(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder)
    python = str(folder / "bin" / "python")
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
    requirements = importlib.metadata.requires("hvdllm") or []
    for found in closure([text for text in requirements if "extra ==" not in text]).values():
        for top in {file.parts[0] for file in found.files or []} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(found.locate_file(top))).resolve())
    call(sys.executable, "-m", "pip", "-q", "--python", python, "install", "--no-index", str(wheel), cwd=folder)
    return str(folder / "bin" / "hvdllm")


def call(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_settings_are_in_the_wheel(wheel: Path, tmp_path: Path) -> None:
    shutil.unpack_archive(wheel, tmp_path, "zip")
    inside = tmp_path / "hvdllm" / "conf"
    settings = {str(file.relative_to(ROOT / "conf")) for file in (ROOT / "conf").rglob("*.yaml")}
    assert "train.yaml" in settings
    assert {str(file.relative_to(inside)) for file in inside.rglob("*.yaml")} == settings
    modules = {str(file.relative_to(ROOT)) for file in (ROOT / "hvdllm").rglob("*.py")}
    assert modules <= {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.py")}


def test_it_says_its_version(hvdllm: str, tmp_path: Path) -> None:
    import hvdllm as here

    assert here.__version__ in call(hvdllm, "--version", cwd=tmp_path)
    python = str(Path(hvdllm).with_name("python"))
    assert here.__version__ in call(python, "-m", "hvdllm", "--version", cwd=tmp_path)


def words(tmp_path: Path) -> list[str]:
    """Of a short run on a small text."""
    text = tmp_path / "text"
    text.mkdir()
    for n in range(40):
        (text / f"{n}.txt").write_text(f"Text number {n} says that {n} and {n} are {2 * n}. " * 40)
    data = ["text=files", f"text.path={text}", "text.tokenizer=bytes", f"data_dir={tmp_path / 'data'}"]
    model = ["model.layers=1", "model.width=64", "model.heads=2", "model.kv_heads=1", "optim.lr=0.01"]
    return [*data, *model, "device.threads=1", "batch_tokens=2048", "budget_tokens=10240", "eval_tokens=1024"]


def test_it_trains_where_there_is_no_horovod(hvdllm: str, tmp_path: Path) -> None:
    python = str(Path(hvdllm).with_name("python"))
    absent = "import importlib.util as u; print([n for n in ('horovod', 'mpi4py', 'transformers') if u.find_spec(n)])"
    assert call(python, "-c", absent, cwd=tmp_path) == "[]\n"
    assert "budget_tokens" in call(hvdllm, "train", "--help", "all", cwd=tmp_path)

    call(hvdllm, "train", *words(tmp_path), "name=first", cwd=tmp_path)
    records = [json.loads(line) for line in (tmp_path / "runs" / "first" / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record["kind"] == "eval"]
    assert records[-1]["kind"] == "end"
    assert records[-1]["tokens"] == 10240
    assert losses[-1] < 5.5  # 257 equal chances are 5.55

    # The report's packages are an extra, which it says.
    lacking = subprocess.run([hvdllm, "report", "runs/first"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert lacking.returncode == 2 and "hvdllm[report]" in lacking.stderr and lacking.stderr.count("\n") == 1


@pytest.mark.thorough
def test_it_sweeps_over_settings_of_a_folder_of_ones_own(hvdllm: str, tmp_path: Path) -> None:
    (tmp_path / "mine" / "launch").mkdir(parents=True)
    (tmp_path / "mine" / "launch" / "site.yaml").write_text("defaults: [local, _self_]\nparallel: 2\n")
    sweep = ["-m", "--config-dir", "mine", "launch=site", "launch.sweep=two", "seed=0,1", *words(tmp_path)]
    assert "hvdllm report runs/two" in call(hvdllm, "train", *sweep, cwd=tmp_path)
    assert {path.name for path in (tmp_path / "runs" / "two").iterdir()} == {"seed=0", "seed=1", "sweep.json"}
