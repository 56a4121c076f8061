"""Damage shows: one flipped bit of any file of a run's folder, a lost line, tensors of another kind, a stray folder."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hvdllm import runs, sums
from hvdllm.checkpoint import read, whole, write
from hvdllm.cli import main
from hvdllm.config import compose
from hvdllm.errors import UserError
from hvdllm.exchange.base import State
from hvdllm.flat import Flat
from hvdllm.report.read import History
from hvdllm.report.read import read as read_run
from hvdllm.trainer.restore import restore
from hvdllm.world.single import SingleWorld

HERE = Path(__file__).parent
TINY = (
    "text=files text.tokenizer=bytes model.layers=1 model.width=8 model.heads=2 model.context=16 batch_tokens=128 "
    "budget_tokens=512 eval_every=256 save_every=256 sample_every=0 log_every=128 keep=2 eval_tokens=256 "
    f"device.threads=1 text.path={HERE}/text.txt text.validation={HERE}/valid.txt"
).split()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damage")
    assert main.main(["train", *TINY, f"runs_dir={folder}", f"data_dir={folder}/data", "name=a"]) == 0
    return folder / "a"


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "a")
    return tmp_path / "a"


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_whole_folder_says_nothing(run: Path) -> None:
    restore(run, None, pytest.fail)
    assert list(runs.records(run, pytest.fail)) and isinstance(found := read_run(run), History) and not found.notes
    shutil.rmtree(run / "checkpoints")
    assert restore(run, None, pytest.fail).source == run / "final"


@pytest.mark.parametrize("name", ["config.yaml", "tokenizer.json", "final/model.safetensors"])
def test_every_flipped_bit_is_seen(run: Path, name: str) -> None:
    """Of the last line of config.yaml, which has its sum, a flip may hide that there is one: that is said."""
    if name.startswith("final"):
        shutil.rmtree(run / "checkpoints")
    before = (run / name).read_bytes()
    bits = random.Random(0).sample(range(8 * len(before)), 40)
    for bit in bits:
        flip(run / name, bit)
        said: list[str] = []
        try:
            restore(run, None, said.append)
            assert name == "config.yaml" and said, bit
        except UserError as error:
            assert "\n" not in str(error)
        (run / name).write_bytes(before)


def test_sums_are_those_that_sha256sum_reads(run: Path) -> None:
    digest, name = (run / "final/model.safetensors.sha256").read_text().split()
    assert (digest, name) == (sums.of_file(run / "final/model.safetensors"), "model.safetensors")


def test_a_changed_digit_and_a_lost_line_of_the_records_show(run: Path) -> None:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    random.Random(1).shuffle(order := list(range(len(lines) - 1)))
    for number in order[:6]:
        digits = [at for at, letter in enumerate(lines[number]) if letter.isdigit()]
        at = digits[len(digits) // 2]
        changed = lines[number][:at] + str((int(lines[number][at]) + 1) % 10) + lines[number][at + 1 :]
        for text in (changed, ""):
            path.write_text("".join([*lines[:number], text, *lines[number + 1 :]]))
            said: list[str] = []
            list(runs.records(run, said.append))
            assert len(said) == 1 and "changed in line" in said[0], (number, text)
            found = read_run(run)
            assert number == 0 or (
                isinstance(found, History) and any("changed in line" in note for note in found.notes)
            )
    path.write_text("".join(lines)[:-20])  # what a kill cuts short is no damage
    list(runs.records(run, pytest.fail))


def test_a_report_takes_no_settings_from_a_damaged_file(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[1:]))  # without its `run` record
    assert isinstance(read_run(run), History)
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("seed: 0", "seed: 8"))
    assert "not what was written" in getattr(read_run(run), "why", "")


def test_a_resumed_run_keeps_the_trace_of_damage(run: Path) -> None:
    path = run / "metrics.jsonl"
    path.write_text(path.read_text().replace('"kind": "eval", "tokens": 256', '"kind": "eval", "tokens": 255'))
    words = ["train", f"resume={run}", "budget_tokens=1024", f"data_dir={run}/../data"]
    assert main.main([*words, *TINY[-2:]]) == 0
    records = list(runs.records(run, pytest.fail))
    assert any(r["kind"] == "event" and "changed in line" in r["what"] for r in records)


# ------------------------------------------------------------------ config.yaml: as the command line
@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("heads: 2", "heads: 0", "at least 1"),
        ("layers: 1", "layers: 0", "at least 1"),
        ("layers: 1", "layers: abc", "type int"),
        ("layers: 1", "layers: true", "type int"),
        ("layers: 1", "layers: 1.5", "type int"),
        ("layers: 1", "layers: null", "type int"),
        ("layers: 1", "layers: [1]", "type int"),
        ("layers: 1", "layers: 2001-01-01", "type int"),
        ("layers: 1", "layers: 999999999", "too large"),
        ("layers: 1", "layers: 2", "weights"),
        ("heads: 2", "heads: 3", "no multiple"),
        ("norm: ", "norm: other # ", "choose one of"),
        ("precision: fp32", "precision: fp33", "choose one of"),
        ("dropout: 0.0", "dropout: .nan", "dropout"),
        ("norm_eps: 1.0e-05", "norm_eps: .inf", "finite"),
        ("dropout: 0.0", "dropout: 7.5", "below 1"),
        ("bias: false", "bias: maybe", "type bool"),
        ("name: allreduce", "name: [a]", "unknown exchange"),
        ("seed: 0", "seed: -1", "at least 0"),
        ("seed: 0", "seeds: 0", "there is no setting `seeds`"),
    ],
)
def test_types_choices_and_bounds_of_a_folder(run: Path, old: str, new: str, says: str) -> None:
    text = (run / "config.yaml").read_text().rpartition(sums.ABOVE)[0]
    assert old in text
    (run / "config.yaml").write_text(sums.signed(text.replace(old, new, 1), {}))
    assert says in refused(lambda: restore(run, None, lambda said: None))


def test_what_a_folder_says_is_no_type_error_of_the_command_line(run: Path) -> None:
    """The command: one sentence, exit code 2."""
    text = (run / "config.yaml").read_text().replace("layers: 1", "layers: 0", 1)
    (run / "config.yaml").write_text(text)
    for command in ("sample", "evaluate"):
        assert main.main([command, str(run)]) == 2
    assert main.main(["train", f"resume={run}"]) == 2


def test_an_interpolation_stays_text(run: Path) -> None:
    values = compose.to_dict(runs.read_config(run)) | {"sample_prompt": "${oc.env:HOME}"}
    assert compose.from_dict(values).sample_prompt == "${oc.env:HOME}"


# ------------------------------------------------------------------ tensors
def rewritten(run: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """A checkpoint, and a final/, of other tensors, with sums that fit: a stranger's."""
    step = whole.steps(run)[-1]
    model = run / "final/model.safetensors"
    for path in (step / "rank-00000.safetensors", model):
        save_file(change(load_file(path)), path)
    manifest = json.loads((step / "manifest.json").read_text())
    manifest["sha256"] = {name: sums.of_file(step / name) for name in manifest["sha256"]}
    (step / "manifest.json").write_text(json.dumps(manifest))
    sums.beside(model).write_text(sums.line_for(model))


