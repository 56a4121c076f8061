"""The pages: their links lead somewhere, their commands can work, their tables are those that the code knows.

Every command is composed and checked in this process, as far as it goes before training. About ten of them, one of each
kind, are run for real, with smaller budgets and this machine in place of the nodes.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest

from hvdllm import registry
from hvdllm.cli import bench, flags
from hvdllm.cli import main as cli
from hvdllm.config import compose, composition
from hvdllm.config.check import check
from hvdllm.launch import hydra, sweep
from hvdllm.launch import parts as launchers
from hvdllm.world.detect import Place

ROOT = Path(__file__).resolve().parents[1]
ROOMS = (".github", "conf", "hvdllm", "jobs", "tests")
FILES = [ROOT / "README.md", *sorted(file for room in ROOMS for file in (ROOT / room).rglob("*.md"))]
PAGES = {file.relative_to(ROOT).as_posix(): file.read_text() for file in FILES}
EXCHANGES, WIRES = "hvdllm/exchange/README.md", "hvdllm/exchange/wire/README.md"
HEADINGS = ["Idea", "Update rule", "Invariant", "Stability", "Bytes and memory", "Settings", "Measured", "Source"]
COLUMN_PX = 830  # of a page as GitHub draws it, at 16 px a line; a letter takes about 8, a cell's edges 27


def prose(text: str) -> str:
    """Without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def anchors(text: str) -> set[str]:
    """As GitHub names its headings."""
    found: set[str] = set()
    for title in re.findall(r"^#+ (.+)$", prose(text), re.M):
        name = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        found.add(next(n for n in [name, *(f"{name}-{k}" for k in range(1, 100))] if n not in found))
    return found


def sections(page: str) -> dict[str, str]:
    """What stands under each heading of the second level."""
    parts = re.split(r"^## (.+)$", PAGES[page], flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


# ------------------------------------------------------------------ text
@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(PAGES[page])):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(file.read_text()), f"{page}: {target}"


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_are_there(page: str) -> None:
    for span in re.findall(r"`((?:hvdllm|conf|jobs|tests)/[\w./-]+)`", PAGES[page]):
        assert (ROOT / span).exists(), f"{page}: {span}"


def test_the_front_page_is_short() -> None:
    assert (ROOT / "README.md").stat().st_size <= 10_000


def test_the_front_page_shows_the_loop_as_it_is() -> None:
    loop = (ROOT / "hvdllm" / "trainer" / "loop.py").read_text()
    (shown,) = re.findall(r"```python\n(.*?)```", PAGES["README.md"], re.S)
    lines = [line.strip() for line in loop.splitlines()]
    assert all(line.strip() in lines for line in shown.splitlines()), shown


@pytest.mark.parametrize("page", PAGES)
def test_tables_fit_the_column(page: str) -> None:
    """By the longest words of their columns: the rest of a cell is broken into lines."""
    for table in re.findall(r"(?:^\|.*\n)+", prose(PAGES[page]), re.M):
        rows = [re.split(r"(?<!\\)\|", row.strip())[1:-1] for row in table.splitlines()]
        assert len({len(row) for row in rows}) == 1, f"{page}: {table}"
        words = [[re.sub(r"\[(.*?)\]\(.*?\)", r"\1", cell).split() or [""] for cell in row] for row in rows]
        least = [max(len(word) for row in words for word in row[k]) for k in range(len(rows[0]))]
        assert sum(8 * n + 27 for n in least) <= COLUMN_PX, f"{page}: {rows[0]}"


def test_every_exchange_has_its_section_with_all_headings_and_settings() -> None:
    found = sections(EXCHANGES)
    assert [name for name in found if name in registry.kinds("exchange")] == list(
        name for name in re.findall(r"^\| \[`(\w+)`\]", PAGES[EXCHANGES], re.M)
    )
    for name, kind in registry.kinds("exchange").items():
        assert re.findall(r"^\*\*(.+?)\.\*\*", found[name], re.M) == HEADINGS, name
        for f in dataclasses.fields(kind):
            assert f"exchange.{f.name}`" in found[name] or f"exchange.{f.name}=" in found[name], (name, f.name)


