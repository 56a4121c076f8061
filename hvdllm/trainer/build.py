"""The objects of a run, made from a checked configuration in one visible order, and the run itself."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from hvdllm import device as devices
from hvdllm.checkpoint import read
from hvdllm.config import compose, pace, schema
from hvdllm.config.check import parse_steps
from hvdllm.config.schema import Config
from hvdllm.errors import RunError, UserError
from hvdllm.exchange.acco import Acco
from hvdllm.exchange.allreduce import AllReduce
from hvdllm.exchange.base import Milestones, NotFinite, State, Wire
from hvdllm.exchange.ddp import Ddp
from hvdllm.exchange.delayed import Delayed
from hvdllm.exchange.diloco import DiLoCo
from hvdllm.exchange.fedavg import FedAvg
from hvdllm.exchange.horovod import Horovod
from hvdllm.exchange.local_sgd import LocalSGD
from hvdllm.exchange.parameter_server import ParameterServer
from hvdllm.exchange.reference import Reference
from hvdllm.exchange.sharded import Sharded
from hvdllm.exchange.streaming_diloco import StreamingDiLoCo
from hvdllm.exchange.wire import make as make_wire
from hvdllm.exchange.wire.plain import Plain
from hvdllm.flat import Flat
from hvdllm.lock import Lock
from hvdllm.models import size
from hvdllm.models.generate import generate
from hvdllm.models.gpt import GPT, compile_blocks, init_weights
from hvdllm.optim.schedule import factor
from hvdllm.optim.update import Update
from hvdllm.runs import Folder, new_name
from hvdllm.text import overlap, shards
from hvdllm.text.shards import Corpus
from hvdllm.text.stream import Stream, validation
from hvdllm.text.tokenize import Tokenizer
from hvdllm.track import mirror
from hvdllm.track.mirror import Mirror
from hvdllm.trainer import account
from hvdllm.trainer.audit import fingerprint
from hvdllm.trainer.backward import Loss, explain
from hvdllm.trainer.clock import Clock
from hvdllm.trainer.due import Due, Show
from hvdllm.trainer.evaluate import Evaluation, evaluate
from hvdllm.trainer.loop import train
from hvdllm.trainer.resume import Start, decide, folder_of
from hvdllm.trainer.slow import Simulated, Slow
from hvdllm.trainer.trace import Trace
from hvdllm.trainer.trunk import Trunk, begin
from hvdllm.world.base import World, first_problem, from_first, peers
from hvdllm.world.detect import Place
from hvdllm.world.single import SingleWorld
from hvdllm.world.virtual import VirtualWorld

EXCHANGES: dict[type, Any] = {
    schema.AllReduce: AllReduce,
    schema.Sharded: Sharded,
    schema.Delayed: Delayed,
    schema.Acco: Acco,
    schema.LocalSGD: LocalSGD,
    schema.DiLoCo: DiLoCo,
    schema.StreamingDiLoCo: StreamingDiLoCo,
    schema.ParameterServer: ParameterServer,
    schema.FedAvg: FedAvg,
    schema.Ddp: Ddp,
    schema.Horovod: Horovod,
}
LEAST_VOCAB = 257  # tokens, of bytes; a tokenizer has not been trained, or read, from the start
DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}


def run(config: Config, overrides: list[str], place: Place, world: World, show: Show) -> int | None:
    """Trains. Every rank calls it. Returns the tokens at which the run was stopped, None where its budget is met.
    Raises UserError before training, RunError in it."""
    with ExitStack() as held:
        start, lock = agreed_start(config, world, show, held)
        if start.finished:
            show.say(f"{start.finished}; a larger budget_tokens goes on")
            return None
        return live(config, overrides, place, world, show, start, lock)


def live(
    config: Config, overrides: list[str], place: Place, world: World, show: Show, start: Start, lock: Lock | None
) -> int | None:
    """One life of a run, from its objects to its end."""
    device = agreed_device(config, world, show.say)
    agreed_room(config, LEAST_VOCAB, device, world)  # before a text is prepared that may take hours
    corpus = agreed_corpus(config, start, world, show)
    agreed_room(config, corpus.tokenizer.vocab, device, world)
    model = build_model(config, corpus.tokenizer.vocab, device)
    exchange = EXCHANGES[type(config.exchange)](config.exchange, config.batch_tokens)
    if isinstance(exchange, ParameterServer):  # its marks are no ends of rounds
        exchange.milestones = milestones(config)
    flat = Flat(model, world.size, bucket_bytes(config, model), exchange.copies)
    checkpoint = Path(start.checkpoint) if start.checkpoint else None
    resumed = from_first(world, lambda: read.read_run(checkpoint), "load.state") if checkpoint else None
    horizon = resumed["horizon"] if resumed else config.schedule.horizon or config.budget_tokens
    if corpus.data_hash != (resumed["data_hash"] if resumed else start.data_hash or corpus.data_hash):
        raise UserError(
            f"the text is not the one that {start.folder} was trained on: give it back, or choose another name"
        )
    update = Update(config.optim, factor(config.schedule, horizon, config.batch_tokens))
    loss = Loss(
        model, precision=config.precision, device=device, seed=config.seed, rank=world.rank,
        dropout=config.model.dropout > 0,
    )  # fmt: skip
    hosts = account.hosts(device, world)
    exchange.unlike = len({rank["device"] for rank in hosts}) > 1
    wire = build_wire(config, exchange.between(world), flat)
    with peers(world):
        module = exchange.attach(loss, flat, update, wire, world)
    trace = Trace(parse_steps(config.trace_steps) if config.trace_steps else None, world, device)
    exchange.watch = trace.note if config.trace_steps else None
    trunk = None
    if config.init_from is not None and resumed is None:
        trunk = begin(config, corpus.tokenizer.hash, exchange, flat, world, show.say)
    agree_on_weights(flat, world)
    stream = make_stream(config, corpus, device, world)
    folder = Folder(Path(start.folder), lock) if world.rank == 0 else None
    clock = Clock(world, resumed["seconds"] if resumed else 0.0)
    due = Due(
        config, world=world, flat=flat, exchange=exchange, update=update, stream=stream, clock=clock,
        evaluate=lambda: evaluate_run(config, model, corpus, device, world),
        sample=lambda tokens: sample_run(config, model, corpus, tokens) if world.rank == 0 else "",
        extra={"horizon": horizon, "data_hash": corpus.data_hash},
        folder=folder, show=show,
        # Its marks are far apart, and an ask makes one at once.
        grace_s=None if isinstance(exchange, ParameterServer) else grace(place),
    )  # fmt: skip
    module = paced(config, module, loss, hosts, device, world)
    notes = [*corpus.notes, *repeated_text(config, corpus), *clients_without_text(config, stream)]
    if resumed is not None:
        assert checkpoint is not None
        with read.fitting(checkpoint):
            notes += load(checkpoint, resumed, exchange, flat, stream, world)
            due.load(resumed["due"])
    if folder is not None:
        events = open_folder(folder, config, overrides, start, resumed, trunk, corpus, hosts, world)
        if start.again:
            how = f"resumed from {start.checkpoint}" if resumed else "started again: no checkpoint was written before"
            events.append(how)
        for what in events:
            due.record("event", due.tokens, clock.earlier, {"what": what})
    show.header(header(config, corpus, hosts, world, start, resumed, trunk))
    for note in notes:
        show.say(note)
    tracker = start_tracker(config, Path(start.folder), world, show)

    reason = "failed"
    clock.start()
    try:
        with closing(stream), peers(world):
            if due.finished:  # before this life of the run, which was killed behind its last checkpoint
                due.finish(exchange.settle())
            else:
                train(stream, module, exchange, due, config.budget_tokens)
        reason = "budget" if due.finished else "stop"
        noted, path = trace.write(Path(start.folder) / "trace.json"), f"{start.folder}/trace.json"
        if config.trace_steps:
            show.say(f"trace in {path}" if noted else f"no trace: steps {config.trace_steps} were not trained here")
    except NotFinite as error:
        exchange.disarm()
        raise explain(error, stream, loss, flat, world) from None
    finally:
        if folder is not None:
            end = end_record(reason, config, model, due, clock, stream, hosts, device, world)
            try:
                folder.record("end", end, sync=True)
            except RunError:
                if reason != "failed":
                    raise
            finally:
                folder.close()
                if tracker is not None:
                    tracker.close(patient=reason == "budget")
    if folder is not None:
        show.finish(end, start.folder, due.last_sample)
    return None if due.finished else due.tokens


def load(
    checkpoint: Path, resumed: dict[str, Any], exchange: Any, flat: Flat, stream: Stream, world: World
) -> list[str]:
    """Everything but the acts goes back to where the checkpoint stands; what a person should know of it. Collective."""
    vectors = {kind: read.share_vector(checkpoint, kind, flat, world) for kind in resumed["kinds"]}
    ranks = read.saved_ranks(resumed)
    summed = read.load_summed(checkpoint, flat, world, ranks)
    tensors = read.share_tensors(checkpoint, world)
    local = read.load_local(checkpoint, flat, world, ranks)
    exchange.load(State(resumed["shared"], [], vectors, {}, summed, tensors, local), resumed["mine"])
    stream.load(resumed["stream"], [mine.get("lanes", {}) for mine in resumed["mine"]])
    notes = []
    if summed and ranks != world.size:
        notes.append(
            f"the wire's residuals of {ranks} ranks were added up on rank 0, the other ranks begin with none: "
            "nothing is lost, but the curve is not that of an unchanged world"
        )
    if exchange.resized and ranks != world.size:
        notes.append(f"{ranks} ranks saved it, {world.size} go on: {exchange.resized}")
    return notes


def paced(
    config: Config,
    module: torch.nn.Module,
    loss: Loss,
    hosts: list[dict[str, Any]],
    device: torch.device,
    world: World,
) -> torch.nn.Module:
    """What the loop calls, as fast as the settings say that this rank is."""
    if config.world.tokens_per_s is not None:
        assert isinstance(world, VirtualWorld)
        speed = pace.speeds(config.world, config.seed)[world.rank]
        return Simulated(module, world.spend, speed, config.world.jitter, config.seed, world.rank)
    factor = pace.slowed(config.world.slow, world.size).get(world.rank, 1.0)
    return Slow(module, loss, factor, crowded(hosts, world.rank, device)) if factor > 1 else module


def crowded(hosts: list[dict[str, Any]], rank: int, device: torch.device) -> bool:
    """Would more compute on this rank slow others? Hosts of the network lab share one machine and its name."""
    here = sum(one["host"] == hosts[rank]["host"] for one in hosts)
    return device.type == "cpu" and here > devices.usable_cores()


# ------------------------------------------------------------------ what the ranks must agree on
def agreed_start(config: Config, world: World, show: Show, held: ExitStack) -> tuple[Start, Lock | None]:
    """Rank 0's decision, on every rank; on rank 0 also the lock of the run's folder, which `held` gives back."""
    named = replace(config, name=config.name or new_name())
    lock: Lock | None = None

    def first() -> dict[str, Any]:
        nonlocal lock
        try:
            lock = held.enter_context(closing(Lock(folder_of(named))))
        except UserError:
            with suppress(UserError):  # a finished run needs no lock, and may be kept where nobody can write
                if (start := decide(named, lambda text: None)).finished:
                    return asdict(start)
            raise
        return asdict(decide(named, show.say))

    return Start(**from_first(world, first, "start.folder")), lock


def agreed_device(config: Config, world: World, say: Callable[[str], None]) -> torch.device:
    """This rank's. Raises UserError, on every rank, where some have a GPU and others none, or two the same one."""
    device, problem, asked = torch.device("cpu"), "", config.device
    logical = config.world.kind == "virtual"  # such ranks share one device
    try:
        local_rank = 0 if logical else world.local_rank
        device = devices.choose(asked.kind, local_rank, share=asked.share, no_cuda=world.no_cuda)
    except UserError as error:
        problem = str(error)
    said = [json.loads(text) for text in world.texts(json.dumps([problem, devices.gpu(device)]), "start.device")]
    gpus = [gpu for _, gpu in said]
    if (first := first_problem([problem for problem, _ in said])) is None and not logical:
        first = wrong_gpus(gpus, asked.share)
    if first is not None:
        raise UserError(first)
    if world.no_cuda and asked.kind == "auto" and torch.cuda.is_available():
        say(f"{world.no_cuda}, so this run computes on the CPU")
    return device


