"""TensorFlow's strategies beside our exchanges: the same model, weights, batches and optimizer on two workers.

    python tests/tensorflow_bench.py [--communication ring|nccl] [--pack-mb MB] [--link RATE] [--updates N]
                                     [--seeds 0,1,2] [SETTING=VALUE ...]

TensorFlow runs in an environment of its own, runs/tensorflow/env, which is made where it is missing. See
jobs/bench/tensorflow.sh.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
import yaml

from hvdllm import device, registry, runs, sums
from hvdllm.bench import exchange
from hvdllm.bench.exchange import Asked, Case
from hvdllm.cli.main import ended
from hvdllm.config import compose
from hvdllm.config.check import check
from hvdllm.errors import RunError, UserError
from hvdllm.interpreter import PYTHON
from hvdllm.launch import group, lab
from hvdllm.optim.schedule import factor
from hvdllm.plain import Json
from hvdllm.report.read import plain
from hvdllm.settings import Config
from hvdllm.task import causal_lm
from hvdllm.text import shards
from hvdllm.trainer.assemble import build_model, items_a_batch
from hvdllm.world.detect import LINK, Place

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = ROOT / "jobs" / "bench" / "tensorflow_train.py"
VERSION = "2.21.0"
HORIZON = 2_400_000  # tokens of the quickstart, of which these are the first batches
WORKERS = 2
LIMIT_S = 300.0  # of one run: a guard against a hang
CHECKED = 50  # updates over which the losses of what is synchronous are compared
AGREE = {"fp32": 1e-4, "fp64": 1e-10}  # relative differences up to which two curves are one up to rounding
ROLES = {"mwms": ["worker"], "one": ["alone"], "ps": ["chief", "worker", "ps"]}  # the first of them trains
OURS = (
    Case("allreduce", "together", ("exchange=allreduce",)),
    Case("ddp", "together", ("exchange=ddp",)),
    Case("parameter_server, staleness=0", "together", ("exchange=parameter_server", "exchange.staleness=0")),
    Case("parameter_server, staleness=null", "together", ("exchange=parameter_server", "exchange.staleness=null")),
)
SYNCHRONOUS = ("ddp", "parameter_server, staleness=0", "tensorflow_mwms_ring", "tensorflow_mwms_nccl")
# What TensorFlow's side of the comparison is written for; what is not named here may be chosen.
ONLY = {
    "task.name": "causal_lm", "init_from": None, "plugins": None, "exchange.name": "allreduce", "wire.name": "fp32",
    "wire.hierarchical": False, "optim.name": "adamw", "optim.freeze_tokens": None, "model.name": "gpt",
    "model.positions": "rope", "model.norm": "rmsnorm", "model.mlp": "gelu", "model.mlp_width": None,
    "model.bias": False, "model.qkv_bias": None, "model.tied": True, "model.rope_scaling": None, "model.dropout": 0.0,
    "model.documents": False, "model.lora_rank": 0, "model.checkpointing": False, "model.compile": False,
}  # fmt: skip
# What the comparison sets itself.
OWN = ("budget_tokens", "device", "launch", "log_every", "name", "resume", "runs_dir", "seed", "track", "world")
OWN += tuple(f"{act}_every" for act in ("eval", "save", "sample", "audit", "publish"))


@dataclass(frozen=True)
class Request:
    """What the command line asks for. `link` is None where no shaped link is measured."""

    communication: str
    pack_mb: float  # of gradients that MultiWorkerMirroredStrategy sums together; 0: all
    link: str | None
    updates: int
    seeds: tuple[int, ...]
    settings: tuple[str, ...]


@dataclass(frozen=True)
class Point:
    """What was seen when so many tokens were committed."""

    tokens: int
    seconds: float  # of training
    loss: float  # since the point before
    counted: float | None  # bytes that rank 0 has sent, as the run counts them
    interface: float  # bytes that a host has sent in the mean, at its interface, without the frames


@dataclass(frozen=True)
class Seen:
    """One run of a case: its points, the first of which is not before the tokens at which measuring begins."""

    points: list[Point]
    validation: float  # loss after all tokens
    batch: int  # tokens
    begin: int  # tokens

    def figures(self) -> tuple[float, float, float | None, float]:
        """Milliseconds, tokens a second, and bytes (counted, at the interface) for a global batch."""
        first, last = next(each for each in self.points if each.tokens >= self.begin), self.points[-1]
        batches, seconds = (last.tokens - first.tokens) / self.batch, last.seconds - first.seconds
        counted = None if last.counted is None or first.counted is None else (last.counted - first.counted) / batches
        sent = (last.interface - first.interface) / batches
        return 1e3 * seconds / batches, batches * self.batch / seconds, counted, sent


# ------------------------------------------------------------------ the request
def parsed(argv: Sequence[str]) -> Request:
    parser = argparse.ArgumentParser("jobs/bench/tensorflow.sh", description="TensorFlow beside our exchanges.")
    add = parser.add_argument
    add("--communication", default="ring", choices=("ring", "nccl"), help="of MultiWorkerMirroredStrategy")
    add("--pack-mb", type=float, default=1.0, help="of gradients that it sums together, as our buckets; 0: all")
    add("--link", default="200mbit", help="rate of the lab's links, or none for the loopback alone")
    add("--updates", type=int, default=60, help=f"global batches of each run, at least {CHECKED}")
    add("--seeds", default="0", help="a run of each case for each, with commas between; three for a verdict")
    add("settings", nargs="*", metavar="SETTING=VALUE", help="as for hvdllm train")
    given = parser.parse_intermixed_args(argv)
    if given.updates < CHECKED:
        raise UserError(f"--updates {given.updates}: at least {CHECKED}, over which losses are compared")
    try:
        seeds = tuple(int(seed) for seed in given.seeds.split(","))
    except ValueError:
        raise UserError(f"--seeds {given.seeds}: whole numbers with commas between, such as 0,1,2") from None
    for word in given.settings:
        if word.lstrip("+~").partition("=")[0].partition(".")[0] in OWN:
            raise UserError(
                f"`{word}` cannot be given here: the comparison sets it itself (--seeds, --updates, --link)"
            )
    link = None if given.link == "none" or given.communication == "nccl" else given.link
    if not 0 <= given.pack_mb <= 1e6:
        raise UserError(f"--pack-mb {given.pack_mb}: a size in MB, or 0 for all gradients together")
    return Request(given.communication, given.pack_mb, link, given.updates, seeds, tuple(given.settings))


def gpus() -> int:
    """How many NVIDIA GPUs this machine has, whatever PyTorch was built for."""
    if not (tool := shutil.which("nvidia-smi")):
        return 0
    said = subprocess.run([tool, "-L"], capture_output=True, text=True)
    return sum(line.startswith("GPU ") for line in said.stdout.splitlines()) if said.returncode == 0 else 0


def words_of(asked: Request, cores: int) -> list[str]:
    """The settings of every run, but for the seed and the exchange."""
    config = compose.compose(list(asked.settings))
    batch, every = config.batch_tokens, max(1, asked.updates // 4)
    where = "device=cuda" if asked.communication == "nccl" else "device=cpu"
    fixed = [
        f"budget_tokens={asked.updates * batch}", f"eval_every={every * batch}", f"log_every={batch}", "save_every=0",
        "sample_every=0", "audit_every=0", where, f"device.threads={max(1, cores // WORKERS)}",
    ]  # fmt: skip
    return compose.merged(["eval_tokens=32768", f"schedule.horizon={HORIZON}"], [*asked.settings, *fixed])


def unfit(config: Config, asked: Request, found: int) -> str | None:
    """Why TensorFlow's side cannot train this, in one sentence, or None if it can. found: GPUs of this machine."""
    if asked.communication == "nccl" and found < WORKERS:
        return (
            f"--communication nccl needs a GPU for each of {WORKERS} workers, and this machine has {found}: "
            "leave it out for ring, which runs on CPUs"
        )
    values = compose.to_dict(config)
    for name, only in ONLY.items():
        value = values
        for key in name.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value != only:
            need = f"{name}={plain(only)}"
            return f"{name}={plain(value)} is not written for TensorFlow here: this comparison needs {need}"
    if config.precision not in AGREE:
        return f"precision={config.precision} is not written for TensorFlow here: give {' or '.join(AGREE)}"
    windows = config.batch_tokens // config.model.context
    if windows * config.model.context != config.batch_tokens or windows % WORKERS:
        return (
            f"batch_tokens={config.batch_tokens} is no number of windows of model.context={config.model.context} that "
            f"{WORKERS} workers share equally: give a multiple of {WORKERS * config.model.context}"
        )
    return None