def test_every_wire_has_its_section_with_all_settings() -> None:
    found = sections(WIRES)
    without = [heading for heading in HEADINGS if heading != "Stability"]
    for name, kind in registry.kinds("wire").items():
        text = next(body for title, body in found.items() if name in title.split(" and "))
        assert re.findall(r"^\*\*(.+?)\.\*\*", text, re.M) == without, name
        for f in dataclasses.fields(kind):
            if f.name != "hierarchical":  # has a section of its own
                assert f"wire.{f.name}`" in text or f"wire.{f.name}=" in text, (name, f.name)


def test_the_table_of_what_goes_together_is_the_one_that_the_check_reads() -> None:
    assert composition.matrix() in PAGES[WIRES]


def test_every_experiment_is_named() -> None:
    names = {file.stem for file in (ROOT / "conf" / "experiment").glob("*.yaml")}
    assert set(re.findall(r"^\| `(\w+)` \|", sections("conf/README.md")["Experiments"], re.M)) == names


def test_an_exchange_and_its_section_name_each_other() -> None:
    for name in registry.kinds("exchange"):
        assert f"More in {EXCHANGES}, `{name}`." in (ROOT / "hvdllm" / "exchange" / f"{name}.py").read_text(), name


def test_pages_that_the_code_names_are_there() -> None:
    for file in sorted((ROOT / "hvdllm").rglob("*.py")):
        text = file.read_text()
        assert "EXCHANGES.md" not in text and "DESIGN.md" not in text, file
        for page, title in re.findall(r"(hvdllm/[\w/]*README\.md)(?:, [`\"]([^`\"]+)[`\"])?", text):
            assert page in PAGES, (file, page)
            assert not title or title in sections(page), (file, page, title)


# ------------------------------------------------------------------ commands
def commands() -> dict[str, str]:
    """Each line of the blocks of shell commands, and the first page that has it."""
    found: dict[str, str] = {}
    for page, text in PAGES.items():
        for block in re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S):
            for line in block.splitlines():
                found.setdefault(line, page)
    return found


class Parsed(Exception):
    """What a command's parser made of its words; nothing was run."""


def start_of(words: list[str]) -> tuple[Place, list[str]]:
    """Where rank 0 of a command would stand, and the words behind `hvdllm`."""
    at = next(k for k, word in enumerate(words) if word in ("hvdllm", ".venv/bin/hvdllm"))
    before, rest = words[:at], words[at + 1 :]
    program = before[0] if before else "none"
    if program == "none":
        return Place(), rest
    count = next((k for k, word in enumerate(before) if word in ("-np", "-n", "--nproc-per-node")), None)
    size = int(before[count + 1]) if count else int(next(w[2:] for w in before if re.fullmatch(r"-n\d+", w)))
    assert program in ("horovodrun", "mpirun", "torchrun", "srun"), program
    return Place("mpirun" if "--mpi" in before else program, 0, size, 0, size), rest


def check_settings(words: Sequence[str], place: Place) -> None:
    config = compose.compose(words)
    if isinstance(config.launch, launchers.Local):
        check(config, place)
    elif isinstance(config.launch, launchers.Ray):  # a cluster is not asked
        check(config, config.launch.place())
    else:
        sweep.prepare(config)


def check_train(words: list[str], place: Place) -> None:
    if {"--help", "--cfg"} & set(words):
        assert flags.settings_only(words, "", compose.compose) is None
    elif "-m" not in words:
        settings = flags.settings_only(words, "", compose.compose)
        assert settings is not None
        check_settings(settings, place)
    else:
        settings = flags.settings_only([word for word in words if word != "-m"], "", compose.compose)
        assert settings is not None
        folders = [word for word in settings if word.startswith(compose.CONFIG_DIR)]
        points = []

        def point(batch: Sequence[Sequence[str]]) -> list[float | None]:
            for job in batch:
                points.append(job)
                if sum(a != b for a, b in zip(job, points[0], strict=True)) <= 1:  # not every combination
                    check_settings([*folders, *job], place)
            return [0.0] * len(batch)

        hydra.drive(sweep.each_once(settings), lambda trials: point)
        assert len(points) > 1


