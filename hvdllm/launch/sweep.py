"""`hvdllm train -m`: each point of a sweep is a run, in a folder that the same command finds again.

runs/<sweep>/
  sweep.json      the command, its words, and all points there have been, each with its name and the words that vary
  <point>/        an ordinary run, and launch.log with all that its ranks printed in all its lives

A point is named by what varies (exchange=delayed,seed=1). A sweep is named by launch.sweep, or by its experiment and a
hash of the words that do not vary and of the keys of those that do, so another value of a key is a further point of the
same sweep. For all points it is decided before the first begins what is finished, what goes on and what is refused, by
the function that a rank uses (trainer/resume.decide).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from hvdllm import registry, runs, untrusted
from hvdllm.config import compose
from hvdllm.config.check import check
from hvdllm.config.words import expand, is_text, key_of, last, of, plain, typed, value_of
from hvdllm.durations import duration
from hvdllm.errors import STOPPED, RunError, UserError
from hvdllm.launch import local
from hvdllm.launch.base import TERMINAL, Launcher, Point
from hvdllm.launch.parts import Launch, Local
from hvdllm.launch.progress import Display, pass_on
from hvdllm.launch.watched import Task
from hvdllm.paths import check_name
from hvdllm.settings import Config

LAUNCHED = "HVDLLM_LAUNCHED"  # variable in the environment of what is started here, which must not launch again
MOST_SWEEP = 64 * 2**20  # the most bytes of a sweep.json
LONGEST = 200  # the most characters of a folder's name; most file systems take 255 bytes
# Settings that change where and how a run is started and followed, or how many points there are, but not what is
# compared.
NOT_OF_THE_SWEEP = re.compile(
    r"runs_dir|data_dir|resume|keep|track(\..*)?|--config-dir|hydra\.sweeper\.(n_trials|n_jobs|max_failure_rate)"
    r"|launch\.(?!np$|nodes$|ranks_per_node$|link$|controller$|how$).*"
)
FIXED = ("runs_dir", "name", "resume", "launch.sweep", "launch.parallel")  # the same for all points
SAID = re.compile(r"(?:\[[\d,]+\]<std(?:err|out)>:\s?)?hvdllm: (.*)")


def each_once(words: list[str]) -> list[str]:
    """The words with each key once. Of several words for a key the last counts. A word with several values stays
    whole."""
    each = [one for word in words for one in ([word] if is_sweep(word) else expand(word))]
    return list({key_of(word): word for word in each}.values())


# ------------------------------------------------------------------ the two commands
def run(words: list[str], show: Callable[[str], None] = print) -> int:
    """Runs a sweep.

    Args:
        words: of `train -m`.
        show: prints a line.

    Returns the exit code: 1 if a point failed, else STOPPED if one is not finished, else 0.

    Raises UserError if the words cannot work.
    """
    from hvdllm.launch import hydra

    if last(words, "resume", "auto") not in ("auto", "never", "must"):
        raise UserError("resume=RUN is for one run: the same command as before goes on with a sweep")
    words = each_once(words)
    sweep: Sweep | None = None

    def make(trials: int | None) -> hydra.Task:
        nonlocal sweep
        sweep = Sweep(words, trials, show)
        return sweep.batch

    try:
        with contextlib.suppress(hydra.SweepEnded):
            hydra.drive(words, make)
    finally:
        if sweep is not None:
            sweep.conclude()
    states = {task.state for task in sweep.tasks.values()} if sweep is not None else {"failed"}
    return 1 if "failed" in states else 0 if states <= {"done"} else STOPPED


def one(config: Config, words: list[str], show: Callable[[str], None] = print) -> int:
    """Starts one run by a launcher (`train launch=horovodrun` or `launch=slurm`) and passes its output on.

    Args:
        config: the composed settings.
        words: from which they were composed.
        show: prints a line.

    Returns the exit code of the run. Raises UserError if it cannot be started.
    """
    from hvdllm.trainer.resume import decide

    config.name = config.name or runs.new_name()
    task = Task(point_of(config, [*words, *share_of_cores(config)]), config, ())
    prepare(config)
    start = decide(config, show)
    if start.finished:
        show(start.finished)
        return 0
    stop, log = threading.Event(), Path(task.point.folder, "launch.log")
    before = lives(task.point.folder)
    codes: list[int | Exception] = []

    def launch() -> None:
        try:
            codes.append(launcher_of(config.launch).launch(task.point, config.launch, stop, show))
        except Exception as error:
            codes.append(error)

    with (
        terminal(config),
        environment(),
        asked_to_stop(stop, "asking the run to save and to end; Ctrl-C again ends it at once"),
    ):
        at = log.stat().st_size if log.exists() else 0
        thread = threading.Thread(target=launch, name="launch")
        thread.start()
        try:
            while thread.is_alive():
                thread.join(0.1)
                at = pass_on(log, at)
        finally:
            thread.join()
            pass_on(log, at, rest=True)
    if isinstance(code := codes[0], Exception):
        raise code
    return STOPPED if stopped_since(task.point.folder, before) else code


# ------------------------------------------------------------------ a sweep
class Sweep:
    """A sweep. batch() runs points and returns their losses, and conclude() prints the results.

    Args:
        words: of `train -m`.
        trials: of an optimizer, or None if all points are known from the start.
        show: prints a line.
    """

    def __init__(self, words: list[str], trials: int | None, show: Callable[[str], None]) -> None:
        self.words, self.trials, self.show = words, trials, show
        self.fixed = {key_of(word) for word in words if not is_sweep(word)}
        self.tasks: dict[str, Task] = {}
        self.stop = threading.Event()
        self.began = False  # whether all points of the first batch have been checked
        self.folder: Path | None = None
        self.crashed: BaseException | None = None

    def batch(self, jobs: Sequence[Sequence[str]]) -> list[float | None]:
        """Composes and checks all points of a batch, then runs those that are not finished.

        Args:
            jobs: the points, each as words.

        Returns their validation losses, None for a point that has none.

        Raises UserError if a point of the first batch cannot work, and hydra.SweepEnded after a stop.
        """
        from hvdllm.launch.hydra import SweepEnded

        first = not self.tasks
        names: list[str | None] = []
        for job in jobs:
            try:
                task = self.task(job)
            except UserError as error:
                if first:
                    raise
                # An optimizer goes on without this point.
                self.show(f"not tried: {' '.join(self.differing(job))}: {error}")
                names.append(None)
                continue
            self.tasks.setdefault(task.point.name, task)
            names.append(task.point.name)
        todo = list(dict.fromkeys(self.tasks[name].point.name for name in names if name))
        parallel = self.parallel([self.tasks[name] for name in todo])
        if first:
            self.show(f"sweep     {self.folder}, {self.total} point{'s' * (self.total != 1)}")
        self.write()
        self.began = True
        for name in todo:
            if self.tasks[name].state == "done":
                self.show(f"{self.place(self.tasks[name])} {name}  is finished already")
        self.run([self.tasks[name] for name in todo if self.tasks[name].state == "waiting"], parallel)
        if self.crashed is not None:
            raise self.crashed
        if self.stop.is_set():
            raise SweepEnded
        return [self.tasks[name].loss if name and self.tasks[name].state == "done" else None for name in names]

    @property
    def total(self) -> int:
        """How many points there will be."""
        return max(self.trials or 0, len(self.tasks))

    def place(self, task: Task) -> str:
        """The place of a point among all, such as `[3/12]`."""
        return f"[{list(self.tasks).index(task.point.name) + 1}/{self.total}]"

    def differing(self, job: Sequence[str]) -> list[str]:
        """The words of a point that vary in this sweep."""
        return [plain(word) for word in job if key_of(word) not in self.fixed]

    def task(self, job: Sequence[str]) -> Task:
        """The point of these words, with what is known of its run. It is checked as its ranks will check it.

        Raises UserError if it cannot work.
        """
        from hvdllm.trainer.resume import decide

        varied = self.differing(job)
        differs = [each for word in varied for each in expand(word)]
        if not differs:
            raise UserError("there is nothing to sweep: give a setting several values, seed=0,1,2 for example")
        if bad := next((word for word in differs if key_of(word) in FIXED), None):
            raise UserError(f"{key_of(bad)} is the same for all points of a sweep: give it one value")
        try:
            folders = [word for word in self.words if word.startswith(compose.CONFIG_DIR)]
            config = compose.compose([*folders, *job])
            if config.name is not None:
                raise UserError("the points of a sweep are named by what differs: leave name out; see launch.sweep")
            if self.trials is not None and not config.eval_every:
                raise UserError("an optimizer goes by the final validation loss: give eval_every above 0")
            sweep = config.launch.sweep or self.name(varied)
            check_name(sweep, "launch.sweep")
            config.name, config.launch.sweep = safe(",".join(differs)), sweep
            config.runs_dir = str(Path(config.runs_dir) / sweep)
            self.folder = Path(config.runs_dir)
            prepare(config)
            start = decide(config, self.show)
        except UserError as error:
            raise UserError(f"{' '.join(differs)}: {error}" if len(differs) else str(error)) from None
        task = Task(point_of(config, [*folders, *job, *share_of_cores(config)]), config, tuple(differs))
        if start.again or start.finished:
            read_end(task)
            task.again, task.watched.began = True, task.tokens
        if start.finished:
            task.state = "done"
        return task

    def name(self, differs: Sequence[str]) -> str:
        """The name of the sweep, `<experiment>-<hash>`."""
        experiment = next((value_of(w) for w in self.words if key_of(w) == "experiment"), "sweep")
        counts = [
            (word if is_text(word) else typed(word)).lstrip("+") for word in self.words
            if not is_sweep(word) and not NOT_OF_THE_SWEEP.fullmatch(key_of(word))
        ]  # fmt: skip
        said = json.dumps([sorted(counts), sorted(map(key_of, differs))])
        prefix = "sweep" if "," in experiment else safe(experiment)
        return f"{prefix}-{hashlib.sha256(said.encode()).hexdigest()[:6]}"

    def parallel(self, tasks: Sequence[Task]) -> int:
        """How many points run at once. Raises UserError if several would need the network lab."""
        if not tasks:
            return 1
        launch = tasks[0].config.launch
        count = int(launch.parallel or launcher_of(launch).room(launch) or len(tasks))
        if count > 1 and any(getattr(task.config.launch, "link", None) for task in tasks):
            raise UserError(
                "launch.link with launch.parallel: this machine has one network lab, points take turns there"
            )
        return count

    def run(self, todo: Sequence[Task], parallel: int) -> None:
        """Runs points, `parallel` at once. Returns when all have ended, or after a stop, when those that ran have
        saved."""
        waiting = deque(todo)

        def work() -> None:
            while not self.stop.is_set():
                try:
                    task = waiting.popleft()
                except IndexError:
                    return
                self.train(task)

        with (
            environment(),
            asked_to_stop(self.stop, "asking what runs to save and to end; Ctrl-C again ends it at once"),
            Display(self, todo) as display,
        ):
            workers = [threading.Thread(target=work, name=f"point-{k}") for k in range(min(parallel, len(todo)))]
            for worker in workers:
                worker.start()
            try:
                while any(worker.is_alive() for worker in workers):
                    time.sleep(0.05)
                    display.show()
            except BaseException:
                self.stop.set()
                raise
            finally:
                for worker in workers:
                    worker.join()
                display.show()

    def train(self, task: Task) -> None:
        """Runs one point to its end, and notes what became of it."""
        task.state = "running"
        log = task.point.folder / "launch.log"
        at, before = log.stat().st_size if log.exists() else 0, lives(task.point.folder)
        try:
            code = launcher_of(task.config.launch).launch(task.point, task.config.launch, self.stop, self.show)
            judge(task, code, self.stop.is_set() or stopped_since(task.point.folder, before), last_sentence(log, at))
        except (UserError, RunError) as error:
            task.state, task.why = "failed", str(error)
        except BaseException as error:  # a bug; the main thread raises it once the other points have ended
            task.state, task.why, self.crashed = "failed", repr(error), error
            self.stop.set()

    def write(self) -> None:
        """Writes sweep.json, which keeps the points of earlier commands. Raises UserError if it cannot be written."""
        assert self.folder is not None
        path = self.folder / "sweep.json"
        points: dict[str, list[str]] = {}
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # words are kept, but never run
            about = untrusted.read_json(path, MOST_SWEEP, self.folder)
            points = {str(point["name"]): list(map(str, point["words"])) for point in about["points"]}
        points |= {name: list(task.differs) for name, task in self.tasks.items()}
        about = {
            "command": shlex.join(["hvdllm", "train", "-m", *self.words]), "words": self.words,
            "points": [{"name": name, "words": words} for name, words in points.items()],
        }  # fmt: skip
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            runs.write_whole(path, json.dumps(about, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {path} ({error.strerror or error}): choose another runs_dir") from None

    def conclude(self) -> None:
        """Prints the table of points, what failed and why, and what to do next."""
        if not self.began:
            return
        units = {task.unit for task in self.tasks.values()}
        rows = [("point", units.pop() if len(units) == 1 else "units", "time", "validation loss", "state")]
        for name, task in self.tasks.items():
            loss = "-" if task.loss is None else f"{task.loss:.4f}"
            rows.append((name, f"{task.tokens:,}", duration(task.seconds), loss, task.state))
        wide = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
        self.show("")
        for row in rows:
            cells = [row[0].ljust(wide[0]), *(row[k].rjust(wide[k]) for k in (1, 2, 3)), row[4]]
            self.show("  ".join(cells))
        self.show("")
        for name, task in self.tasks.items():
            if task.state == "failed":
                self.show(f"failed: {name}: {task.why or 'no reason was given'} ({task.point.folder / 'launch.log'})")
        states = [task.state for task in self.tasks.values()]
        if left := sum(state in ("waiting", "stopped", "failed", "queued") for state in states):
            self.show(f"{left} not finished: the same command goes on with what is missing")
        if "done" in states:
            best = min((t for t in self.tasks.values() if t.loss is not None and t.state == "done"), default=None,
                       key=lambda task: task.loss or 0.0)  # fmt: skip
            if self.trials is not None and best is not None:
                self.show(f"best: {best.point.name}, validation loss {best.loss:.4f}")
            self.show(f"next: hvdllm report {shlex.quote(str(self.folder))}")


# ------------------------------------------------------------------ a point
def is_sweep(word: str) -> bool:
    """Whether a word has several values: a list with commas, choice(), range(), interval() or glob()."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return (
            not word.startswith("-")
            and OverridesParser.create().parse_override(typed(word, sweep=True)).is_sweep_override()
        )
    except (HydraException, ValueError):
        return False


