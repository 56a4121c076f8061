"""Does a run begin, go on, or is it done: decided from its folder."""

from pathlib import Path

import pytest

from hvdllm import registry, runs
from hvdllm.config import compose
from hvdllm.errors import UserError
from hvdllm.settings import Config
from hvdllm.trainer.resume import Start, asked, decide


def config(folder: Path, *words: str) -> Config:
    return compose.compose([f"runs_dir={folder}", "name=a", *words])


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A run without checkpoints."""
    folder = runs.Folder(tmp_path / "a")
    folder.create(config(tmp_path))
    folder.record("run", {"overrides": ["optim=sgd", "seed=3"]})
    folder.close()
    return tmp_path


def test_a_new_one(tmp_path: Path) -> None:
    assert decide(config(tmp_path), pytest.fail) == Start(str(tmp_path / "a"))
    with pytest.raises(UserError, match="no run in"):
        decide(config(tmp_path, "resume=must"), pytest.fail)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").touch()
    with pytest.raises(UserError, match="not the folder of a run"):
        decide(config(tmp_path), pytest.fail)


def test_one_that_is_there(made: Path) -> None:
    assert decide(config(made), pytest.fail) == Start(str(made / "a"), again=True)
    with pytest.raises(UserError, match="resume=never"):
        decide(config(made, "resume=never"), pytest.fail)
    with pytest.raises(UserError, match="no checkpoint"):
        decide(config(made, "resume=must"), pytest.fail)
    (made / "a" / "checkpoints" / "3").mkdir()
    with pytest.raises(UserError, match="none is whole"):
        decide(config(made), lambda text: None)


def test_one_that_has_finished(made: Path) -> None:
    folder = runs.Folder(made / "a")
    folder.record("end", {"reason": "budget", "tokens": 1_200_128})
    folder.close()
    assert "1,200,128 tokens" in (decide(config(made), pytest.fail).finished or "")
    assert decide(config(made, "budget_tokens=2e6"), pytest.fail).finished is None


@pytest.mark.parametrize(
    "word", ["seed=1", "optim.lr=1", "optim=sgd", "model.layers=3", "text.vocab=300", "eval_tokens=9"]
)
def test_other_settings_are_refused_by_name(made: Path, word: str) -> None:
    with pytest.raises(UserError, match=word.split("=")[0]) as error:
        decide(config(made, word), pytest.fail)
    assert "\n" not in str(error.value)


def test_where_and_how_long_may_differ(made: Path) -> None:
    words = [
        "budget_tokens=3e6",
        "eval_every=7",
        "save_every=7",
        "sample_every=7",
        "log_every=7",
        "keep=5",
        "device=cpu",
    ]
    assert decide(config(made, *words, "world=single", "data_dir=/x"), pytest.fail).again


def test_a_runs_own_settings_come_first(tmp_path: Path) -> None:
    runs.Folder(tmp_path / "a").create(config(tmp_path, "optim=sgd", "seed=3"))
    composed, _ = asked([f"resume={tmp_path}/a", "seed=4"])
    assert composed.name == "a" and composed.seed == 4 and registry.name_of("optim", composed.optim) == "sgd"
    assert asked(["seed=1", "resume=must"])[1] == ["seed=1", "resume=must"]
    with pytest.raises(UserError, match="not the folder of a run"):
        asked(["resume=/nowhere"])


def test_what_a_checkpoint_takes_back(tmp_path: Path) -> None:
    folder = runs.Folder(tmp_path)
    for kind, tokens in (
        ("run", None),
        ("commit", 10),
        ("eval", 20),
        ("save", 20),
        ("commit", 20),
        ("eval", 30),
        ("end", 30),
    ):
        folder.record(kind, {"tokens": tokens} if tokens else {})
    folder.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "commit", "tok')
    folder.truncate(20)
    left = [(record["kind"], record.get("tokens")) for record in runs.records(tmp_path)]
    assert left == [("run", None), ("commit", 10), ("eval", 20), ("save", 20)]
    folder.truncate(None)
    assert [record["kind"] for record in runs.records(tmp_path)] == ["run"]
