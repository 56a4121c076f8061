"""A folder of a run may be a stranger's: it shapes numbers alone, and nothing is started, sent or opened for it."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from hvdllm import registry, runs, sums
from hvdllm.cli import main
from hvdllm.config import compose
from hvdllm.config.words import of
from hvdllm.errors import UserError
from hvdllm.launch import base, horovodrun, slurm, sweep
from hvdllm.launch import parts as launchers
from hvdllm.settings import Config
from hvdllm.text import parts as texts
from hvdllm.track import parts as trackers
from hvdllm.trainer.resume import asked

HERE = Path(__file__).parent
SECRET = "HVDLLM_TEST_SECRET"


def folder_of(path: Path, *words: str, **changes: Any) -> Path:
    """A run's folder with the configuration of these words, changed as a stranger would who sums it anew."""
    folder = runs.Folder(path / "theirs")
    folder.create(compose.compose(["name=theirs", of("runs_dir", str(path)), *words]))
    folder.record("run", {"overrides": list(words)})
    folder.close()
    values = yaml.safe_load((folder.path / "config.yaml").read_text())
    for key, value in changes.items():
        group, _, name = key.partition("__")
        (values if not name else values[group])[name or group] = value
    (folder.path / "config.yaml").write_text(sums.signed(yaml.safe_dump(values), {}))
    return folder.path


def test_nothing_is_started_and_nobody_is_told(tmp_path: Path) -> None:
    words = ["launch=horovodrun", "launch.hosts='host.invalid:1,localhost:1'", "track=wandb", "device.threads=3"]
    folder = folder_of(tmp_path, *words, "seed=7", "exchange=delayed", "optim.lr=0.5", "data_dir=/somewhere")
    said: list[str] = []
    config, words = asked([f"resume={folder}"], said.append)
    assert (config.seed, config.optim.lr, registry.name_of("exchange", config.exchange)) == (7, 0.5, "delayed")
    assert isinstance(config.launch, launchers.Local) and isinstance(config.track, trackers.NoTracker)
    assert config.data_dir is None and config.device.threads is None
    assert [word.partition("=")[0] for word in words] == ["resume", "name", "runs_dir"]
    assert len(said) == 1 and all(
        word in said[0] for word in ("launch=horovodrun", "track=wandb", "data_dir=/somewhere")
    )


def test_records_are_no_words(tmp_path: Path) -> None:
    """Before, `overrides` of the first record were obeyed, whatever they said."""
    folder = folder_of(tmp_path, "seed=7")
    lines = (folder / "metrics.jsonl").read_text().replace('"seed=7"', '"launch=slurm", "seed=9", "track=wandb"')
    (folder / "metrics.jsonl").write_text(lines)
    config, _ = asked([f"resume={folder}"])
    assert config.seed == 7 and isinstance(config.launch, launchers.Local)


def test_each_setting_is_taken_or_is_ours(tmp_path: Path) -> None:
    """One list: what is marked `ours` keeps its default, everything else is the folder's."""
    ours = {f.name for f in dataclasses.fields(Config) if f.metadata["ours"]}
    assert ours == {
        "name", "runs_dir", "data_dir", "resume", "init_from", "plugins", "world", "device", "launch", "track",
        "debug",
    }  # fmt: skip
    files = {f.name for f in dataclasses.fields(texts.Files) if f.metadata["ours"]}
    assert files == {"tokenizer", "validation", "path", "prepared"}
    words = ["seed=3", "optim=sgd", "optim.momentum=0.5", "schedule=wsd", "wire=int8", "model.layers=2", "keep=9"]
    folder = folder_of(tmp_path, *words, "exchange=local_sgd", "precision=bf16", "sample_prompt='a,b'", "eval_every=0")
    theirs, config = runs.read_config(folder), asked([f"resume={folder}"])[0]
    for f in dataclasses.fields(Config):
        if f.name not in ours:
            assert getattr(config, f.name) == getattr(theirs, f.name), f.name