def wrong_gpus(gpus: list[str], share: bool) -> str | None:
    """What is wrong with these GPUs of the ranks, by what tells them apart; "": a CPU."""
    without = [rank for rank, gpu in enumerate(gpus) if not gpu]
    if without and any(gpus):
        return (
            f"rank {without[0]} has no GPU and rank {next(r for r, gpu in enumerate(gpus) if gpu)} has one, so their "
            "gradients cannot meet: give all ranks GPUs, or take device=cpu"
        )
    for rank, gpu in enumerate(gpus):
        if gpu and gpu in gpus[:rank] and not share:
            return (
                f"ranks {gpus.index(gpu)} and {rank} compute on one GPU ({gpu}): start at most one rank a GPU, or "
                "allow it with device.share=true"
            )
    return None


def agreed_room(config: Config, vocab: int, device: torch.device, world: World) -> None:
    """Raises UserError on every rank where the model cannot fit what memory there is on any host or GPU."""
    together = world.local_size if device.type == "cpu" or config.device.share else 1  # logical ones are all here
    rows = size.pad_vocab(vocab)
    needs, there = size.least_memory(config, rows, world.size) * together, devices.usable_memory(device)
    problem = None
    if there is not None and needs > there:
        of = f"{together} ranks" if together > 1 else "a rank"
        problem = (
            f"this model has {size.count_parameters(config.model, rows) / 1e6:,.1f} M parameters, and {of} of it with "
            f"gradients, optimizer and one micro-batch would take at least {needs / 2**30:,.1f} GiB of the "
            f"{there / 2**30:,.1f} GiB that are free here: take a smaller model or micro_batch, fewer ranks on a host, "
            "or another optimizer or exchange"
        )
    world.agree(problem, f"start.room.{int(vocab != LEAST_VOCAB)}")