# ------------------------------------------------------------------ TensorFlow
def environment(work: Path, communication: str) -> Path:
    """The Python of TensorFlow's own environment, which is made first if it is missing."""
    package = f"tensorflow[and-cuda]=={VERSION}" if communication == "nccl" else f"tensorflow-cpu=={VERSION}"
    folder = work / ("env-cuda" if communication == "nccl" else "env")
    whole, python = folder / f"has-{package}", folder / "bin" / "python"
    if not whole.exists():
        print(f"installing {package} in {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        more = os.environ.get("HVDLLM_PIP_ARGS", "").split()
        done = subprocess.run([str(python), "-m", "pip", "install", "--quiet", *more, package])
        if done.returncode:
            raise RunError(
                f"pip could not install {package} (its lines above say why): HVDLLM_PIP_ARGS chooses an index"
            )
        whole.touch()
    return python


def described(config: Config, folder: Path) -> Json:
    """What a task of TensorFlow has to know. Writes our initial weights, weights.npz, into the folder."""
    if registry.name_of("text", config.text) not in ("stdlib", "files") or config.text.packed:
        raise UserError("TensorFlow's reader knows text=stdlib and text=files, unpacked: give one of them")
    data = causal_lm.prepare(config, say=print, whole=True, wanted=None)
    corpus = shards.prepare(config.text, shards.data_folder(config.data_dir), say=print)
    model, context = build_model(data.task, torch.device("cpu")), config.model.context
    weights = folder / "weights.npz"
    np.savez(weights, **{name: value.detach().numpy() for name, value in model.named_parameters()})
    held_out = len(data.validation)
    if config.eval_tokens:
        held_out = min(held_out, max(1, config.eval_tokens // context))
    return {
        "model": {**vars(config.model), "kv_heads": config.model.kv_heads or config.model.heads},
        "optim": vars(config.optim), "weights": str(weights), "train": str(corpus.folder / "train.bin"),
        "validation": str(corpus.folder / "validation.bin"), "eval_windows": held_out, "seed": config.seed,
        "batch": items_a_batch(config, data.train), "updates": config.budget_tokens // config.batch_tokens,
        "eval_every": config.eval_every // config.batch_tokens, "threads": config.device.threads,
    }  # fmt: skip


def rates(config: Config, steps: int) -> list[float]:
    """The learning rate of each of so many equal steps up to the budget."""
    rate = factor(config.schedule, config.schedule.horizon or config.budget_tokens, config.batch_tokens)
    return [config.optim.lr * rate(k * config.budget_tokens // steps) for k in range(1, steps + 1)]


def ports(count: int) -> list[int]:
    """Ports that nobody here listens on."""
    with contextlib.ExitStack() as held:
        found = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in found]


@dataclass(frozen=True)
class Network:
    """Where the workers run: on the two hosts of a lab, both on the first of them, or without a lab on this machine."""

    name: str
    lab: lab.Lab | None
    shaped: bool

    @property
    def interface(self) -> str:
        return lab.INTERFACE if self.shaped else "lo"

    def address(self, k: int) -> str:
        return self.lab.hosts[k].address if self.lab and self.shaped else "127.0.0.1"

    def inside(self, k: int, command: Sequence[str]) -> list[str]:
        return self.lab.inside(self.lab.hosts[k if self.shaped else 0], command) if self.lab else list(command)

    @property
    def more(self) -> dict[str, str]:
        return {LINK: self.lab.link} if self.lab and self.shaped else {}


def run(commands: Sequence[Sequence[str]], env: dict[str, str], folder: Path) -> None:
    """Runs processes side by side to their end. Raises RunError with their last lines if one fails."""
    done = group.run(commands, env, folder / "log.txt", LIMIT_S)
    if done.problem:
        tail = "".join(f"\n    {line}" for line in done.tail)
        raise RunError(f"{folder.name} {done.problem}:{tail}")


def run_tensorflow(strategy: str, config: Config, asked: Request, network: Network, python: Path, folder: Path) -> None:
    """Trains with a strategy of TensorFlow; what its tasks saw is in ROLE-<k>.json of the folder."""
    folder.mkdir(parents=True)
    roles = {role: 1 if role in ("alone", "chief") else WORKERS for role in ROLES[strategy]}
    free = iter(ports(sum(roles.values())))
    cluster = {role: [f"{network.address(k)}:{next(free)}" for k in range(count)] for role, count in roles.items()}
    spec = described(config, folder) | {
        "trains": ROLES[strategy][0], "workers": roles.get("worker", 1), "cluster": cluster,
        "communication": asked.communication, "pack_bytes": round(asked.pack_mb * 2**20),
        "interface": network.interface, "folder": str(folder),
        "rates": rates(config, asked.updates * (WORKERS if strategy == "ps" else 1)),
    }  # fmt: skip
    path = folder / "spec.json"
    path.write_text(json.dumps(spec))
    commands = [
        network.inside(k, [*gpu_of(k, asked), str(python), str(PROGRAM), str(path), role, str(k)])
        for role, count in roles.items()
        for k in range(count)
    ]
    env = group.environment(
        PYTHONPATH=str(ROOT), TF_CPP_MIN_LOG_LEVEL="2", GRPC_VERBOSITY="ERROR", PYTHONUNBUFFERED="1", no_proxy="*"
    )
    run(commands, env, folder)


def gpu_of(k: int, asked: Request) -> list[str]:
    """The beginning of the command of worker k: it sees one GPU, or none."""
    return ["env", f"CUDA_VISIBLE_DEVICES={k if asked.communication == 'nccl' else ''}"]


def kept(tasks: list[Json], ours: Path, name: str, folder: Path) -> None:
    """Writes the folder of a run, which `hvdllm report` reads, from what the tasks of TensorFlow saw.

    Args:
        tasks: what each wrote.
        ours: the folder of our run on the same batches, whose settings these are.
        name: of the exchange.
        folder: of the run.
    """
    lines, first = list(runs.records(ours)), tasks[0]
    life = next(line for line in lines if line["kind"] == "run")
    per_byte = next(line["bits_per_byte"] / line["loss"] for line in lines if line["kind"] == "eval")
    config = {**life["config"], "name": folder.name, "exchange": {"name": name}}
    folder.mkdir(parents=True)
    runs.write_whole(folder / "config.yaml", sums.signed(yaml.safe_dump(config, sort_keys=False), {}))
    out = runs.Folder(folder)
    out.record("run", {**life, "config": config, "overrides": [], "versions": first["versions"], "fp32_products": None})
    marks = [task["marks"] for task in tasks]
    events = [(one["tokens"], 0, k) for k, one in enumerate(first["records"])]
    events += [(one["tokens"], 1, k) for k, one in enumerate(first["evals"])]
    before = total = 0.0
    for tokens, kind, k in sorted(events):
        if kind:
            seen = first["evals"][k]
            out.record("eval", {**seen, "bytes_total": total, "bits_per_byte": seen["loss"] * per_byte})
            continue
        total = float(marks[0][k][2])
        # TensorFlow does not say what it waited for, so the seconds are not divided; the report calls them "rest".
        unknown = dict.fromkeys(("compute_s", "blocked_s", "flight_s"), 0.0)
        cpu = {} if len(marks) < WORKERS else {"cpu_s_per_token": cpu_seconds(marks, k) / (tokens - before)}
        values = {"staleness_mean": 0.0, "staleness_max": 0.0, **first["records"][k], **unknown, **cpu}
        sent = total - (marks[0][k - 1][2] if k else 0)
        out.record("commit", {**values, "step": k + 1, "bytes_total": total, "bytes_sent": sent})
        before = tokens
    out.record("end", {"tokens": before, "reason": "budget", "tokens_computed": before, "unit": "tokens"})
    out.close()


def cpu_seconds(marks: list[list[list[float]]], k: int) -> float:
    """CPU seconds of all ranks between the record k - 1 and the record k."""
    return sum(one[k][-1] - (one[k - 1][-1] if k else 0.0) for one in marks)


# ------------------------------------------------------------------ measuring
def ours(case: Case, words: list[str], network: Network, folder: Path) -> None:
    """Trains with one of our exchanges, by the processes of `hvdllm bench exchange`."""
    folder.mkdir(parents=True)
    spec = folder / "spec.json"
    spec.write_text(
        json.dumps(
            {"slow": {}, "kind": case.kind, "words": words, "interface": network.interface, "folder": str(folder)}
        )
    )
    hosts = network.lab if network.shaped else None
    asked = Asked(None, WORKERS, WORKERS, (), (), (), (), 1, 0, 1, LIMIT_S)
    commands = exchange.commands(case, spec, asked, hosts)
    inside = commands if hosts else [network.inside(0, command) for command in commands]
    run(inside, exchange.environment(case, hosts) | network.more, folder)


def seen_of_ours(folder: Path, network: Network, config: Config) -> Seen:
    marks = [json.loads((folder / f"rank-{k}.json").read_text())["marks"] for k in range(WORKERS)]
    lines = list(runs.records(folder / "runs" / "run-0"))
    commits = [line for line in lines if line["kind"] == "commit"]
    points = []
    for k, line in enumerate(commits):
        sent = fmean(one[k][3] - lab.FRAME * one[k][4] for one in marks) / (1 if network.shaped else WORKERS)
        points.append(Point(line["tokens"], line["seconds"], line["loss"], line["bytes_total"], sent))
    return seen(points, [line for line in lines if line["kind"] == "eval"], config)


def seen_of_tensorflow(folder: Path, network: Network, config: Config) -> tuple[Seen, list[Json]]:
    tasks = [json.loads(path.read_text()) for path in sorted(folder.glob("*-[0-9].json"))]
    for one in tasks[0]["marks"]:  # what the first of two hosts receives is what the second sends
        _, _, sent, sent_packets, received, received_packets, _ = one
        both = sent + received - lab.FRAME * (sent_packets + received_packets)
        one[2] = both / 2 / (1 if network.shaped else WORKERS)
    points = [
        Point(line["tokens"], line["seconds"], line["loss"], None, mark[2])
        for line, mark in zip(tasks[0]["records"], tasks[0]["marks"], strict=True)
    ]
    return seen(points, tasks[0]["evals"], config), tasks


def seen(points: list[Point], evals: list[Json], config: Config) -> Seen:
    return Seen(points, evals[-1]["loss"], config.batch_tokens, config.eval_every)


def difference(one: Seen, other: Seen) -> float:
    """The largest relative difference of the losses of two runs on the same batches, over the first updates."""
    pairs = list(zip(one.points, other.points, strict=True))[:CHECKED]
    assert all(a.tokens == b.tokens for a, b in pairs)
    return max(abs(a.loss / b.loss - 1) for a, b in pairs)


def measure(asked: Request, words: list[str], network: Network, python: Path, out: Path) -> dict[str, list[Seen]]:
    """The runs of each case on a network. Those that take part in the report are left in `out`."""
    found: dict[str, list[Seen]] = {}
    mwms = f"tensorflow_mwms_{asked.communication}"
    for seed in asked.seeds:
        config = compose.compose([*words, f"seed={seed}"])
        with exchange.folder_of(False) as folder:
            for case in OURS:
                own = [*compose.merged(words, list(case.words)), f"seed={seed}"]
                place = folder / case.label.replace(", ", "-")
                ours(case, own, network, place)
                result = seen_of_ours(place, network, config)
                out.mkdir(parents=True, exist_ok=True)
                shutil.move(place / "runs" / "run-0", out / f"{place.name}-{seed}")
                tell(found, case.label, result)
            strategies = {"mwms": mwms, "ps": "tensorflow_ps"} | ({} if network.shaped else {"one": "tensorflow alone"})
            for strategy, label in strategies.items():
                place = folder / label
                run_tensorflow(strategy, config, asked, network, python, place)
                result, tasks = seen_of_tensorflow(place, network, config)
                if strategy != "one":
                    kept(tasks, out / f"allreduce-{seed}", label, out / f"{label}-{seed}")
                tell(found, label, result)
    return found


def tell(found: dict[str, list[Seen]], label: str, result: Seen) -> None:
    found.setdefault(label, []).append(result)
    print(f"  {label}: {result.figures()[0]:.0f} ms for a batch", flush=True)


def table(found: dict[str, list[Seen]]) -> str:
    """The figures as Markdown, each the mean over the seeds."""
    lines = [
        "| | ms a batch | tokens/s | MB counted | MB at the interface | validation loss | against `allreduce` |",
        "|---|---|---|---|---|---|---|",
    ]
    for label, results in found.items():
        ms, speed, counted, sent = ([one.figures()[k] for one in results] for k in range(4))
        own = "" if None in counted else f"{fmean(float(each or 0) for each in counted) / 1e6:.3f}"
        apart = ""
        if label in SYNCHRONOUS:
            apart = f"{max(difference(a, b) for a, b in zip(results, found['allreduce'], strict=True)):.1e}"
        lines.append(
            f"| {label} | {fmean(ms):.0f} | {fmean(speed):,.0f} | {own} | {fmean(sent) / 1e6:.3f} | "
            f"{fmean(one.validation for one in results):.4f} | {apart} |"
        )
    return "\n".join(lines)


def apart(found: dict[str, list[Seen]], precision: str) -> list[str]:
    """Sentences about cases that are synchronous and whose losses are not those of allreduce."""
    return [
        f"{label}: the training losses of the first {CHECKED} updates differ from allreduce's by up to {most:.1e}"
        for label, results in found.items()
        if label in SYNCHRONOUS
        for most in [max(difference(a, b) for a, b in zip(results, found["allreduce"], strict=True))]
        if not most < AGREE[precision]
    ]


def main(argv: Sequence[str]) -> int:
    asked = parsed(argv)
    words = words_of(asked, device.usable_cores())
    config = compose.compose(words)
    check(config, Place("horovodrun", 0, WORKERS, 0, 1))
    if (why := unfit(config, asked, gpus())) is not None:
        raise UserError(why)
    work = ROOT / "runs" / "tensorflow"
    work.mkdir(parents=True, exist_ok=True)
    out, odd = work / runs.new_name(), list[str]()
    with exchange.ended_by_signals(), networks(asked) as each:
        python = environment(work, asked.communication)
        for network in each:
            print(f"== {network.name}", flush=True)
            found = measure(asked, words, network, python, out / network.name)
            print(f"\n{table(found)}\n", flush=True)
            odd += apart(found, config.precision)
    for network in each:
        print(f"== the report: {network.name}", flush=True)
        page = out / f"{network.name}.html"
        command = ["report", str(out / network.name), "--by", "exchange,versions", "--out", str(page)]
        subprocess.run([*PYTHON, "hvdllm", *command], check=True)
    if odd:
        raise RunError("; ".join(odd))
    return 0


@contextlib.contextmanager
def networks(asked: Request) -> Iterator[list[Network]]:
    """The networks to measure on. A lab is removed at the end."""
    if (why := lab.missing()) is not None:
        print(f"no lab ({why}): only the loopback is measured, and other programs' bytes on it are counted too")
        yield [Network("loopback", None, False)]
        return
    hosts = lab.Lab(WORKERS, asked.link or "1gbit")
    try:
        hosts.build()
        yield [Network("loopback", hosts, False), *([Network(asked.link, hosts, True)] if asked.link else [])]
    finally:
        hosts.close()


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("ended: whatever was started is gone, and finished runs are kept", file=sys.stderr)
        sys.exit(130)
    except (UserError, RunError) as error:
        sys.exit(ended(error))