def is_weight(name: str) -> bool:
    return "/" not in name or name.startswith("model/")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x: {k: v.to(torch.int32) if is_weight(k) else v for k, v in x.items()}, "holds I32"),
        (lambda x: {k: v.to(torch.float16) if is_weight(k) else v for k, v in x.items()}, "holds F16"),
        (lambda x: {k: v * torch.nan if is_weight(k) else v for k, v in x.items()}, "not finite"),
        (lambda x: {k: v / 0 if is_weight(k) else v for k, v in x.items()}, "not finite"),
        (lambda x: x | {f"{k}2": v.clone() for k, v in x.items()}, "weights|has not"),
        (lambda x: x | {"m/other": torch.zeros(3)}, "has not|weights"),
        (lambda x: x | {"evil/norm.weight": torch.zeros(3)}, "has not|weights"),
        (lambda x: {k: v for k, v in x.items() if "norm" not in k}, "weights"),
        (lambda x: {k: v.reshape(-1).clone() for k, v in x.items()}, "another shape"),
    ],
)
@pytest.mark.parametrize("final", [False, True])
def test_tensors_of_another_kind_are_refused(run: Path, change: object, says: str, final: bool) -> None:
    import re

    rewritten(run, change)  # type: ignore[arg-type]
    if final:
        shutil.rmtree(run / "checkpoints")
        if says == "has not|weights" and "m/other" in load_file(run / "final/model.safetensors"):
            says = "has not"
    assert re.search(says, refused(lambda: restore(run, None, lambda said: None)))


# ------------------------------------------------------------------ a state that fits its sum and nothing else
STATES: list[tuple[str, object]] = [
    *[("shared", None), ("shared.tokens", "many"), ("shared.tokens", None), ("shared.step", []), ("shared", [1])],
    *[("mine", {}), ("mine", [3]), ("mine", []), ("horizon", "x"), ("horizon", None), ("data_hash", 3), ("kinds", 3)],
    *[("kinds", ["model", "m", "evil"]), ("kinds", [3]), ("stream", {}), ("stream.epoch", "x"), ("stream", None)],
    *[("due", {}), ("due.window", 3), ("due.tokens", "x"), ("due.pending", 7), ("due.last_eval", {"a": 1})],
    *[("seconds", "x"), ("due.straggler", {"seen": 3}), ("due.last_record", None)],
]