def safe(text: str) -> str:
    """A name for a folder, made from `text`. If characters are replaced or cut, a hash keeps the names distinct."""
    name = re.sub(r"[^A-Za-z0-9_.,=+@%-]+", "_", text.replace('"', "").replace("'", "")).lstrip(".-")
    if name == text and len(name) <= LONGEST:
        return name
    return f"{name[: LONGEST - 7]}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def point_of(config: Config, words: Sequence[str]) -> Point:
    """The point for these settings.

    Args:
        config: the composed settings.
        words: all words of the run. Those of the group launch are left out, except launch.sweep, because the ranks
          must not launch again.
    """
    own = {"runs_dir": config.runs_dir, "name": str(config.name)}
    if config.launch.sweep:
        own["launch.sweep"] = config.launch.sweep
    rest = [
        each
        for word in words
        for each in expand(word)
        if key_of(each) not in own and not re.match(r"[+~]*launch(\.|=|$)", each)
    ]
    return Point(str(config.name), config.runs_dir, (*rest, *(of(key, str(value)) for key, value in own.items())))


def prepare(config: Config) -> None:
    """Raises UserError if the run could not be started, or if it would fail at once."""
    launcher_of(config.launch).ready(config.launch)
    check(config, config.launch.place())


def launcher_of(launch: Launch) -> Launcher:
    """The launcher that these settings belong to."""
    found: Launcher = registry.built(registry.of("launch", launch))
    return found


