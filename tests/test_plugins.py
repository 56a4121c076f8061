"""Parts from outside: `plugins=` imports a user's module, and every command takes what it registers."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from launch import BATCH, curve, records, words_of

from hvdllm import registry
from hvdllm.cli.main import main

PAGE = Path(__file__).resolve().parents[1] / "hvdllm" / "README.md"
EXAMPLE = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)[0]
OTHERS = '''
from dataclasses import dataclass
from pathlib import Path

from hvdllm.exchange.wire import parts as wires
from hvdllm.exchange.wire.plain import Plain
from hvdllm.optim import parts as optims, sgd
from hvdllm.registry import SUMS, OptimizerFacts, TrackerFacts, WireFacts, part
from hvdllm.settings import Settings


class Halved(Plain):
    def sum(self, x, key):
        return super().sum(x.mul_(0.5), key)


@part("wire", "halved", Halved, WireFacts(carries=frozenset({SUMS})))
@dataclass
class HalvedSettings(wires.Wire):
    """Sums at half their size."""


@part("optim", "descent", sgd, OptimizerFacts(vectors=1, linear=True))
@dataclass
class Descent(optims.SGD):
    """Plain descent under another name."""


class Tracker:
    def __init__(self, folder):
        self.path = folder / "seen.txt"

    def record(self, number, record):
        with self.path.open("a") as file:
            file.write(record["kind"] + " ")

    def close(self, failed):
        pass


def make(config, folder, kept, before, say):
    return Tracker(folder)


@part("track", "notes", "my_parts:make", TrackerFacts())
@dataclass
class Notes(Settings):
    """A file in the run's folder."""
