"""Each task on two real ranks: the same losses as on one, and equal replicas."""

from __future__ import annotations

from pathlib import Path

import pytest
from launch import HVDLLM, launch, losses, records

pytestmark = pytest.mark.ranks
COMMON = (
    "precision=fp64", "schedule=constant", "log_every=1", "save_every=0", "sample_every=0", "eval_every=1000000",
    "audit_every=48", "device=cpu", "device.threads=1", "eval_tokens=64",
)  # fmt: skip
TASKS = {
    "masked_lm": ("model.layers=1", "model.width=16", "model.heads=2", "model.context=32", "text=files",
                  "text.tokenizer=bytes", "batch_tokens=40", "budget_tokens=160"),
    "images": ("model.width=4", "model.stages=1", "batch_tokens=24", "budget_tokens=96"),
    "ratings": ("model.width=4", "task.users=40", "task.items=20", "task.clicks=2000", "batch_tokens=24",
                "budget_tokens=96", "task.sparse=true"),
}  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_two_ranks_learn_what_one_learns(task: str, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for number in range(30):
        (tmp_path / "text" / f"{number}.txt").write_text(f"the quick brown fox {number} jumps over the lazy dog " * 5)
    own = [f"text.path={tmp_path}/text"] * (task == "masked_lm")
    words = [f"task={task}", *COMMON, *TASKS[task], *own, f"data_dir={tmp_path}/data", f"runs_dir={tmp_path}"]
    for how, size in (("alone", 1), ("gloo", 2)):
        launch([*HVDLLM, "train", *words, f"name={size}"], how, size)
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "2"), rel=1e-9)
    assert [record["replicas_agree"] for record in records(tmp_path / "2", "audit")].count(True) >= 2