def queues(launch: Launch) -> bool:
    """Whether what this launcher starts goes on without this process."""
    return bool(registry.of("launch", launch).facts.queues)


def share_of_cores(config: Config) -> list[str]:
    """The word for device.threads, if ranks do not see how many cores they have, or with which others they share them.

    That is so under Ray, if points run at once, and for the hosts of the network lab.
    """
    from hvdllm.device import usable_cores

    launch = config.launch
    if launch.cores_of_rank is not None and config.device.threads is None:
        return [f"device.threads={launch.cores_of_rank}"]
    ranks, parallel, link = launch.ranks_here, launch.parallel or 1, getattr(launch, "link", None)
    if not ranks or (parallel == 1 and link is None) or config.device.threads is not None:
        return []
    return [f"device.threads={max(1, usable_cores() // (parallel * ranks))}"]


def judge(task: Task, code: int, stopped: bool, said: str) -> None:
    """Sets the state of a point that has ended, by the rule that decides whether a run goes on.

    Args:
        task: the point.
        code: its exit code.
        stopped: whether it was asked to stop.
        said: the last sentence that it printed.
    """
    from hvdllm.trainer.resume import decide

    read_end(task)
    try:
        finished = decide(task.config, lambda text: None).finished
    except UserError as error:
        finished, said = None, said or str(error)
    if finished:
        task.state = "done"
    elif stopped:
        task.state = "queued" if queues(task.config.launch) and code != STOPPED else "stopped"
    else:
        task.state = "failed"
        task.why = said or (f"it ended with code {code}" if code else f"it was stopped at {task.tokens:,} {task.unit}")