def agreed_corpus(config: Config, start: Start, world: World, show: Show) -> Corpus:
    """The prepared text, the same on all ranks. The first rank of each host prepares what is missing."""
    where = shards.data_folder(config.data_dir)
    corpus, problem = None, None
    for turn in (True, False):
        if (world.local_rank == 0) == turn:
            try:
                corpus = shards.prepare(config.text, where, say=show.say, whole=turn, wanted=start.data_hash)
                check_corpus(config, corpus)
            except UserError as error:
                problem = str(error)
        world.agree(problem, f"start.text.{int(turn)}")
    assert corpus is not None
    if len(set(world.texts(corpus.data_hash, "start.data"))) > 1:
        raise UserError(
            "the ranks have different text or tokenizers (text=stdlib differs between Python versions): prepare it "
            "once into a data_dir that all hosts share, or give all hosts the same files"
        )
    return corpus


def repeated_text(config: Config, corpus: Corpus) -> list[str]:
    """A sentence, where it is known and anything is evaluated."""
    share = corpus.repeated(config.model.context, config.eval_tokens) if config.eval_every else None
    if not share:
        return []
    return [
        f"{share:.1%} of the evaluated windows hold {overlap.RUN} tokens in a row that the training text has too: what "
        "was learnt by heart lowers the validation loss there"
    ]


