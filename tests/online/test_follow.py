"""`publish_every`, and `hvdllm sample --follow` beside a run that publishes."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from launch import Job
from log_kit import SHORT, fill, trained, values
from safetensors.torch import load_file

from hvdllm.checkpoint.write import PUBLICATION
from hvdllm.cli import sample
from hvdllm.cli.main import main
from hvdllm.runs import Say


def published(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "published").iterdir() if PUBLICATION.fullmatch(path.name))


@pytest.mark.parametrize(
    "exchange",
    ["allreduce", "delayed", "local_sgd", pytest.param("diloco", marks=pytest.mark.thorough), "parameter_server"],
)
def test_the_last_publication_holds_the_weights_of_final(tmp_path: Path, exchange: str) -> None:
    """Seen to catch: a rank's own weights in place of the consensus, an anchor that misses what settling commits."""
    fill(tmp_path / "log", 240)
    size = 3 if exchange == "parameter_server" else 2
    more = ["world=virtual", f"world.size={size}", f"exchange={exchange}", *SHORT.get(exchange, ())]
    records = trained(tmp_path, *more, "publish_every=768", "eval_every=0")
    folder = tmp_path / "a"
    (*_, last) = [record for record in records if record["kind"] == "publish"]
    assert [int(name) for name in published(folder)] == values(records, "tokens", "publish")[-2:]
    assert last["path"].endswith(os.readlink(folder / "published" / "latest"))
    ours, final = (load_file(folder / name / "model.safetensors") for name in ("published/latest", "final"))
    assert ours.keys() == final.keys() and all(torch.equal(ours[name], final[name]) for name in ours)


def test_adapters_are_published_as_final_has_them(tmp_path: Path) -> None:
    fill(tmp_path / "log", 240)
    trained(tmp_path)
    begun = [f"init_from={tmp_path / 'a'}", "model.lora_rank=2", "publish_every=960"]
    trained(tmp_path, *begun, name="b")
    ours, final = (load_file(tmp_path / "b" / name / "model.safetensors") for name in ("published/latest", "final"))
    assert ours.keys() == final.keys() and all("adapters" in name for name in ours)
    assert next(sample.publications(tmp_path / "b")).name == os.readlink(tmp_path / "b" / "published" / "latest")


def test_it_follows_and_survives_a_publication_that_is_pruned_while_it_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path / "log", 240)
    trained(tmp_path, "publish_every=960")
    folder = tmp_path / "a" / "published"
    first, second = published(tmp_path / "a")
    (folder / "latest").unlink()
    (folder / "latest").symlink_to(first)
    from hvdllm.trainer import restore

    real, steps = restore.check_final, iter(["pruned", "read"])

    def check(final: Path, say: Say) -> None:
        if next(steps) == "pruned":
            (folder / ".latest").symlink_to(second)
            os.replace(folder / ".latest", folder / "latest")
            shutil.rmtree(folder / first)
        real(final, say)

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(restore, "check_final", check)
    monkeypatch.setattr(sample.time, "sleep", interrupt)
    capsys.readouterr()
    assert main(["sample", str(tmp_path / "a"), "the", "--follow", "--tokens", "4"]) == 0
    found = capsys.readouterr()
    assert found.out.startswith(f"--- {int(second):,} tokens\nthe") and found.out.count("---") == 1 and not found.err


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: shutil.rmtree(folder), "no config.yaml"),
        (
            lambda folder: (next(folder.glob("published/0*1920")) / "model.safetensors").write_bytes(b"x"),
            "copy it again",
        ),
    ],
)
def test_what_cannot_be_followed_is_a_sentence(
    tmp_path: Path, damage: object, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path / "log", 240)
    trained(tmp_path, "publish_every=960")
    damage(tmp_path / "a")  # type: ignore[operator]
    capsys.readouterr()
    assert main(["sample", str(tmp_path / "a"), "--follow"]) == 2
    found = capsys.readouterr().err.splitlines()
    assert len(found) == 1 and said in found[0]


def test_ctrl_c_ends_it_quietly(tmp_path: Path) -> None:
    fill(tmp_path / "log", 240)
    trained(tmp_path, "publish_every=960")
    with Job(
        [sys.executable, "-m", "hvdllm", "sample", str(tmp_path / "a"), "the", "--follow", "--tokens", "4"]
    ) as job:
        job.until(lambda: "---" in job.out)
        os.kill(job.process.pid, signal.SIGINT)
        done = job.wait()
    assert done.code == 0 and "Traceback" not in done.out and done.out.count("---") == 1
