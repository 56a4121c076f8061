"""What exchanges cost over a network of known speed, with real ranks on several hosts of one machine.

    compute alone          as many processes as ranks, each with the share of one rank, and without Horovod
    compute alone, slowed  with --slow: the same, each rank as slow as it was asked to be
    Horovod idle           the same under horovodrun, with Horovod initialised and nothing for it to do
    every exchange         `hvdllm train` without acts, on every wire and world that was asked for

All train the same model on the same tokens from the same seed. Repetitions are interleaved (A B C, A B C, ...), and
each starts new processes. A case that hvdllm refuses is listed as refused, with its sentence.

The default model has 2.5 M parameters, which are 9.8 MB of fp32 gradients. Two ranks at 200 Mbit/s sum them in about
0.41 s, and the batch is chosen so that a rank of one thread computes for about as long. A blocking exchange then takes
twice as long as one that hides all of its communication.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from hvdllm import registry, runs
from hvdllm.bench import figures
from hvdllm.bench.figures import Raw, Repetition
from hvdllm.config import compose, pace
from hvdllm.config.check import check
from hvdllm.config.words import expand, value_of
from hvdllm.errors import UserError
from hvdllm.interpreter import PYTHON
from hvdllm.launch import group, lab
from hvdllm.launch.horovodrun import mpi, starter
from hvdllm.plain import Json
from hvdllm.world.detect import Place

MODEL = (
    "text.tokenizer=bytes", "model.layers=3", "model.width=256", "model.heads=4", "model.kv_heads=null",
    "batch_tokens=4096", "micro_batch=4",
)  # fmt: skip
# A record for every commit, and nothing else but training.
QUIET = ("eval_every=0", "save_every=0", "sample_every=0", "audit_every=0", "log_every=1", "schedule=constant")
# A timed exchange commits what it computes while gradients travel, so it gets more tokens, to make enough commits.
MORE_IF_TIMED = 3
# It gets even more if the others compute on while a slow rank comes to its end.
MORE_IF_SLOW = 2
# Switches off synchronous updates at the beginning, which are not to be measured, and makes each outer round a commit.
OF_EXCHANGE = {
    "delayed": ("exchange.warmup_tokens=0",),
    "local_sgd": ("exchange.warmup_tokens=0", "exchange.pulses=1"),
    "diloco": ("exchange.pulses=1",),
    "fedavg": ("exchange.pulses=1",),
}
UNEVEN = {"local_sgd": ("exchange.by_speed=true",)}  # what an exchange has for uneven ranks
RESERVED = {
    "exchange": "--exchanges", "wire": "--wires", "world": "--worlds", "budget_tokens": "--steps",
    "world.slow": "--slow",
    **dict.fromkeys(("name", "runs_dir", "resume"), ""),
    **{word.partition("=")[0]: "" for word in QUIET if "_every" in word},
}  # fmt: skip
ALONE, SLOWED, IDLE = "compute alone", "compute alone, slowed", "Horovod idle"


@dataclass(frozen=True)
class Asked:
    """What the command line asks for.

    `link` is None for the loopback. `settings` are those of all cases. `slow` is written as world.slow.
    """

    link: str | None
    ranks: int
    hosts: int
    exchanges: tuple[str, ...]
    wires: tuple[str, ...]  # empty: as configured
    worlds: tuple[str, ...]  # empty: as the launcher decides
    settings: tuple[str, ...]
    steps: int
    warmup: int
    repetitions: int
    limit_s: float
    slow: str | None = None

    @property
    def commits(self) -> int:
        """How many commits a run makes. The last one lands what the others overlap, and does not count either."""
        return self.warmup + self.steps + 1

    @property
    def interface(self) -> str | None:
        """The interface whose counters are read; None on the loopback, which other programs use too."""
        return lab.INTERFACE if self.link else None


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        label: its name.
        kind: `alone`, `idle` or `together`.
        words: its settings, on top of those of all cases.
        blocking: the label of the case whose flight counts as the communication of this one.
        slowed: whether each rank is as slow as asked.
    """

    label: str
    kind: str
    words: tuple[str, ...] = ()
    blocking: str = ""
    slowed: bool = False