def check_bench(given: argparse.Namespace) -> None:
    place = Place()
    if given.what == "exchange":
        from hvdllm.bench import exchange

        asked = bench.ask(given)
        for case in exchange.cases(asked):
            check(
                compose.compose([*exchange.MODEL, *asked.settings, *case.words]), Place("mpirun", 0, asked.ranks, 0, 1)
            )
    elif given.what == "step":
        check(compose.compose(given.settings), place)


def check_command(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raises where the words could not work."""
    words = shlex.split(line)
    while re.fullmatch(r"[A-Z]+=\S*", words[0]):
        del words[0]
    if words[0].startswith("jobs/") or words[0] == "sbatch":
        script = next(word for word in words if word.startswith("jobs/"))
        assert os.access(ROOT / script, os.R_OK if words[0] == "sbatch" else os.X_OK), script
        check_settings([word for word in words if re.match(r"[\w.]+=", word)], Place())
    elif words[0] in ("ruff", "mypy", "pytest"):
        assert all((ROOT / word).exists() for word in words if word.startswith("tests"))
    elif words[-1] == "mine.py":
        assert words[0] in ("horovodrun", "torchrun")  # test_session.py runs the script
    elif line == ". .venv/bin/activate" or words[:3] == ["python3", "-m", "venv"]:
        pass  # test_setup.py and test_wheel.py do what they do
    else:
        words = ["hvdllm" if words[k - 1 : k + 1] == ["-m", "hvdllm"] else word for k, word in enumerate(words)]
        place, rest = start_of(words)
        assert rest[0] in cli.COMMANDS, line
        if rest[0] == "train":
            return check_train(rest[1:], place)
        if rest[0] == "prepare":
            settings = flags.settings_only(rest[1:], "", compose.compose, groups=("text",))
            return check_settings(settings or [], place)
        if rest[0] == "cooldown":
            assert rest[1].startswith("runs/")
            return check_settings(["text=stream", *rest[2:]], place)
        if rest[0] == "bench":
            return check_bench(bench.parsed(rest[1:]))
        whole = argparse.ArgumentParser.parse_args

        def parse(self: argparse.ArgumentParser, argv: Any = None, namespace: Any = None) -> NoReturn:
            raise Parsed(whole(self, argv, namespace))

        import importlib

        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
        with pytest.raises(Parsed):
            importlib.import_module(f"hvdllm.cli.{rest[0]}").run(rest[1:])
        monkeypatch.undo()


@pytest.mark.parametrize("line", commands())
def test_command_could_work(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine" / "launch").mkdir(parents=True)
    (site,) = re.findall(r"```yaml\n(.*?)```", PAGES["hvdllm/launch/README.md"], re.S)
    (tmp_path / "mine" / "launch" / "site.yaml").write_text(site)
    monkeypatch.chdir(tmp_path)
    check_command(line, monkeypatch)


@pytest.mark.parametrize(
    "line",
    [
        "hvdllm trian",
        "hvdllm train exchange=aco",
        "hvdllm train optim.lr=fast",
        "horovodrun --gloo -np 2 hvdllm train exchange=parameter_server",
        "hvdllm train -m exchange=allreduce,delaid seed=0,1",
        "hvdllm train -m exchange=sharded wire=int8,powersgd",
        "hvdllm report runs/a --tunedby optim.lr",
        "hvdllm bench exchange --exchanges allreduce,acc",
        "jobs/quikstart.sh",
        "sbatch jobs/slurm/train.sbatch exchange=aco",
        "pytest tests/exchanges",
    ],
)
def test_a_command_that_could_not_work_is_found(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((Exception, SystemExit)):
        check_command(line, monkeypatch)


# ------------------------------------------------------------------ for real
FIRST = "hvdllm train name=first budget_tokens=200000"
PAIR = "hvdllm train -m launch=horovodrun exchange=allreduce,delayed seed=0,1,2 launch.sweep=pair budget_tokens=100k"
LAB = (
    "hvdllm bench exchange --link 200mbit --exchanges "
    "allreduce,sharded,delayed,acco,acco+exchange.timed=true,ddp,horovod --steps 8 --repetitions 2"
)
REAL = (  # and what has to have been run before
    ("jobs/quickstart.sh", ""),
    ("horovodrun --gloo -np 2 hvdllm train name=second exchange=acco wire=bf16 budget_tokens=200000", ""),
    ("mpirun --allow-run-as-root --mca mpi_yield_when_idle 1 --mca odls_base_sigkill_timeout 5 -np 2 hvdllm train "
     "budget_tokens=50000", ""),
    (PAIR, ""),
    ("hvdllm report runs/pair", PAIR),
    ('hvdllm sample runs/first "def main("', FIRST),
    ("hvdllm evaluate runs/first", FIRST),
    ("hvdllm bench step --seconds 60", ""),
    (LAB, ""),
    ("hvdllm doctor", ""),
)  # fmt: skip
SMALL = ["model.layers=1", "model.width=32", "device.threads=1", "eval_tokens=2048", "sample_tokens=8"]
DONE: set[str] = set()


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder to work in."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "bin").mkdir()
    (folder / "bin" / "horovodrun").symlink_to(ROOT / "tests" / "ranks" / "horovodrun")  # starts sooner
    DONE.clear()
    return folder


def smaller(line: str, desk: Path) -> list[str]:
    """The command with a small budget and model; of a lab the loopback, of a sweep one seed."""
    words = shlex.split(line)
    if "train" in words or line == "jobs/quickstart.sh":
        words = ["seed=0" if word == "seed=0,1,2" else word for word in words if not word.startswith("budget_tokens=")]
        words += ["budget_tokens=8192", *SMALL]
    if line == "jobs/quickstart.sh":
        words = [str(ROOT / words[0]), *words[1:], f"runs_dir={desk}/runs"]
    if "--seconds" in words:
        words[words.index("--seconds") + 1] = "1"
    if line == LAB:
        words += shlex.split("--link none --exchanges allreduce --steps 2 --warmup 1 --repetitions 1 batch_tokens=1024")
    if "sample" in words:
        words += ["--tokens", "8"]
    return [*words, *SMALL[:3]] if "bench" in words else words


def perform(line: str, desk: Path) -> str:
    words = smaller(line, desk)
    environment = {
        **os.environ,
        "PATH": f"{desk}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    if shutil.which("ssh") is None:
        environment["OMPI_MCA_plm"] = "isolated"
    done = subprocess.run(words, cwd=desk, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    DONE.add(line)
    return done.stdout


def test_what_is_run_stands_on_a_page() -> None:
    assert {line for line, _ in REAL} | {FIRST} <= commands().keys()
    assert "python3 -m venv ~/hvdllm-try && . ~/hvdllm-try/bin/activate && pip install . && hvdllm train" in commands()
    assert "jobs/test.sh" in commands()  # runs this


@pytest.mark.ranks
@pytest.mark.parametrize(("line", "before"), REAL, ids=[line for line, _ in REAL])
def test_command(line: str, before: str, desk: Path) -> None:
    if before and before not in DONE:
        perform(before, desk)
    said = perform(line, desk)
    if line == PAIR:
        assert "validation loss" in said and "hvdllm report runs/pair" in said
    elif "train" in line or line == "jobs/quickstart.sh":
        assert "tokens" in said and "next: hvdllm sample" in said