@pytest.mark.parametrize(
    ("word", "value"), [("optim.lr=0.25", 0.25), ("optim=sgd", 0.1), ("optim=adamw", 0.5)]
)  # of a group that is chosen anew nothing stays but where it is the folder's own
def test_words_win_over_a_folder(tmp_path: Path, word: str, value: float) -> None:
    assert asked([f"resume={folder_of(tmp_path, 'optim.lr=0.5')}", word])[0].optim.lr == value


def test_logical_ranks_are_numbers_and_processes_are_not(tmp_path: Path) -> None:
    config, _ = asked([f"resume={folder_of(tmp_path, 'world=virtual', 'world.size=6')}"])
    assert (config.world.kind, config.world.size) == ("virtual", 6)
    many = folder_of(tmp_path / "c", "world=virtual", world__size=10**7)
    with pytest.raises(UserError, match="at most 4,096"):
        sweep.prepare(asked([f"resume={many}"])[0])
    config, _ = asked([f"resume={folder_of(tmp_path / 'b', 'world=torch', 'world.timeout_s=7')}"])
    assert (config.world.kind, config.world.timeout_s) == ("auto", 1800.0)


@pytest.mark.parametrize("text", [f"${{oc.env:{SECRET}}}", "${seed}", "\\${a}", 'a"b\\', "a\nb", "'", "\\\\${x}\\\\"])
def test_nothing_in_a_folder_is_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Neither in its settings nor in its name, nor in the words that another process gets."""
    monkeypatch.setenv(SECRET, "gold")
    path = tmp_path / text.replace("/", "_")
    path.mkdir()
    folder = folder_of(path, sample_prompt=text)
    config, words = asked([f"resume={folder}"])
    assert config.sample_prompt == text and Path(config.runs_dir, config.name or "") == folder
    again, _ = asked(words)
    assert again == config
    point = sweep.point_of(config, words)
    assert asked(list(point.words))[0] == dataclasses.replace(config, launch=again.launch)
    assert "gold" not in json.dumps(compose.to_dict(again))


# ------------------------------------------------------------------ files of text
def test_files_of_text_are_named_again_or_known_by_their_hash(tmp_path: Path) -> None:
    private = tmp_path / "private.txt"
    private.write_text("the owner's\n" * 99)
    folder = folder_of(tmp_path, "text=files", f"text.path={private}")
    with pytest.raises(UserError, match=r"give text.path=.*private.txt again") as error:
        asked([f"resume={folder}", f"data_dir={tmp_path}/none"])
    assert "\n" not in str(error.value)
    assert asked([f"resume={folder}", "text.path=mine.txt"])[0].text.path == "mine.txt"


def test_a_prepared_text_of_a_folder_is_not_ours(tmp_path: Path) -> None:
    """Else it would win over the files that are named."""
    folder = folder_of(tmp_path, "text=files", "text.path=theirs.txt", text__prepared="0" * 64)
    text = asked([f"resume={folder}", "text.path=mine.txt"])[0].text
    assert text.path == "mine.txt" and text.prepared is None


def test_a_tokenizer_of_a_folder_is_a_file_too(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, text__tokenizer="/etc/passwd")
    with pytest.raises(UserError, match=r"give text\.tokenizer=/etc/passwd again"):
        asked([f"resume={folder}", f"data_dir={tmp_path}/none"])


def test_weights_from_elsewhere_are_not_fetched(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, init_from="/home/somebody/run")
    with pytest.raises(UserError, match="give init_from=/home/somebody/run again"):
        asked([f"resume={folder}"])
    (folder / "checkpoints" / "3").mkdir()
    assert asked([f"resume={folder}"])[0].init_from == "/home/somebody/run"  # a label: the checkpoint is what counts


# ------------------------------------------------------------------ command lines
@pytest.mark.parametrize(
    "words",
    [
        ["launch=horovodrun", "launch.interface='lo; touch x'"],
        ["launch=horovodrun", "launch.interface=-x"],
        ["launch=horovodrun", "launch.interface='$(id)'"],
        ["launch=horovodrun", "launch.hosts='-oProxyCommand=id:1'"],
        ["launch=horovodrun", "launch.hosts='a b:1'"],
        ["launch=slurm", "launch.partition='a b'"],
        ["launch=slurm", "launch.account=-x"],
        ["launch=slurm", "launch.time='1 --export=ALL'"],
        ["launch=slurm", "launch.interface='a b'"],
        ["launch=slurm", "launch.modules=[cuda,'x; id']"],
        ["launch=slurm", "launch.modules=-f"],
        ["launch.sweep=-x"],
        ["name=-x"],
        ["name='a\nb'"],
    ],
)
def test_what_reaches_a_command_line_has_a_strict_form(words: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        sweep.prepare(compose.compose([*words, f"runs_dir={tmp_path}"]))
    assert "\n" not in str(error.value)


def test_options_of_sbatch_are_the_users_own(tmp_path: Path) -> None:
    """His command line says what it likes; a folder's never arrives."""
    mine = compose.compose(["launch=slurm", "launch.options='--constraint=a100 --export=ALL'"]).launch
    assert slurm.options(base.Point("a", str(tmp_path), ()), mine)[-2:] == ["--constraint=a100", "--export=ALL"]
    folder = folder_of(tmp_path, "launch=slurm", "launch.options='--export=ALL,LD_PRELOAD=/x.so'")
    config, _ = asked([f"resume={folder}", "launch=slurm"])
    assert not any("LD_PRELOAD" in word for word in slurm.options(base.Point("a", str(tmp_path), ()), config.launch))