def check_corpus(config: Config, corpus: Corpus) -> None:
    """What can only be known with the text at hand. Raises UserError."""
    clients_without_text(config, make_stream(config, corpus, torch.device("cpu"), SingleWorld()))
    if config.eval_every:
        validation(
            corpus.validation, context=config.model.context, eval_tokens=config.eval_tokens, micro_batch=1, rank=0,
            size=1, device=torch.device("cpu"),
        )  # fmt: skip


def clients_without_text(config: Config, stream: Stream) -> list[str]:
    """A sentence, where there are any. Raises UserError where a round would draw more clients than have text."""
    asked = config.exchange
    if not isinstance(asked, schema.FedAvg):
        return []
    tokens = stream.clients(asked.clients, asked.alpha).tokens
    known = sum(count > 0 for count in tokens)
    if known < (asked.sampled or 1):
        raise UserError(
            f"exchange.sampled={asked.sampled}: only {known} of the {asked.clients} clients have a window of text; "
            f"give exchange.sampled={known}, fewer clients, or a larger exchange.alpha"
        )
    if known == len(tokens):
        return []
    return [
        f"{len(tokens) - known} of {len(tokens)} clients have no window of text and are never drawn; the others have "
        f"{min(count for count in tokens if count):,} to {max(tokens):,} tokens"
    ]


