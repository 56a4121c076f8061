"""Real ranks for tests: starts them, waits within a generous limit, ends what is left, and reads what they wrote.

Every process of a job carries a mark in its environment, so that also what lost its parent is found and ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]
RANKS = ROOT / "tests" / "ranks"
LIMIT_S = 120.0  # a hang guard, many times what any of these jobs takes
HVDLLM = [sys.executable, "-m", "hvdllm"]
MARK = "HVDLLM_TEST_JOB"
CONTEXT, SEQUENCES = 32, 22  # 22 sequences on 3 ranks: 8, 7 and 7; in micro-batches of 3: 3, 3 and 3, the last ragged
BATCH = CONTEXT * SEQUENCES
TINY = [
    f"text=files text.tokenizer=bytes model.layers=1 model.width=32 model.heads=2 model.kv_heads=null "
    f"model.context={CONTEXT} batch_tokens={BATCH} micro_batch=3 log_every={BATCH} exchange.bucket_mb=0.02 "
    "device.threads=1 eval_tokens=640 sample_tokens=8 eval_every=0 sample_every=0 optim.clip=0.5 schedule=constant"
][0].split()
CURVE = ("step", "tokens", "loss", "lr", "grad_norm")


def launcher(how: str, n: int) -> list[str]:
    horovodrun = [sys.executable, str(RANKS / "horovodrun")]
    return {
        "alone": [],
        "gloo": [*horovodrun, "--gloo", "-np", str(n)],
        "two hosts": [*horovodrun, "--gloo", "-np", str(n), "-H", f"localhost:{n // 2},127.0.0.1:{n // 2}"],
        "torchrun": ["torchrun", f"--nproc-per-node={n}", "--no-python"],
        "mpi": [*horovodrun, "--mpi", "-np", str(n)],
        "mpirun": ["mpirun", "--oversubscribe", "-np", str(n)],
    }[how]


def environment(**more: str) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "HOROVOD_", "OMPI_", "PMIX_", "SLURM_"))}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    env["PYTHONPATH"] = str(ROOT)
    env["OMPI_ALLOW_RUN_AS_ROOT"] = env["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] = "1"
    env["OMPI_MCA_mpi_yield_when_idle"] = "1"  # fewer cores than ranks
    if not shutil.which("ssh"):
        env["OMPI_MCA_plm"] = "isolated"
    return {**env, **more}


@dataclass(frozen=True)
class Done:
    code: int
    out: str  # stdout and stderr of launcher and ranks


class Job:
    """Processes under way. Use as a context: at its end nothing of them is left."""

    def __init__(self, words: list[str], how: str = "alone", n: int = 1, **env: str) -> None:
        self.mark = uuid.uuid4().hex
        self.file = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed in __exit__
        self.words = [*launcher(how, n), *words]
        self.process = subprocess.Popen(
            self.words, stdin=subprocess.DEVNULL, stdout=self.file, stderr=subprocess.STDOUT, start_new_session=True,
            env=environment(**{MARK: self.mark, **env}), cwd=ROOT,
        )  # fmt: skip

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()
        self.file.close()

    @property
    def out(self) -> str:
        self.file.seek(0)
        return self.file.read()

    def pids(self) -> dict[int, dict[str, str]]:
        """Living processes of this job, the launcher included, with the environment each was started with."""
        found = {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                env = (entry / "environ").read_bytes()
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                if f"{MARK}={self.mark}".encode() in env and state not in "ZX":
                    pairs = (word.partition("=") for word in env.decode(errors="replace").split("\0"))
                    found[int(entry.name)] = {key: value for key, _, value in pairs}
        return found

    def rank(self, rank: int) -> int:
        """The process that is this rank."""
        names = ("HOROVOD_RANK", "OMPI_COMM_WORLD_RANK")
        return max(pid for pid, env in self.pids().items() if str(rank) in (env.get(name) for name in names))

    def signal(self, number: int) -> None:
        """As a terminal's Ctrl-C does: to the launcher and what shares its process group, not to its ranks."""
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """SIGKILL to all of them."""
        while pids := self.pids():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.poll()
            time.sleep(0.01)
        self.process.wait()

    def until_gone(self, limit_s: float = 60.0) -> None:
        """Polls until none of its processes lives."""
        end = time.monotonic() + limit_s
        while (left := self.pids()) and time.monotonic() < end:
            time.sleep(0.1)
        assert not left, f"{len(left)} processes are left\n{self.out}"

    def until(self, what: Callable[[], bool], limit_s: float = LIMIT_S) -> None:
        """Polls; fails, with all output, if it takes too long or the job ends before."""
        end = time.monotonic() + limit_s
        while not what():
            ended = self.process.poll() is not None
            if (ended and not what()) or time.monotonic() > end:
                raise AssertionError(f"{'ended' if ended else 'no progress'}: {self.words}\n{self.out}")
            time.sleep(0.02)

    def wait(self, limit_s: float = LIMIT_S) -> Done:
        try:
            code = self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running after {limit_s} s: {self.words}\n{self.out}") from None
        return Done(code, self.out)


