"""Real ranks for tests: starts them, waits within a generous limit, ends what is left, and reads what they wrote.

How they are started is a word or two:

    alone              without a launcher
    gloo, two hosts    by the fork server as horovodrun --gloo does, the second as on two machines
    mpi, mpirun        by horovodrun --mpi, and by Open MPI's launcher
    torchrun           by that of PyTorch

In each of these the ranks are forks of a process that has imported everything (ranks/pool.py). With `real ` before it
nothing is: the launcher is horovodrun where it is Gloo, and every rank is a command of its own.

Every process of a job carries a mark in its environment, or has the session of one that the job started, so that also
what lost its parent is found and ended.
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
from typing import TYPE_CHECKING, Any

from ranks.pool import ADDRESS, Forked, address, forkable
from safetensors import safe_open

if TYPE_CHECKING:
    from hvdllm.launch.meeting import MeetingPoint

ROOT = Path(__file__).resolve().parents[1]
RANKS = ROOT / "tests" / "ranks"
LIMIT_S = 120.0  # a hang guard, many times what any of these jobs takes
HVDLLM = [sys.executable, "-m", "hvdllm"]
MARK = "HVDLLM_TEST_JOB"
TOLD = "HVDLLM_TEST_PIDS"
CONTEXT, SEQUENCES = 32, 22  # 22 sequences on 3 ranks: 8, 7 and 7; in micro-batches of 3: 3, 3 and 3, the last ragged
BATCH = CONTEXT * SEQUENCES
TINY = [
    f"text=files text.tokenizer=bytes model.layers=1 model.width=32 model.heads=2 model.kv_heads=null "
    f"model.context={CONTEXT} batch_tokens={BATCH} micro_batch=3 log_every={BATCH} exchange.bucket_mb=0.02 "
    "device.threads=1 eval_tokens=640 sample_tokens=8 eval_every=0 sample_every=0 optim.clip=0.5 schedule=constant"
][0].split()
CURVE = ("step", "tokens", "loss", "lr", "grad_norm")


def launcher(how: str, n: int) -> list[str]:
    """The words before those of the program; none for what needs no launcher."""
    horovodrun = [sys.executable, str(RANKS / "horovodrun")]
    gloo = [*horovodrun, "--gloo", "-np", str(n)]
    return {
        "alone": [],
        "gloo": gloo,
        "two hosts": [*gloo, "-H", hosts("two hosts", n)],
        "torchrun": ["torchrun", f"--nproc-per-node={n}", "--no-python"],
        "mpi": [*horovodrun, "--mpi", "-np", str(n)],
        "mpirun": ["mpirun", "--oversubscribe", "-np", str(n)],
    }[how]


def hosts(how: str, n: int) -> str:
    """As horovodrun's -H has them: this machine, by one name or by two."""
    return f"localhost:{n // 2},127.0.0.1:{n // 2}" if how == "two hosts" else f"localhost:{n}"


def slots(how: str, n: int) -> tuple[MeetingPoint, list[dict[str, str]]]:
    """Where n ranks will meet over Gloo, and what the environment of each says of that and of its place, as
    horovodrun puts it. Close the meeting point once they have ended."""
    from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts

    from hvdllm.launch import meeting

    plan = get_host_assignments(parse_hosts(hosts(how, n)), n)
    point = meeting.MeetingPoint("127.0.0.1", plan)
    shared = {**point.variables("127.0.0.1"), "HOROVOD_GLOO_IFACE": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    return point, [{**shared, **place} for place in meeting.places(plan)]


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
        self.file = tempfile.TemporaryFile("a+", errors="replace")  # noqa: SIM115 - closed in __exit__
        self.words = words
        self.point: MeetingPoint | None = None
        self.told = Path(tempfile.gettempdir(), f"hvdllm-test-{self.mark}")  # by stand-ins: whom they stand for
        env = environment(**{MARK: self.mark, **env})
        self.process: Forked | subprocess.Popen[bytes]
        kind, forked = how.removeprefix("real "), not how.startswith("real ") and forkable(words)
        if forked:
            env |= {ADDRESS: address(), TOLD: str(self.told)}
        if forked and kind == "alone":
            self.process = Forked(words, [env], self.file.fileno(), alone=True)
        elif forked and kind in ("gloo", "two hosts"):
            self.point, places = slots(kind, n)
            self.process = Forked(words, [{**env, **place} for place in places], self.file.fileno(), alone=False)
        else:
            if forked:
                words = [sys.executable, "-S", str(RANKS / "stand_in.py"), *words]
            self.words = [*launcher(kind, n), *words]
            self.process = subprocess.Popen(
                self.words, stdin=subprocess.DEVNULL, stdout=self.file, stderr=subprocess.STDOUT, env=env, cwd=ROOT,
                start_new_session=True,
            )  # fmt: skip

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()
        self.file.close()
        self.told.unlink(missing_ok=True)
        if self.point:
            self.point.close()

    @property
    def out(self) -> str:
        self.file.seek(0)
        return self.file.read()

    def pids(self) -> dict[int, dict[str, str]]:
        """Living processes of this job, the launcher included, with the environment each was started with (that of the
        fork server for its forks)."""
        sessions = {self.process.pid, *self.forks().values()}
        found = {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                env = (entry / "environ").read_bytes()
                state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                if (int(session) in sessions or f"{MARK}={self.mark}".encode() in env) and state not in "ZX":
                    pairs = (word.partition("=") for word in env.decode(errors="replace").split("\0"))
                    found[int(entry.name)] = {key: value for key, _, value in pairs}
        return found

    def forks(self) -> dict[int, int]:
        """Pid of each rank that is a fork."""
        if isinstance(self.process, Forked):
            return dict(enumerate(self.process.ranks))
        if not self.told.exists():
            return {}
        return {int(rank): int(pid) for rank, pid in (line.split() for line in self.told.read_text().splitlines())}

    def rank(self, rank: int) -> int:
        """The process that is this rank. Raises ValueError if there is none, or none any more."""
        living = self.pids()
        if forks := self.forks():
            return max(pid for each, pid in forks.items() if each == rank and pid in living)
        names = ("HOROVOD_RANK", "OMPI_COMM_WORLD_RANK")
        found = [pid for pid, env in living.items() if str(rank) in (env.get(name) for name in names)]
        return max(pid for pid in found if not self.reads(pid))

    @staticmethod
    def reads(pid: int) -> bool:
        """Whether a process is the reader of a stream, which has the environment of the rank that started it."""
        with contextlib.suppress(OSError):
            return b"hvdllm.online.reader" in Path(f"/proc/{pid}/cmdline").read_bytes()
        return False

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
        end = time.monotonic() + 10.0
        while any(Path("/proc", str(pid)).exists() for pid in self.forks().values()) and time.monotonic() < end:
            time.sleep(0.01)  # until the fork server has reaped them: their number is in the lock of a run

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