def agree_on_weights(flat: Flat, world: World) -> None:
    """Every rank drew its weights from the same seed: a difference is an error, not something to paper over."""
    own = hashlib.sha256(json.dumps(fingerprint(flat).tolist()).encode()).hexdigest()
    prints = world.texts(own, "start.weights")
    if len(set(prints)) > 1:
        raise UserError("the ranks drew different weights from the same seed: they need the same versions of torch")


# ------------------------------------------------------------------ the parts
def build_model(config: Config, vocab: int, device: torch.device) -> GPT:
    """vocab: of the tokenizer; the model's is padded. Weights as drawn from the seed."""
    model = GPT(config.model, size.pad_vocab(vocab)).to(DTYPES[config.precision])
    init_weights(model, config.seed)
    model = model.to(device)
    if config.model.compile:
        compile_blocks(model)
    return model


def is_reference(config: Config) -> bool:
    """Does a library of its own move the sums?"""
    return issubclass(EXCHANGES[type(config.exchange)], Reference)


def build_wire(config: Config, world: World, flat: Flat) -> Wire:
    """A reference reads of its wire the settings alone."""
    if is_reference(config):
        return Plain(world, config.wire, flat, config.batch_tokens)
    return make_wire(config.wire, world, flat, config.batch_tokens)


def milestones(config: Config) -> Milestones:
    """Every act that is due has a mark; only logs need nobody to stand still."""
    acts = (config.eval_every, config.sample_every, config.save_every, config.audit_every)
    return Milestones(acts, (config.log_every,), config.budget_tokens)


def bucket_bytes(config: Config, model: torch.nn.Module) -> float:
    """Of gradients that travel together; see exchange.bucket_mb."""
    whole = sum(p.nbytes for p in model.parameters())
    chosen = config.exchange.bucket_mb
    if chosen:
        return float(chosen * 2**20)
    if (fragments := getattr(config.exchange, "fragments", 1)) > 1:  # of several buckets each: they come out equal
        return float(min(25 * 2**20, whole / (4 * fragments)))
    return float(min(25 * 2**20, max(2**20, whole / 8)))


def make_stream(config: Config, corpus: Corpus, device: torch.device, world: World) -> Stream:
    """This rank's training batches. Raises UserError where the text has fewer windows than one global batch."""
    return Stream(
        corpus.train, context=config.model.context, batch=config.batch_tokens // config.model.context,
        micro_batch=config.micro_batch, seed=config.seed, rank=world.rank, size=world.size, device=device,
        end=corpus.tokenizer.end,
    )  # fmt: skip


def evaluate_run(config: Config, model: GPT, corpus: Corpus, device: torch.device, world: World) -> Evaluation:
    """The validation loss of these weights, as every evaluation of a run defines it. Collective."""
    batches = validation(
        corpus.validation, context=config.model.context, eval_tokens=config.eval_tokens,
        micro_batch=config.micro_batch, rank=world.rank, size=world.size, device=device,
    )  # fmt: skip
    return evaluate(model, batches, text_bytes(corpus), config.precision, device, world)


def text_bytes(corpus: Corpus) -> Any:
    """Bytes of the text that each token stands for; where the tokenizer loses some, or they are known roughly, scaled:
    over the validation text they add up to its own."""
    shard = corpus.validation_shard
    return corpus.tokenizer.token_bytes * (shard.bytes / shard.spelled if shard.spelled else 1.0)


def sample_run(config: Config, model: GPT, corpus: Corpus, tokens: int) -> str:
    """The prompt and what the model makes of it; the same for the same weights and committed tokens."""
    seed = (config.seed * 1_000_003 + tokens) % 2**63  # what torch takes
    return continue_text(model, corpus.tokenizer, config.sample_prompt, tokens=config.sample_tokens, seed=seed)