'''


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with two modules in it, where a user starts; what they register is forgotten afterwards."""
    (tmp_path / "my_exchange.py").write_text(EXAMPLE)
    (tmp_path / "my_parts.py").write_text(OTHERS)
    monkeypatch.chdir(tmp_path)
    for group in registry.GROUPS:
        registry.parts(group)
        monkeypatch.setitem(registry._parts, group, dict(registry.parts(group)))
    yield tmp_path
    for name in ("my_exchange", "my_parts"):
        sys.modules.pop(name, None)


def words(desk: Path, name: str, *more: str) -> list[str]:
    return ["train", *words_of(desk, name, 4, "world=virtual", "world.size=2", f"log_every={BATCH}", *more)]


def test_the_example_is_short() -> None:
    assert len(EXAMPLE.strip().splitlines()) <= 40


def test_an_exchange_of_ones_own_trains_and_does_what_it_says(desk: Path) -> None:
    mine = ("plugins=[my_exchange]", "exchange=clipped")
    assert main(words(desk, "plain")) == 0
    assert main(words(desk, "wide", *mine, "exchange.limit=1e9")) == 0
    assert main(words(desk, "narrow", *mine, "exchange.limit=1e-3")) == 0
    runs = desk / "runs"
    assert curve(runs / "wide") == curve(runs / "plain") != curve(runs / "narrow")
    (first,) = records(runs / "narrow", "run")
    assert first["config"]["plugins"] == ["my_exchange"] and first["config"]["exchange"]["name"] == "clipped"
    norms = [record["grad_norm"] for record in records(runs / "narrow", "commit")]
    assert max(norms) < 1e-3 * len(records(runs / "narrow", "commit")) + 0.1


def test_a_run_with_parts_of_ones_own_goes_on_and_is_read(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = ("plugins=my_exchange", "exchange=clipped")
    assert main(words(desk, "a", *mine, f"save_every={2 * BATCH}")) == 0
    text = [f"text.path={desk}/text/train.txt", f"text.validation={desk}/text/validation.txt", f"data_dir={desk}/data"]
    again = ["train", "resume=runs/a", f"budget_tokens={6 * BATCH}", "world=virtual", "world.size=2", *text]
    # The plugin is in memory; a process of its own would not know it.
    registry._parts["exchange"].pop("clipped")
    sys.modules.pop("my_exchange")
    assert main(again) == 2
    assert "plugins=[MODULE]" in capsys.readouterr().err, "a folder chooses no module"
    assert main([*again, "plugins=my_exchange"]) == 0
    assert len(records(desk / "runs" / "a", "commit")) == 6
    assert main(["sample", "runs/a", "a", "--tokens", "3", "plugins=my_exchange"]) == 0
    assert main(["evaluate", "runs/a", "plugins=my_exchange", *text]) == 0
    assert main(["report", "runs/a", "plugins=my_exchange"]) == 0


def test_help_and_configuration_know_it(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help", "exchange", "plugins=[my_exchange]"]) == 0
    assert "exchange.limit" in capsys.readouterr().out
    assert main(["train", "--cfg", "job", "plugins=[my_exchange]", "exchange=clipped", "exchange.limit=3"]) == 0
    assert "limit: 3.0" in capsys.readouterr().out
    assert main(["train", "plugins=[my_exchange]", "exchange=clipped", "exchange.limit=-1"]) == 2
    assert "too small" in capsys.readouterr().err


def test_a_wire_and_an_optimizer_of_ones_own(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = ("plugins=[my_parts]", "optim.clip=0", "optim.momentum=0")
    assert main(words(desk, "plain", *mine, "optim=sgd", "optim.lr=0.05")) == 0
    assert main(words(desk, "half", *mine, "optim=descent", "optim.lr=0.1", "wire=halved")) == 0
    plain, half = ([r["loss"] for r in records(desk / "runs" / name, "commit")] for name in ("plain", "half"))
    assert half == pytest.approx(plain, rel=1e-5), "half the sum at twice the rate"
    for exchange in ("sharded", "parameter_server"):
        assert main(words(desk, exchange, *mine, f"exchange={exchange}", "optim=sgd", "wire=halved")) == 2
        assert f"exchange={exchange} with wire=halved: " in capsys.readouterr().err, "refused, not ignored"


def test_a_tracker_of_ones_own(desk: Path) -> None:
    assert main(words(desk, "a", "plugins=[my_parts]", "track=notes")) == 0
    assert (desk / "runs" / "a" / "seen.txt").read_text().split()[0] == "run"


def test_a_sweep_over_parts_of_ones_own(desk: Path) -> None:
    more = ("plugins=[my_exchange]", "exchange=allreduce,clipped", "launch.sweep=s")
    sweep = ["train", "-m", *(word for word in words(desk, "x", *more)[1:] if not word.startswith("name="))]
    assert main(sweep) == 0
    found = [
        records(path.parent, "run")[0]["config"]["exchange"]["name"] for path in desk.glob("runs/s/*/metrics.jsonl")
    ]
    assert sorted(found) == ["allreduce", "clipped"]


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("plugins=[nowhere_at_all]", "there is no such module"),
        ("plugins=[../x]", "names of Python modules"),
        ("plugins=[broken]", "cannot be imported (ZeroDivisionError"),
        ("plugins=[thief]", "registers exchange=acco, which hvdllm.exchange.parts has"),
    ],
)
def test_what_cannot_be_imported_is_one_sentence(
    word: str, says: str, desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (desk / "broken.py").write_text("1 / 0\n")
    (desk / "thief.py").write_text(EXAMPLE.replace('"clipped"', '"acco"'))
    assert main(["train", word]) == 2
    assert says in capsys.readouterr().err


def test_a_file_of_settings_names_no_module(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (desk / "mine" / "experiment").mkdir(parents=True)
    (desk / "mine" / "experiment" / "my.yaml").write_text("# @package _global_\nplugins: [my_exchange]\n")
    assert main(["train", "--config-dir", "mine", "experiment=my"]) == 2
    assert "plugins= is a word of the command line alone" in capsys.readouterr().err
    assert "my_exchange" not in sys.modules
