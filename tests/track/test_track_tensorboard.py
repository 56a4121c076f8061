"""TensorBoard's files read back by its own reader."""

from __future__ import annotations

import signal
from pathlib import Path

from launch import BATCH, HVDLLM, Job, launch, meddled, records, words_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def test_a_run_that_was_killed_and_went_on_is_one_curve(tmp_path: Path) -> None:
    more = ["keep=9", f"save_every={2 * BATCH}", f"eval_every={3 * BATCH}", f"sample_every={3 * BATCH}"]
    words, run = words_of(tmp_path, "a", 7, "track=tensorboard", *more), tmp_path / "runs" / "a"
    with Job(meddled(words, kill=[0, 6], slow_s=0.1)) as job:
        assert job.wait().code == -signal.SIGKILL
        job.until_gone()
    (run / "checkpoints" / "4" / "state.json").unlink()  # so that it goes back to step 2
    (run / "checkpoints" / "6" / "state.json").unlink(missing_ok=True)
    launch([*HVDLLM, "train", *words])
    found = EventAccumulator(str(run / "tensorboard"))
    found.Reload()
    commits, evals = records(run, "commit"), records(run, "eval")
    losses = {event.step: event.value for event in found.Scalars("train/loss")}
    assert sorted(losses) == [r["tokens"] for r in commits] == [BATCH * step for step in range(1, 8)]
    assert all(abs(losses[r["tokens"]] - r["loss"]) < 1e-5 for r in commits)
    assert [event.step for event in found.Scalars("eval/loss")] == [r["tokens"] for r in evals]
    (sample,) = {event.step for event in found.Tensors("sample/text")} - {3 * BATCH, 6 * BATCH}
    assert sample == 7 * BATCH and found.Scalars("end/loss")[0].step == 7 * BATCH
    assert len(list((run / "tensorboard").iterdir())) == 2 and (run / "track.log").read_text() == ""