def continue_text(
    model: GPT,
    tokenizer: Tokenizer,
    text: str,
    *,
    tokens: int,
    seed: int,
    temperature: float = 0.8,
    top_k: int | None = 50,
) -> str:
    """The text as the beginning of a document, and up to `tokens` tokens that the model adds to it."""
    prompt = [tokenizer.end, *tokenizer.encode([text])[0].tolist()]
    out = generate(
        model, prompt, tokens=tokens, vocab=tokenizer.vocab, generator=torch.Generator().manual_seed(seed),
        temperature=temperature, top_k=top_k, stop=tokenizer.end,
    )  # fmt: skip
    return tokenizer.decode([*prompt[1:], *out])


def grace(place: Place) -> float | None:
    """Seconds that the launcher leaves a rank between Ctrl-C and SIGKILL; None: as long as it takes."""
    if place.launcher == "none":
        return None
    lengthened = float(os.environ.get("OMPI_MCA_odls_base_sigkill_timeout", 1))  # noqa: SIM112 - MPI's spelling
    return {"horovodrun": 5.0, "mpirun": lengthened, "srun": 30.0, "torchrun": 30.0}[place.launcher]


def start_tracker(config: Config, folder: Path, world: World, show: Show) -> Mirror | None:
    """On rank 0, where the settings name one. Raises UserError on every rank where it must be online and is not."""
    tracker = mirror.start(config, folder, show.say) if world.rank == 0 else None

    def refuse() -> None:
        if tracker is not None and (problem := tracker.refusal(config.track.start_s + mirror.SLACK_S)):
            tracker.close(patient=False)
            raise UserError(problem)

    if getattr(config.track, "mode", "") == "online":
        from_first(world, refuse, "start.track")
    return tracker


# ------------------------------------------------------------------ what is written
def open_folder(
    folder: Folder,
    config: Config,
    overrides: list[str],
    start: Start,
    resumed: dict[str, Any] | None,
    trunk: Trunk | None,
    corpus: Corpus,
    hosts: list[dict[str, Any]],
    world: World,
) -> list[str]:
    """Returns what was found lost or changed of the records of earlier lives, whose lines have new sums now."""
    folder.create(config, {"tokenizer.json": corpus.tokenizer.hash})
    lost = folder.cut(resumed["shared"]["tokens"] if resumed else None) if start.again else []
    corpus.tokenizer.save(folder.path / "tokenizer.json")
    vocab = size.pad_vocab(corpus.tokenizer.vocab)
    folder.record(
        "run",
        {
            "command": account.command(),
            "overrides": overrides,
            "config": compose.to_dict(config),
            "git": account.git(),
            "versions": account.versions(),
            "world": world.size,
            "ranks": hosts,
            "threads": hosts[0]["threads"],
            "fp32_products": torch.get_float32_matmul_precision(),  # highest: without TF32
            "clock": "simulated" if devices.simulated() else "host",
            "slurm": account.slurm(),
            "link": account.link(),
            "data_hash": corpus.data_hash,
            "validation_repeated": corpus.repeated(config.model.context, config.eval_tokens),
            "tokenizer_hash": corpus.tokenizer.hash,
            "parameters": size.count_parameters(config.model, vocab),
            "flops_per_token": size.flops_per_token(config.model, vocab),
            "trunk": trunk and asdict(trunk),
        },
        sync=True,
    )
    return lost


def header(
    config: Config,
    corpus: Corpus,
    hosts: list[dict[str, Any]],
    world: World,
    start: Start,
    resumed: dict[str, Any] | None,
    trunk: Trunk | None,
) -> dict[str, str]:
    """What stands above the progress line."""
    names = sorted({f"{rank['device']} ({rank['kind']})" for rank in hosts})
    machines = len({rank["host"] for rank in hosts})
    context = config.model.context
    parameters = size.count_parameters(config.model, size.pad_vocab(corpus.tokenizer.vocab))
    ranks = f"{world.size} on {machines} host{'s' * (machines > 1)}, {hosts[0]['threads']} threads each"
    text = f"{len(corpus.train):,} training tokens, vocabulary {corpus.tokenizer.vocab:,}"
    batch = f"{config.batch_tokens:,} tokens ({config.batch_tokens // context} x {context})"
    going_on = {"goes on": f"from {resumed['shared']['tokens']:,} tokens"} if resumed else {}
    if trunk is not None:
        at = f", {trunk.tokens:,} tokens" if trunk.tokens is not None else ""
        going_on = {"begins": f"with the weights of {trunk.path}{at}"}
    return {
        "model": f"{parameters / 1e6:.2f} M parameters, {config.precision}",
        "text": f"{schema.name_of('text', config.text)}, {text}",
        "exchange": exchange_name(config),
        "update": f"{batch}, {schema.name_of('optim', config.optim)}",
        "ranks": ranks,
        "device": ", ".join(names),
        **speed_lines(config, hosts),
        "run": start.folder,
        **going_on,
    }