def lives(folder: Path) -> int:
    """How many lives the run in this folder has had."""
    return sum(record.get("kind") == "run" for record in runs.records(folder))


def stopped_since(folder: Path, before: int) -> bool:
    """Whether a life after the first `before` ones ended because it was asked to. Records are read, because horovodrun
    does not pass on the exit codes of its ranks, and may even return 0 after Ctrl-C."""
    last = [record for record in runs.records(folder) if record.get("kind") in ("run", "end")][-1:]
    return lives(folder) > before and bool(last) and last[0].get("reason") == "stop"


def read_end(task: Task) -> None:
    """Reads tokens, seconds and loss from the run's records."""
    for record in runs.records(task.point.folder):
        with contextlib.suppress(ValueError, TypeError, OverflowError):  # a record may have been changed
            if record.get("kind") in ("commit", "end", "eval"):
                task.tokens = int(record.get("tokens") or 0)
                task.seconds = float(record.get("seconds") or 0.0)
            loss = {"eval": "loss", "end": "eval_loss"}.get(str(record.get("kind")))
            if loss and record.get(loss) is not None:
                task.loss = float(record[loss])


def last_sentence(log: Path, at: int) -> str:
    """The last sentence in a log.

    Args:
        log: the file.
        at: what comes before this byte is skipped.

    Returns the last `hvdllm: ...`, or else the last line that is not empty, or "".
    """
    from hvdllm.launch.group import last_lines

    try:
        with untrusted.opened(log) as file:
            file.seek(at)
            text = file.read().decode(errors="replace")
    except (OSError, untrusted.Unfit):
        return ""
    sentences = [found[1] for line in text.splitlines() if (found := SAID.match(line))]
    return sentences[-1] if sentences else "".join(last_lines(text, 1))