@pytest.mark.parametrize(("key", "value"), STATES)
def test_a_state_of_another_form_is_refused(run: Path, key: str, value: object) -> None:
    step = whole.steps(run)[-1]
    state = json.loads((step / "state.json").read_text())
    inner, names = state, key.split(".")
    for name in names[:-1]:
        inner = inner[name]
    inner[names[-1]] = value
    (step / "state.json").write_text(json.dumps(state))
    manifest = json.loads((step / "manifest.json").read_text())
    manifest["sha256"]["state.json"] = sums.of_file(step / "state.json")
    (step / "manifest.json").write_text(json.dumps(manifest))
    words = ["train", f"resume={run}", "budget_tokens=1024", *TINY[-2:], f"data_dir={run}/../data"]
    assert main.main(words) == 2


# ------------------------------------------------------------------ which checkpoints are whole
def save(folder: Path, step: int, keep: int) -> None:
    flat = Flat(nn.Linear(3, 2), 1, 1)
    state = State({"step": step, "tokens": step}, flat.pieces(0, 1), {"model": flat.x}, {})
    write.write(folder, flat, state, {}, SingleWorld(), keep)


def names(folder: Path) -> list[str]:
    return [path.name for path in whole.steps(folder)]


@pytest.mark.parametrize(
    "manifest", [{}, {"sha256": {}}, {"sha256": None}, {"sha256": {"state.json": "0" * 64}}, [], 3]
)
def test_a_manifest_that_names_nothing_is_not_whole(tmp_path: Path, manifest: object) -> None:
    save(tmp_path, 1, 9)
    save(tmp_path, 2, 9)
    (tmp_path / "checkpoints/2/manifest.json").write_text(json.dumps(manifest))
    said: list[str] = []
    assert read.newest(tmp_path, said.append) == tmp_path / "checkpoints/1" and "manifest" in said[0]


@pytest.mark.parametrize("name", ["../1/state.json", "/etc/hostname", "/dev/zero", "a/b", "manifest.json", "rank-1.pt"])
def test_a_manifest_names_files_of_a_checkpoint_alone(tmp_path: Path, name: str) -> None:
    save(tmp_path, 1, 9)
    path = tmp_path / "checkpoints/1/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["sha256"][name] = "0" * 64
    path.write_text(json.dumps(manifest))
    assert "no file of a checkpoint" in (read.broken(path.parent) or "")


@pytest.mark.parametrize("kind", ["pipe", "device", "link"])
def test_a_manifest_opens_no_pipe_and_no_device(tmp_path: Path, kind: str) -> None:
    save(tmp_path, 1, 9)
    path = tmp_path / "checkpoints/1/rank-00000.safetensors"
    path.rename(tmp_path / "moved")
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to({"device": "/dev/zero", "link": tmp_path / "moved"}[kind])
    assert "cannot be read" in (read.broken(path.parent) or "")


def test_a_file_that_no_manifest_names_is_seen(tmp_path: Path) -> None:
    save(tmp_path, 1, 9)
    save_file({"model/weight": torch.zeros(2, 3)}, tmp_path / "checkpoints/1/rank-00001.safetensors")
    assert "not named" in (read.broken(tmp_path / "checkpoints/1") or "")


def test_retention_counts_what_it_can_use(tmp_path: Path) -> None:
    """The newest is damaged, and keep is lowered to 1: what is written then is the last good one."""
    for step in (100, 200, 300):
        save(tmp_path, step, 3)
    flip(tmp_path / "checkpoints/300/rank-00000.safetensors", -1)
    save(tmp_path, 250, 1)
    assert read.newest(tmp_path, lambda said: None) == tmp_path / "checkpoints/250"
    assert names(tmp_path) == ["250", "300"]


def test_a_stray_folder_is_neither_counted_nor_deleted(tmp_path: Path) -> None:
    (tmp_path / "checkpoints/99999").mkdir(parents=True)
    (tmp_path / "checkpoints/99999/thesis").write_text("mine")
    for step in (1, 2, 3):
        save(tmp_path, step, 2)
        assert read.newest(tmp_path, lambda said: None) == tmp_path / f"checkpoints/{step}"
    assert names(tmp_path) == ["2", "3", "99999"] and (tmp_path / "checkpoints/99999/thesis").exists()


def test_a_damaged_older_one_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        save(tmp_path, step, 9)
    monkeypatch.setattr(write, "_WHOLE", set())  # another life
    flip(tmp_path / "checkpoints/2/rank-00000.safetensors", -1)
    save(tmp_path, 3, 2)
    assert names(tmp_path) == ["1", "2", "3"]
    save(tmp_path, 4, 2)
    assert names(tmp_path) == ["3", "4"]


def test_checkpoints_that_lie_elsewhere_are_not_deleted(run: Path, tmp_path: Path) -> None:
    """A stranger's folder, whose checkpoints/ is a link to a run of one's own."""
    (run / "checkpoints").rename(tmp_path / "precious")
    (run / "checkpoints").symlink_to(tmp_path / "precious")
    assert main.main(["train", f"resume={run}", "budget_tokens=1024", *TINY[-2:], f"data_dir={run}/../data"]) == 2
    assert sorted(path.name for path in (tmp_path / "precious").iterdir()) == ["2", "4"]