def speed_lines(config: Config, hosts: list[dict[str, Any]]) -> dict[str, str]:
    """Of the header, where ranks are not as fast as they are."""
    world, out = config.world, dict[str, str]()
    by = pace.slowed(world.slow, len(hosts))
    if by:
        how = "by more compute"
        if world.tokens_per_s is not None:
            how = "on the simulated clock"
        elif any(crowded(hosts, rank, torch.device(hosts[rank]["kind"])) for rank in by):
            how = "by sleeping, since ranks outnumber cores"
        out["slowed"] = ", ".join(f"rank {rank} {factor:g} times" for rank, factor in sorted(by.items())) + f", {how}"
    if world.tokens_per_s is not None:
        speeds = pace.speeds(world, config.seed)
        spread = f"{min(speeds):,.0f}" + (f" to {max(speeds):,.0f}" if max(speeds) > min(speeds) else "")
        link = f"links of {world.bandwidth}" if world.bandwidth else "transfers that take no time for their size"
        late = f", {world.latency_ms:g} ms late" if world.latency_ms else ""
        out["time"] = f"simulated: {spread} tokens/s a rank, {link}{late}"
    return out


def exchange_name(config: Config) -> str:
    """`acco, wire int8, world torch`: what is not usual is named."""
    wire = schema.name_of("wire", config.wire)
    parts = [schema.name_of("exchange", config.exchange)]
    parts += [f"wire {wire}"] * (wire != "fp32") + ["hierarchical"] * config.wire.hierarchical
    inner = getattr(config.exchange, "inner", "none")
    parts += [f"{inner} inside"] * (inner != "none")
    return ", ".join(parts + [f"world {config.world.kind}"] * (config.world.kind not in ("auto", "horovod")))


def end_record(
    reason: str,
    config: Config,
    model: GPT,
    due: Due,
    clock: Clock,
    stream: Stream,
    hosts: list[dict[str, Any]],
    device: torch.device,
    world: World,
) -> dict[str, Any]:
    """reason: budget, stop or failed. loss: of the last `commit` record. mfu: share of the peak, where it is known."""
    seconds = clock.seconds()
    vocab = model.output.shape[0]
    peak = None if devices.simulated() else size.peak_flops(hosts[0]["device"], config.precision)
    if config.precision == "fp32" and torch.get_float32_matmul_precision() != "highest":
        peak = None  # with TF32, which the user's environment has allowed, it is another
    flops = size.flops_per_token(config.model, vocab) * due.tokens_here
    return {
        "reason": reason,
        "tokens": due.tokens,
        **due.totals(seconds),
        "loss": due.recorded_loss if due.recorded_loss is not None or math.isnan(due.last_loss) else due.last_loss,
        "eval_loss": due.last_eval.loss if due.last_eval else None,
        "bits_per_byte": due.last_eval.bits_per_byte if due.last_eval else None,
        "tokens_computed": due.tokens + due.settled_tokens + due.dropped_tokens,  # in what has not failed
        "tokens_settled": due.settled_tokens,
        # In the checkpoint and not yet applied, or dropped.
        "tokens_not_committed": due.dropped_tokens + (0 if due.finished else due.settled_tokens),
        "mfu": flops / (clock.seconds_here() * world.size * peak) if peak and clock.seconds_here() > 0 else None,
        "peak_memory_bytes": devices.peak_memory(device),
        "device_hours": clock.wall_s() * world.size / 3600,
        "data_waited_s": 0.0 if devices.simulated() else stream.waited_s,
    }