# ------------------------------------------------------------------ what is measured
def cases(asked: Asked) -> list[Case]:
    """The cases without an exchange, then all exchanges on all wires and worlds, in the order given.

    Raises UserError if one is named twice.
    """
    out = [Case(ALONE, "alone"), Case(IDLE, "idle")]
    if asked.slow:
        out.insert(1, Case(SLOWED, "alone", slowed=True))
    for text in asked.exchanges:
        name, *more = split_item(text)
        for wire in asked.wires or ("",):
            for world in asked.worlds or ("",):
                chosen = [f"{group}={value}" for group, value in (("wire", wire), ("world", world)) if value]
                own = [*OF_EXCHANGE.get(name, ()), *(UNEVEN.get(name, ()) if asked.slow else ())]
                words = compose.merged([f"exchange={name}", *chosen, *own], more)
                label = " ".join(word for word in (text, wire, world) if word)
                blocking = " ".join(word for word in ("allreduce", wire, world) if word)
                out.append(Case(label, "together", tuple(words), blocking, slowed=bool(asked.slow)))
    if len({case.label for case in out}) < len(out):
        raise UserError("an exchange, wire or world is named twice: once is enough, --repetitions measures it again")
    return out


def split_item(text: str) -> list[str]:
    """`acco+exchange.timed=true` as [acco, exchange.timed=true]. A plus inside a number separates nothing."""
    first, *more = expand(f"exchange={text}")
    parts = [value_of(first), *more]
    if not re.fullmatch(r"\w+", parts[0]):
        raise UserError(
            f"--exchanges {text}: names with commas between, each with settings after a plus: acco+exchange.timed=true"
        )
    return parts


def base_words(asked: Asked, cores: int) -> list[str]:
    """The settings of all cases. Raises UserError for a setting that the bench sets itself."""
    for word in asked.settings:
        key = word.lstrip("+~").partition("=")[0]
        if key in RESERVED:
            use = f"use {RESERVED[key]}" if RESERVED[key] else "the bench sets it itself"
            raise UserError(f"`{word}` cannot be given to bench exchange: {use}")
    # On hosts that are namespaces each rank would believe that all cores are its own.
    threads = f"device.threads={max(1, cores // asked.ranks)}"
    model = [] if any(word.startswith("model=") for word in asked.settings) else MODEL
    return compose.merged([*model, threads], [*asked.settings, *QUIET])