# ------------------------------------------------------------------ this process
@contextlib.contextmanager
def environment() -> Iterator[None]:
    """A context in which started processes know by LAUNCHED that they must not launch again."""
    before = os.environ.get(LAUNCHED)
    os.environ[LAUNCHED] = "1"
    try:
        yield
    finally:
        os.environ.pop(LAUNCHED) if before is None else os.environ.update({LAUNCHED: before})


@contextlib.contextmanager
def terminal(config: Config) -> Iterator[None]:
    """A context in which ranks on this machine find the user's terminal, if there is one, for a progress line."""
    try:
        path = os.ttyname(sys.stdout.fileno())
    except (OSError, ValueError):
        path = ""
    if path and config.launch.ranks_here > 1:
        os.environ[TERMINAL] = path
    try:
        yield
    finally:
        os.environ.pop(TERMINAL, None)


def obeyed(config: Config) -> Config:
    """The configuration of a run that was started here. It has launch=local, whatever its experiment says."""
    return dataclasses.replace(config, launch=Local(sweep=config.launch.sweep))


@contextlib.contextmanager
def asked_to_stop(stop: threading.Event, said: str) -> Iterator[None]:
    """A context in which the first Ctrl-C or SIGTERM sets `stop`. The second one ends at once what runs, and raises
    KeyboardInterrupt. said: is printed at the first."""

    def handler(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            local.end_all()
            raise KeyboardInterrupt
        stop.set()
        with contextlib.suppress(OSError):
            os.write(2, f"\n{said}\n".encode())

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