def launch(words: list[str], how: str = "alone", n: int = 1, code: int | None = 0, **env: str) -> Done:
    """Runs to the end. code: what it must return, None: anything but 0."""
    with Job(words, how, n, **env) as job:
        done = job.wait()
    assert (done.code != 0) if code is None else (done.code == code), f"code {done.code}: {job.words}\n{done.out}"
    return done


def runs(specs: list[dict[str, Any]], n: int, tmp: Path, how: str = "gloo") -> None:
    """Several trainings, one after the other, in one start of n ranks; n=1 alone, or virtual where the words say so.
    See ranks/body_runs.py."""
    path = tmp / f"specs-{uuid.uuid4().hex[:6]}.json"
    path.write_text(json.dumps(specs))
    launch([sys.executable, str(RANKS / "body_runs.py"), str(path)], "alone" if n == 1 else how, n)


def meddled(words: list[str], **do: Any) -> list[str]:
    """The command of `hvdllm train` with a meddler in every rank. See ranks/meddle.py."""
    return [sys.executable, str(RANKS / "body_train.py"), json.dumps(do), *words]


# ------------------------------------------------------------------ what a run reads and leaves
def write_text(folder: Path, seed: int = 0, letters: int = 10_000) -> Path:
    """A text of its own: words of a small vocabulary, in train.txt and validation.txt."""
    draw = random.Random(seed)
    vocabulary = ["".join(draw.choices("abcdefghij", k=draw.randint(1, 6))) for _ in range(60)]
    folder.mkdir(parents=True, exist_ok=True)
    for name, length in (("train.txt", letters), ("validation.txt", 2_000)):
        text = " ".join(draw.choices(vocabulary, k=length))[:length]
        (folder / name).write_text(text)
    return folder


def words_of(tmp: Path, name: str, steps: int, *more: str) -> list[str]:
    """Settings of a tiny run in tmp/runs/<name>; words in `more` win. For fedavg the text is twelve documents,
    since a client gets whole ones."""
    if not (tmp / "text").exists():
        write_text(tmp / "text")
    text = "documents" if "exchange=fedavg" in more else "text/train.txt"
    if not (tmp / text).exists():
        words = (tmp / "text" / "train.txt").read_text().split()
        (tmp / text).mkdir()
        for k in range(12):
            (tmp / text / f"{k}.txt").write_text(" ".join(words[k::12]))
    own = [
        f"text.path={tmp}/{text}", f"text.validation={tmp}/text/validation.txt", f"data_dir={tmp}/data",
        f"runs_dir={tmp}/runs", f"name={name}", f"budget_tokens={steps * BATCH}", f"save_every={10**9}",
    ]  # fmt: skip
    last = {word.partition("=")[0]: word for word in (*TINY, *own, *more)}
    return list(last.values())


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    """Whole lines only: the run may be writing. Without their sums, which chain what the host's clock says."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]
    found = [{k: v for k, v in json.loads(line).items() if k != "sum"} for line in lines]
    return [record for record in found if record["kind"] == kind]


def curve(run: Path) -> list[tuple[float, ...]]:
    """What must be bit-equal in two runs that are the same."""
    return [tuple(record[key] for key in CURVE) for record in records(run, "commit")]


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in records(run, "commit")]


def weights(run: Path) -> dict[str, Any]:
    """final/, by parameter name."""
    with safe_open(run / "final" / "model.safetensors", framework="pt") as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - not a dict


def same_bits(run: Path, other: Path) -> bool:
    """The same curve, without gaps or doubles, and the same final weights."""
    a, b = weights(run), weights(other)
    return curve(run) == curve(other) and a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)