def words_of(
    case: Case, base: Sequence[str], asked: Asked, batch_tokens: int, context: int, least: int = 1
) -> list[str]:
    """The settings of a case.

    A rank that trains alone has as many sequences as the rank with the largest share, and makes at least `least`
    updates.
    """
    share = -(-batch_tokens // context // asked.ranks) * context if case.kind != "together" else batch_tokens
    slow = [f"world.slow='{asked.slow}'"] if case.slowed and case.kind == "together" else []
    own = compose.merged(base, [*case.words, *slow, f"batch_tokens={share}"])
    together = case.kind == "together"
    batches = asked.commits * batches_a_commit(own, case.slowed) if together else max(asked.commits, least)
    return [*own, f"budget_tokens={batches * share}"]


def batches_a_commit(words: Sequence[str], slowed: bool) -> int:
    """The fewest global batches from one commit to the next; 1 if the words do not fit, which is refused later."""
    try:
        exchange = compose.compose(words).exchange
    except UserError:
        return 1
    if getattr(exchange, "timed", False):
        return MORE_IF_TIMED * (MORE_IF_SLOW if slowed else 1)
    return int(exchange.batches_a_commit)


def refusal(words: Sequence[str], place: Place) -> str | None:
    """Why hvdllm would refuse these words; None if it would not."""
    try:
        check(compose.compose(words), place)
    except UserError as error:
        return str(error)
    return None


def spread(ranks: int, hosts: int) -> list[int]:
    """How many ranks each host has. The first hosts have more."""
    return [ranks // hosts + (k < ranks % hosts) for k in range(hosts)]


def by_mpi(case: Case) -> bool:
    """Whether a case runs under MPI, which letters between ranks need.

    Everything else is measured over Gloo, whose ranks wait without spinning.
    """
    return "exchange=parameter_server" in case.words


def place_of(case: Case, asked: Asked) -> Place:
    """Where the first rank of a case will find itself."""
    return (
        Place("mpirun" if by_mpi(case) else "horovodrun", 0, asked.ranks, 0, 1) if case.kind == "together" else Place()
    )


def commands(case: Case, spec: Path, asked: Asked, network: lab.Lab | None) -> list[list[str]]:
    """The processes to start: one launcher if the ranks train together, else one process for each rank."""
    rank = [*PYTHON, "hvdllm", "bench", "rank", str(spec)]
    places = spread(asked.ranks, asked.hosts if network else 1)
    if case.kind == "alone":
        homes = [k for k, count in enumerate(places) for _ in range(count)]
        own = [[*rank, str(index)] for index in range(asked.ranks)]
        return [network.inside(network.hosts[k], c) for k, c in zip(homes, own, strict=True)] if network else own
    how = "mpi" if by_mpi(case) else "gloo"
    launcher = [*starter(how), f"--{how}", "-np", str(asked.ranks), "--disable-cache"]
    if network is None:
        return [[*launcher, "-H", f"localhost:{asked.ranks}", *rank]]
    where = ",".join(f"{host.address}:{count}" for host, count in zip(network.hosts, places, strict=True))
    return [network.inside(network.hosts[0], [*launcher, "-H", where, "--network-interfaces", lab.INTERFACE, *rank])]


def environment(case: Case, network: lab.Lab | None) -> dict[str, str]:
    """The environment of all ranks.

    The stand-in for ssh is first on PATH. torch's Gloo is told the interface, because it does not ask the launcher.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    more = mpi(here=network is None) if by_mpi(case) else {}
    if network is None:
        return group.environment(PATH=path, PYTHONUNBUFFERED="1", GLOO_SOCKET_IFNAME="lo", **more)
    return group.environment(
        PATH=f"{network.folder}{os.pathsep}{path}", PYTHONUNBUFFERED="1", GLOO_SOCKET_IFNAME=lab.INTERFACE, **more
    )


# ------------------------------------------------------------------ measuring
def measure(asked: Asked, say: Callable[[str], None], keep: bool) -> Json:
    """Measures everything, and returns what the JSON file holds.

    Args:
        asked: the request.
        say: gets a sentence after each repetition.
        keep: whether run folders and logs stay in a temporary folder.

    Raises UserError for a request that cannot work at all. A case that fails or is refused is part of the result.
    """
    from hvdllm import device
    from hvdllm.task.base import Kind

    base = base_words(asked, device.usable_cores())
    together = Place("horovodrun", 0, asked.ranks, 0, 1)
    config = compose.compose(base)
    check(config, together)
    todo = cases(asked)
    # The cases that others are compared with are measured for as long as a commit of theirs takes.
    least = max(batches_a_commit(compose.merged(base, case.words), False) for case in todo)
    words = {case.label: words_of(case, base, asked, config.batch_tokens, config.model.context, least) for case in todo}
    results: dict[str, Json] = {
        case.label: {"kind": case.kind, "settings": words[case.label], "refused": None, "failed": None} for case in todo
    }
    for case in todo:
        results[case.label]["refused"] = refusal(words[case.label], place_of(case, asked))
    asked_for = [results[case.label]["refused"] for case in todo if case.kind == "together"]
    if all(asked_for):
        raise UserError(asked_for[0])
    kind: Kind = registry.built(registry.of("task", config.task))
    kind.prepare(config, say=say, whole=True, wanted=None)  # once, not by each rank
    raws: dict[str, list[Repetition]] = {case.label: [] for case in todo}
    seen: Json = {}
    with ended_by_signals(), folder_of(keep) as folder, network_of(asked) as network:
        for turn in range(1, asked.repetitions + 1):
            for number, case in enumerate(todo):
                result = results[case.label]
                if result["refused"] or result["failed"]:
                    continue
                place = folder / f"{turn}-{number}-{re.sub(r'[^A-Za-z0-9]+', '-', case.label)}"
                outcome = run(case, words[case.label], asked, network, place)
                if isinstance(outcome, Repetition):
                    raws[case.label].append(outcome)
                    seen = json.loads((place / "rank-0.json").read_text())
                    result["horovod"] = seen["horovod"]
                    step = figures.pooled([outcome], "step_s")
                    say(f"{turn}/{asked.repetitions}  {case.label}: {step:.0f} ms a step")
                else:
                    result |= outcome
                    said = result["refused"] or result["failed"]
                    say(f"{turn}/{asked.repetitions}  {case.label}: {said}")
                    for line in result.get("tail", ()):
                        say(f"    {line}")
    if keep:
        say(f"run folders and logs are in {folder}")
    _conclude(todo, results, raws, asked, config.batch_tokens)
    speeds = {label: figures.rank_speeds(raws[label]) for label in (ALONE, SLOWED) if raws.get(label)}
    return {
        "rank_tokens_per_s": speeds, "asked": asdict(asked), "batch_tokens": config.batch_tokens, "cases": results,
        "idle_bytes_per_s": figures.idle_rate(raws[IDLE]), "device": seen.get("device"), "threads": seen.get("threads"),
        "cores": device.usable_cores(), "versions": seen.get("versions"),
    }  # fmt: skip


def run(case: Case, words: Sequence[str], asked: Asked, network: lab.Lab | None, folder: Path) -> Repetition | Json:
    """Runs one repetition of a case.

    Returns why there is none as {"refused": ...} or {"failed": ..., "tail": [...]}.
    """
    folder.mkdir()
    slow = pace.slowed(asked.slow, asked.ranks) if case.slowed and case.kind == "alone" else {}
    spec = {"slow": slow, "kind": case.kind, "words": list(words), "interface": asked.interface, "folder": str(folder)}
    path = folder / "spec.json"
    path.write_text(json.dumps(spec))
    ended = group.run(
        commands(case, path, asked, network), environment(case, network), folder / "log.txt", asked.limit_s
    )
    if ended.problem:
        for said in sorted(folder.glob("refused-*.txt")):
            return {"refused": said.read_text()}
        return {"failed": ended.problem, "tail": ended.tail}
    try:
        raw = read(folder, asked.ranks)
        share = next(int(word.partition("=")[2]) for word in words if word.startswith("batch_tokens="))
        return figures.repetition(raw, asked.warmup, asked.commits * share)
    except (OSError, ValueError) as error:
        return {"failed": str(error), "tail": ended.tail}


def read(folder: Path, ranks: int) -> Raw:
    """Reads what a repetition left: rank-<k>.json of every rank, and metrics.jsonl of every run."""
    seen = [json.loads((folder / f"rank-{k}.json").read_text()) for k in range(ranks)]
    found = sorted((folder / "runs").iterdir())
    records = [[record for record in runs.records(one) if record["kind"] == "commit"] for one in found]
    return Raw([one["marks"] for one in seen], records, seen[0]["sums"])


def _conclude(
    todo: Sequence[Case],
    results: dict[str, Json],
    raws: Mapping[str, Sequence[Repetition]],
    asked: Asked,
    batch_tokens: int,
) -> None:
    """Adds the figures of every case, and its repetitions, from which other figures can be computed."""
    idle = figures.idle_rate(raws[IDLE])
    speeds = figures.rank_speeds(raws.get(SLOWED, ()))
    for case in todo:
        own = raws[case.label]
        if not own:
            continue
        found = figures.figures(
            own, alone=raws[ALONE], blocking=raws.get(case.blocking, ()), batch_tokens=batch_tokens,
            idle=idle if results[case.label]["horovod"] else 0.0, own_interface=asked.ranks == asked.hosts,
            speeds=speeds if case.kind == "together" else (),
        )  # fmt: skip
        results[case.label] |= {"figures": asdict(found), "repetitions": [asdict(rep) for rep in own]}


def busy(figures: Json) -> str | None:
    """A sentence if other processes took the cores; None if not.

    A rank that computes alone uses a whole core for each thread.
    """
    shares = [
        case["figures"]["cpu_share"]
        for case in figures["cases"].values()
        if case["kind"] == "alone" and "figures" in case
    ]
    if not shares or not figures["threads"] or (share := shares[0] / figures["threads"]) > 0.9:
        return None
    return (
        f"a rank computing alone had {share:.0%} of its cores: this machine is busy with something else or has fewer "
        "cores than the ranks have threads, so take these times for no more than an order"
    )


# ------------------------------------------------------------------ what is made and taken away
@contextmanager
def network_of(asked: Asked) -> Iterator[lab.Lab | None]:
    if asked.link is None:
        yield None
        return
    network = lab.Lab(asked.hosts, asked.link)
    try:
        network.build()
        yield network
    finally:
        network.close()


@contextmanager
def folder_of(keep: bool) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="hvdllm-bench-"))
    try:
        yield folder
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Lets SIGTERM and a closed terminal end the bench by an exception, as Ctrl-C does, so that it cleans up."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