def test_a_batch_scripts_comment_stays_one_line(tmp_path: Path) -> None:
    settings = compose.compose(["launch=slurm"]).launch
    point = base.Point("a", str(tmp_path), ("seed=1",))
    text = slurm.text_of(point, settings, ["sbatch", "--comment=a\ntouch /tmp/x\n"])
    assert [line for line in text.splitlines() if line.startswith("touch")] == []


def test_hosts_that_fit_still_start(tmp_path: Path) -> None:
    words = ["launch=horovodrun", "launch.hosts='node-1.example.org:1,me@10.0.0.2:1'", "launch.interface='ib0,eth0.10'"]
    horovodrun.ready(compose.compose(words).launch)


# ------------------------------------------------------------------ the folder that an older version made
@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(HERE / "old-run", tmp_path / "runs" / "old-run")
    for name in ("text.txt", "valid.txt"):
        shutil.copy(HERE / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "runs" / "old-run"


def test_a_folder_without_sums_is_read_with_a_sentence(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["evaluate", str(old), "text.path=text.txt", "text.validation=valid.txt", "--json"]) == 0
    out, err = capsys.readouterr()
    assert abs(json.loads(out)["loss"] - 5.644330978393555) < 1e-4
    assert "config.yaml has no sum, it is of an older version" in err
    assert main.main(["sample", str(old), "line", "--tokens", "5"]) == 0


def test_a_folder_without_sums_goes_on_and_has_them_then(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"resume={old}", "text.path=text.txt", "text.validation=valid.txt", "budget_tokens=1536"]
    assert main.main(["train", *words]) == 0
    out = "".join(capsys.readouterr())
    assert "goes on   from 1,024 tokens" in out and "metrics.jsonl has no sums" in out
    said: list[str] = []
    records = list(runs.records(old, said.append))
    assert not said and records[-1]["kind"] == "end" and records[-1]["tokens"] == 1536
    assert any("has no sums" in str(record.get("what")) for record in records)
    runs.read_config(old, pytest.fail)
    # Its text is prepared here now: it need not be named again.
    assert main.main(["train", f"resume={old}", "budget_tokens=2048"]) == 0
    assert main.main(["evaluate", str(old)]) == 0
    assert not os.path.exists(old / "launch.log")
