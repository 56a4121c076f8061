"""Would the tests notice? Wrong versions of one line each, of the arithmetic and the bookkeeping that results rest on.

Each is put into a copy of the tree, and the tests that name the part are run there until the first fails. Tests that
start real ranks, and thorough ones, are left out: what only they would notice is noticed late.

    python tests/mutants.py [PART ...]          a part is the beginning of a file's name: optim/ exchange/acco.py

First the tests are run without a mutant, since tests that fail anyway would notice nothing. dead: a test failed.
SURVIVED: none did, and a test is missing. NO END: the tests were ended at their limit, because they hang or the machine
is slow. NOT APPLICABLE: the old text is not there exactly once, and the line below has to follow the code. See
jobs/bench/mutants.sh.
"""

from __future__ import annotations

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # a process that is to be forked has one thread
os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import pytest
import safetensors.torch  # noqa: F401 - these are imported so that no fork has to
import tokenizers  # noqa: F401
import torch  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 900.0
EXCHANGE = "tests/exchange"
ALLREDUCE, SHARDED, DELAYED, ACCO, LOCAL_SGD, DILOCO, STREAMING, FEDAVG, SERVER, ROUNDS, STEPS, BY_SPEED, CONTRACT = (
    f"{EXCHANGE}/test_{name}.py"
    for name in (
        "allreduce", "sharded", "delayed", "acco", "local_sgd", "diloco", "streaming_diloco", "fedavg",
        "parameter_server", "rounds", "local_steps", "by_speed", "contract",
    )
)  # fmt: skip
KEPT, CLOCK, NOISE = (f"{EXCHANGE}/test_{name}.py" for name in ("kept_is_conserved", "clock", "noise"))
CASTS, INT8, TOPK, SIGN, CODED, CODECS, FEEDBACK, POWERSGD, HIERARCHICAL, WIRES = (
    f"{EXCHANGE}/wire/test_{name}.py"
    for name in (
        "casts", "int8", "topk", "sign", "coded", "codecs", "feedback", "powersgd", "hierarchical", "wire_contract",
    )
)  # fmt: skip
WHOLE = f"{ROUNDS} {ALLREDUCE} {SHARDED} {DELAYED}"
RESIDUALS = f"{FEEDBACK} {WIRES} {KEPT}"
OPTIM, CHECKPOINT = "tests/optim", "tests/checkpoint"
STREAM, CLIENTS, SHARDS = "tests/task/test_stream.py", "tests/order/test_clients.py", "tests/text/test_shards.py"
HUGGING, TUNED = "tests/models/test_hugging.py", "tests/trainer/test_finetuning.py"
BERT, FROZEN = "tests/models/test_hugging_bert.py", "tests/trainer/test_frozen.py"
TASK, ONLINE, PREQUENTIAL = "tests/task", "tests/online", "tests/trainer/test_prequential.py"
JUDGE, PULSE, INJECTOR = "tests/trainer/test_judge.py", "tests/trainer/test_pulse.py", "tests/test_injector.py"
CHANNEL = "tests/trainer/test_channel.py"
DUE, SAYS = "tests/trainer/test_acts.py", "tests/trainer/test_what_runs_say.py"

# file below hvdllm/, what stands there once, what is to stand there, tests
MUTANTS = [
    # ------------------------------------------------------------------ optim
    ("trainer/judge.py", "place.waits is None and now - seen.moved", "now - seen.moved", JUDGE),
    ("trainer/judge.py", "if still and waiting else None", "if still else None", JUDGE),
    ("trainer/judge.py", "if seen is None or late:", "if seen is None:", JUDGE),
    ("trainer/judge.py", "seen.beat.left or ", "", JUDGE),
    ("pulse.py", "if waits == DRIVEN else (self.phase, waits)", "if False else (self.phase, waits)", PULSE),
    ("pulse.py", "self._since = time.monotonic()  # what", "pass  # what", PULSE),
    ("pulse.py", "FACTOR * self._longest", "0 * self._longest", PULSE),
    ("faults.py", "done + (phase not in AFTER) >= self.step", "done >= self.step", INJECTOR),
    ("trainer/channel.py", "fcntl.LOCK_SH | fcntl.LOCK_NB", "fcntl.LOCK_UN", CHANNEL),
    ("optim/update.py", "total(squares).sqrt() / meta.tokens", "total(squares).sqrt()", OPTIM),
    ("optim/update.py", "torch.full_like(norm, meta.tokens)", "torch.full_like(norm, meta.tokens + 1)", OPTIM),
    ("optim/update.py", ".clamp_(min=1.0)", ".clamp_(min=0.5)", OPTIM),
    ("optim/update.py", "share * self.rate(meta.committed),", "self.rate(meta.committed),", f"{OPTIM} {SERVER}"),
    ("optim/update.py", "~torch.isfinite(norm)", "torch.isnan(norm)", OPTIM),
    ("optim/update.py", "step.fill_(float(self.steps))", "step.fill_(0.0)", f"{OPTIM} {CONTRACT} {CHECKPOINT}"),
    ("optim/update.py", "out = [piece.clone() for piece in pieces]", "out = pieces", OPTIM),
    ("optim/update.py", "meta.committed > after and", "meta.committed >= after and", OPTIM),
    (
        "optim/schedule.py",
        "settings.floor) * (1 + math.cos(math.pi * progress))",
        "settings.floor) * (1 + math.cos(progress))",
        OPTIM,
    ),
    ("optim/schedule.py", "return tokens / self._way.warmup", "return (tokens - 1) / self._way.warmup", OPTIM),
    ("optim/schedule.py", "end = horizon + batch if", "end = horizon if", OPTIM),
    ("optim/schedule.py", "(1 - settings.floor) * left", "left", OPTIM),
    (
        "optim/schedule.py",
        "level = _since(settings, at - begun, level)",
        "level = 0.0",
        f"{OPTIM} {ONLINE}/test_rewarm.py",
    ),
    ("optim/schedule.py", "settings.hold) * (1 + math", "settings.hold) * (math", f"{OPTIM} {ONLINE}/test_rewarm.py"),
    ("optim/by_hand.py", "torch.lerp(m, g, 1 - settings.beta1)", "torch.lerp(m, g, settings.beta1)", OPTIM),
    ("optim/by_hand.py", "alpha=settings.weight_decay", "alpha=-settings.weight_decay", OPTIM),
    ("optim/by_hand.py", "torch.where(keep, old, new)", "new", OPTIM),
    ("optim/nadam.py", "(1 - b1 ** (t + 1))", "(1 - b1**t)", OPTIM),
    ("optim/adamw.py", "return v, m / (1 - settings.beta1**t)", "return v, m", OPTIM),
    ("optim/adamw.py", "settings.weight_decay if on.decayed else 0.0", "settings.weight_decay", OPTIM),
    ("optim/sgd.py", "settings.weight_decay if on.decayed else 0.0", "settings.weight_decay", OPTIM),
    ("optim/sgd.py", "nesterov=settings.nesterov", "nesterov=False", OPTIM),
    # ------------------------------------------------------------------ exchange
    ("exchange/noise.py", "norm * norm - trace / tokens", "norm * norm - trace", NOISE),
    ("exchange/noise.py", "/ (ranks - 1)", "/ ranks", NOISE),
    ("exchange/outer.py", "alpha=self.rate * self.momentum", "alpha=self.rate", DILOCO),
    ("exchange/outer.py", "v.sqrt().add_(self.tau)", "v.add(self.tau).sqrt()", FEDAVG),
    ("exchange/outer.py", 'state["m"].lerp_(delta, 1 - self.beta1)', 'state["m"].lerp_(delta, self.beta1)', FEDAVG),
    ("exchange/meta.py", 'head.pop("save") > 0', 'head.pop("stop", 0) > 0', CONTRACT),
    ("exchange/meta.py", "len(FIELDS) + len(SLOT) * world.rank\n", "len(FIELDS)\n", ROUNDS),
    (
        "exchange/buckets.py",
        "if self._missing[bucket.index]:",
        "if self._missing[bucket.index] > 1:",
        WHOLE,
    ),
    (
        "exchange/buckets.py",
        "return [by_bucket[index] for index in sorted(by_bucket)]",
        "return flights",
        WHOLE,
    ),
    ("exchange/rounds.py", "squares / max(tokens, 1.0)", "squares", CONTRACT),
    ("exchange/rounds.py", "if not math.isfinite(norm):", "if math.isnan(norm):", CONTRACT),
    ("exchange/rounds.py", 'sum(each["said"][key] for each in mine)', 'mine[0]["said"][key]', CONTRACT),
    ("exchange/rounds.py", "begin = self._landed", "pass", CLOCK),
    ("exchange/rounds.py", 'tuple(shared["noise"]) if shared["noise"] else None', "None", CONTRACT),
    ("exchange/rounds.py", " and not wire.rough", "", CONTRACT),
    ("exchange/rounds.py", "self.update.rate(self.applied_at())", "self.update.rate(self.tokens)", KEPT),
    (
        "exchange/sharded.py",
        'self.world.sum(squares.reshape(1), "total.0").land().reshape(())',
        "squares",
        SHARDED,
    ),
    ("exchange/delayed.py", "(1 if self._flying is None else 2)", "1", KEPT),
    ("exchange/delayed.py", "self.tokens < warmed_up(", "self.tokens <= warmed_up(", DELAYED),
    ("exchange/delayed.py", "self.flat.g.addcmul_(self.flat.g, moved)", "self.flat.g.add_(moved)", DELAYED),
    ("exchange/delayed.py", 'state.sharded["then"] = self._then', "pass", DELAYED),
    ("exchange/acco.py", "tokens += self._kept_tokens", "pass", ACCO),
    ("exchange/acco.py", "torch._foreach_add_(sums, self._kept)", "pass", ACCO),
    (
        "exchange/acco.py",
        "late = self._kind == TENTATIVE and self._half is not None",
        "late = False",
        KEPT,
    ),
    ("exchange/acco.py", ".least and tokens >= share", ".least", ACCO),
    ("exchange/acco.py", "count == self.settings.most", "count > self.settings.most", ACCO),
    ("exchange/acco.py", "self._committed += int(tokens)", "self._committed = int(tokens)", ACCO),
    ("exchange/anchor.py", "weight = fragment.tokens / steps", "weight = fragment.tokens", DILOCO),
    ("exchange/anchor.py", "meta.steps / meta.weight**2", "meta.steps / meta.weight", DILOCO),
    ("exchange/anchor.py", "lerp_(anchor, 1 - mixing)", "lerp_(anchor, mixing)", STREAMING),
    ("exchange/local.py", '"bad": float(self.group.bad is not None)', '"bad": 0.0', CONTRACT),
    ("exchange/local.py", "math.sqrt(metas[-1].squares / self.group.count)", "math.sqrt(metas[-1].squares)", STEPS),
    ("exchange/local_rounds.py", "anchor.flat.x.add_(mine)", "pass", STEPS),
    (
        "exchange/local_rounds.py",
        "max(most / max(speeds), 1 / min(speeds))",
        "most / max(speeds)",
        f"{BY_SPEED} {CLOCK}",
    ),
    ("exchange/streaming_diloco.py", "number * every // count", "0", STREAMING),
    ("exchange/streaming_diloco.py", "group.open - air.tokens", "0", STREAMING),
    ("exchange/streaming_diloco.py", 'mine["said"] if mine is not None else 0', "0", f"{STREAMING} {STEPS} {CLOCK}"),
    ("exchange/local_sgd.py", ".land() / self.world.size", ".land()", LOCAL_SGD),
    ("exchange/fedavg.py", "alpha=self.mu * meta.tokens", "alpha=self.mu", FEDAVG),
    ("exchange/fedavg.py", "self.group.inner.update.fresh()", "pass", FEDAVG),
    ("exchange/outer.py", "self.tau**2", "self.tau", FEDAVG),
    ("exchange/fedavg.py", "turns[client] * steps + place % steps", "turns[client] * steps", FEDAVG),
    ("exchange/server_shard.py", 'share = head["n"] / self.nominal', "share = 1.0", SERVER),
    ("exchange/server_shard.py", "max(1, self.version - seen.version)", "max(1, self.version)", SERVER),
    ("exchange/server_shard.py", "sorted(pushes, key=lambda each: each.sender)", "pushes[::-1]", SERVER),
    ("exchange/server_shard.py", "gradient * gradient * self", "gradient * self", SERVER),
    # ------------------------------------------------------------------ exchange/wire
    ("exchange/wire/codecs.py", "blocks.abs().amax(2) / 127", "blocks.abs().amax(2) / 128", INT8),
    ("exchange/wire/codecs.py", ".round_().to(torch.int8)", ".trunc_().to(torch.int8)", INT8),
    ("exchange/wire/codecs.py", "(u >= 0)", "(u > 0)", SIGN),
    ("exchange/wire/codecs.py", "blocks[0].numel() - n", "0", f"{CODECS} {INT8} {SIGN}"),
    ("exchange/wire/codecs.py", "min(n, self.ranks * super().count(n))", "min(n, super().count(n))", TOPK),
    ("exchange/wire/codecs.py", "out.mul_(1 / self.scale)", "out.mul_(self.scale)", CASTS),
    ("exchange/wire/codecs.py", "if len(places) >= k:", "if len(places) >= k // 2:", TOPK),
    (
        "exchange/wire/feedback.py",
        "factor = before / self.weight",
        "factor = self.weight / before",
        RESIDUALS,
    ),
    (
        "exchange/wire/feedback.py",
        "max(weight, LEAST * self.largest) if weight",
        "weight if weight",
        RESIDUALS,
    ),
    ("exchange/wire/feedback.py", "rest[span.start : span.stop] = 0", "pass", RESIDUALS),
    ("exchange/wire/feedback.py", "if launch.factor == 0:", "if False:", RESIDUALS),
    (
        "exchange/wire/coded.py",
        "torch.add(self.wire.feed(self.rows, self.launch, part), left, alpha=self.launch.factor)",
        "self.wire.feed(self.rows, self.launch, part) + 0",
        f"{INT8} {WIRES}",
    ),
    ("exchange/wire/coded.py", "y.add_(owner[self.chunks[k]], alpha=self.launch.factor)", "pass", f"{INT8} {WIRES}"),
    ("exchange/wire/coded.py", ".mul_(left != 0)", ".mul_(1)", TOPK),
    ("exchange/wire/coded.py", "math.floor(4 * committed / self", "math.ceil(4 * committed / self", TOPK),
    ("exchange/wire/coded.py", "out[self.padding[k][own]] = 0", "pass", WIRES),
    ("exchange/wire/powersgd.py", "self.q[name].copy_(total)", "pass", f"{POWERSGD} {WIRES}"),
    ("exchange/wire/powersgd.py", "own.T, alpha=-1, out", "own.T, alpha=-0.5, out", f"{POWERSGD} {WIRES}"),
    ("exchange/wire/powersgd.py", "torch.linalg.qr(part).Q", "part", f"{POWERSGD} {WIRES}"),
    ("exchange/wire/powersgd.py", "x.add_(residual, alpha=launch.factor)", "x.add_(residual)", f"{POWERSGD} {WIRES}"),
    ("exchange/wire/hierarchical.py", ".transpose(0, 1).reshape(-1)\n", ".reshape(-1)\n", HIERARCHICAL),
    # ------------------------------------------------------------------ text
    ("order/epochs.py", "rank * each + min(rank, more)", "rank * each + more", STREAM),
    (
        "order/epochs.py",
        "lambda epoch: permutation(items, seed, epoch, *key)",
        "lambda epoch: permutation(items, seed, 0)",
        STREAM,
    ),
    (
        "task/stream.py",
        "ready.append(pool.submit(self._load, self.position // part + len(ready), part))",
        "ready.append(pool.submit(self._load, self.position // part + 1, part))",
        STREAM,
    ),
    ("order/lanes.py", "top = 1 + max(", "top = max(", STREAM),
    ("text/windows.py", "(picked[:, :-1], picked[:, 1:])", "(picked[:, 1:], picked[:, 1:])", STREAM),
    (
        "text/windows.py",
        "(without[:, 0] - context) // context",
        "without[:, 0] // context",
        "tests/text/test_tokens.py",
    ),
    ("text/packed.py", "starts + context - goes_on", "starts + context", "tests/text/test_packed.py"),
    ("text/packed.py", "self.tokens[first - goes_on :", "self.tokens[first :", "tests/text/test_packed.py"),
    ("text/packed.py", "free[left] = bool(room[left])", "pass", "tests/text/test_packed.py"),
    ("text/tokens.py", "if wanted == plain:", "if False:", "tests/text/test_tokens.py"),
    (
        "text/shards.py",
        "left or added.hexdigest() != state.added",
        "left",
        "tests/text/test_resumed_prepare.py",
    ),
    ("task/stream.py", "max(1, int(units // items.units))", "1", STREAM),
    ("order/clients.py", "np.argmin((got + sizes[document]) / shares)", "np.argmin(got + sizes[document])", CLIENTS),
    ("order/clients.py", "got[client] += sizes[document]", "got[client] += 1", CLIENTS),
    ("order/clients.py", "drawn(seed, EPOCH, client, epoch)", "drawn(seed, EPOCH, client)", CLIENTS),
    ("text/overlap.py", "train[at : at + BLOCK + RUN - 1]", "train[at : at + BLOCK]", "tests/text/test_overlap.py"),
    ("text/overlap.py", "context + 2 - RUN", "context + 1 - RUN", "tests/text/test_overlap.py"),
    (
        "text/shards.py",
        "self.writers[side].add(run)",
        "self.writers[1 - side].add(run)",
        "tests/text/test_shards.py tests/text/test_corpus.py",
    ),
    ("text/shards.py", "mode &= path.stat().st_mode | 0o600", "pass", "tests/folders/test_private.py"),
    (
        "text/shards.py",
        "if (most := _largest(tokens, shard.flagged)) >= tokenizer.vocab",
        "if (most := 0)",
        f"{SHARDS} tests/folders",
    ),
    ("text/tokenize.py", "2**16 else np.uint32", "2**15 else np.uint32", "tests/text/test_tokenize.py"),
    ("text/tokenize.py", "sizes[self.end] = 0", "pass", "tests/text/test_tokenize.py"),
    # ------------------------------------------------------------------ checkpoint
    ("checkpoint/read.py", "] += values.reshape(-1).to(vector)", "] = values.reshape(-1).to(vector)", CHECKPOINT),
    ("checkpoint/read.py", "(name if start < covered[name] else None)", "None", f"{CHECKPOINT} tests/folders"),
    ("checkpoint/read.py", "not bool(values.isfinite().all())", "False", f"{CHECKPOINT} tests/folders"),
    ("checkpoint/read.py", "int(start or 0) + values.numel() > whole.numel()", "False", f"{CHECKPOINT} tests/folders"),
    ("checkpoint/whole.py", "key=lambda path: int(path.name)", "key=lambda path: path.name", CHECKPOINT),
    ("checkpoint/whole.py", "!= expected:", "== 0:", CHECKPOINT),
    ("checkpoint/write.py", "older and kept < keep", "older and kept <= keep", CHECKPOINT),
    ("checkpoint/write.py", "path.absolute() in _WHOLE or broken(path) is None", "True", CHECKPOINT),
    ("checkpoint/write.py", "os.replace(final, aside)", "shutil.rmtree(final)", CHECKPOINT),
    ("checkpoint/write.py", 'else f"@{part.start}")', 'else f"@{part.start + 1}")', CHECKPOINT),
    # ------------------------------------------------------------------ trainer
    ("trainer/backward.py", "self.seed, round_, self.rank, index", "self.seed, round_, index", f"{DUE} {SAYS}"),
    ("trainer/backward.py", "self.seed, round_, self.rank, index", "self.seed, self.rank, index", f"{DUE} {SAYS}"),
    ("trainer/backward.py", "(loss * (1 + 0 * value)).backward()", "loss.backward()", f"{DUE} {SAYS}"),
    ("trainer/backward.py", "in reversed(gradients)", "in gradients", f"{DUE} {SAYS}"),
    ("trainer/audit.py", "2 * index + 1", "1", "tests/trainer/test_audit.py"),
    ("trainer/audit.py", ".land() / world.size", ".land()", "tests/trainer/test_audit.py"),
    ("trainer/audit.py", "| 1).to(device)", ").to(device)", "tests/trainer/test_audit.py"),
    ("task/causal_lm.py", "loss / math.log(2) / max", "loss / max", DUE),
    ("trainer/evaluate.py", "model.eval()", "pass", DUE),
    ("trainer/straggler.py", ">= longer / 2", ">= 0", "tests/trainer/test_straggler.py"),
    ("trainer/straggler.py", "- ERRORS * stdev(shares)", "- stdev(shares)", "tests/trainer/test_straggler.py"),
    ("trainer/trunk.py", "steps if isinstance(steps, int) else 0", "0", "tests/trainer/test_trunk.py"),
    # ------------------------------------------------------------------ folders of transformers
    ("models/gpt.py", "+ (1 - kept_E2) * frequency_E2 / factor", "+ frequency_E2 / factor", HUGGING),
    ("models/gpt.py", ".clamp(0, 1)", "", HUGGING),
    (
        "models/size.py",
        "return settings.vocab or pad_vocab(tokens)",
        "return pad_vocab(settings.vocab or tokens)",
        TUNED,
    ),
    ("models/hugging.py", 'slides = kind == "mistral" or', "slides = False or", TUNED),
    ("models/hugging.py", "if bias != mlp_bias:", "if False:", TUNED),
    (
        "models/hugging.py",
        'theta = _number(about if "rope_theta" in about else found,',
        "theta = _number(found,",
        HUGGING,
    ),
    ("models/hugging.py", "real.parents[1] if", "real.parents[0] if", HUGGING),
    ("checkpoint/hugging.py", "if place.dtype not in FLOATS:", "if False:", TUNED),
    ("checkpoint/hugging.py", "if not bool(values.isfinite().all()):", "if False:", TUNED),
    ("checkpoint/hugging.py", "if others := sorted(", "if others := 0 * sorted(", TUNED),
    ("checkpoint/hugging.py", "if not torch.equal(left", "if False and not torch.equal(left", HUGGING),
    ("config/trunk.py", "if left[name] != right[name]:", "if False:", TUNED),
    ("config/trunk.py", "model.context = found.positions", "pass", HUGGING),
    (
        "trainer/export.py",
        "if isinstance(config, dict) and hugging.BY in config:",
        "if isinstance(config, dict):",
        HUGGING,
    ),
    ("trainer/export.py", "shutil.rmtree(part, ignore_errors=True)", "pass", HUGGING),
    ("trainer/trunk.py", "if theirs != tokenizer_hash:", "if False:", TUNED),
    ("models/hugging.py", "part * width)", "0)", BERT),
    ("checkpoint/hugging.py", "rows.add_(values[:1].to(rows))", "pass", BERT),
    ("task/masked_lm.py", "self.vocab if own is None else own", "self.vocab", BERT),
    ("text/tokenize.py", "(id := whole.token_to_id(MASKS[0])) != self.vocab", "(id := 0)", BERT),
    ("trainer/trunk.py", "each.lora_alpha, ", "", FROZEN),
    ("trainer/frozen.py", "load(folder, theirs)", "pass", FROZEN),
    ("models/gpt.py", "- p_nV.amax(-1, keepdim=True).log()", "", "tests/models/test_gpt.py"),
    ("bench/trainer.py", "remove_unused_columns=False", "remove_unused_columns=True", "tests/bench/test_bench_step.py"),
    (
        "trainer/harness.py",
        "yield whole[max(0, stop - most) : start + 1]",
        "yield whole[start : start + 1]",
        "tests/trainer/test_harness.py",
    ),
    (
        "trainer/harness.py",
        "count = min(len(pairs[k][1]), len(ids) - 1)",
        "count = len(ids) - 1",
        "tests/trainer/test_harness.py",
    ),
    # ------------------------------------------------------------------ task and what is around it
    ("text/tokens.py", "if most >= tokenizer.vocab:", "if False:", "tests/text/test_tokens.py"),
    ("task/joined.py", 'side="right") - 1', 'side="left") - 1', "tests/text/test_tokens.py"),
    ("task/joined.py", "[share / part.units for", "[share for", "tests/text/test_mix.py"),
    ("text/mix.py", "whole=whole, apart=apart)", "whole=whole)", "tests/text/test_mix.py"),
    ("trainer/evaluate.py", "sources[name].share * value", "value / len(found)", "tests/text/test_mix.py"),
    ("order/mixture.py", "int(block) * self.counts[number] + ", "", "tests/order/test_mixture.py"),
    ("text/conversations.py", "(found & COUNTS) > 0", "found > 0", "tests/task/test_chat.py"),
    (
        "tables.py",
        "mean.square().mean(1)",
        "mean.square().sum(1)",
        f"tests/exchange/test_rows.py {TASK}/test_ratings.py",
    ),
    ("models/lora.py", "adapter.b @ adapter.a * adapter.scale", "adapter.b @ adapter.a", "tests/models/test_lora.py"),
    ("trainer/frozen.py", "not p.requires_grad and id(p)", "id(p)", "tests/trainer/test_frozen.py"),
    ("task/masked_lm.py", "how < 0.8", "how < 0.5", f"{TASK}/test_masked_lm.py"),
    ("task/masked_lm.py", "else int(epochs[i])", "else 0", f"{TASK}/test_masked_lm.py"),
    ("models/bert.py", "(targets_BT >= 0)", "(targets_BT > 0)", f"tests/models/test_bert.py {TASK}/test_masked_lm.py"),
    ("task/images.py", "draw = drawn(seed, row, epoch)", "draw = drawn(seed, row)", f"{TASK}/test_images.py"),
    ("task/images.py", "/ 127.5 - 1", "/ 127.5", f"{TASK}/test_images.py"),
    ("task/own.py", '"loss": sums[0] / sums[1]', '"loss": sums[0]', "tests/test_session.py"),
    ("task/own.py", "int(self.count(item))", "1", "tests/test_session.py"),
    ("trainer/buffers.py", " * float(trains)", "", "tests/trainer/test_buffers.py"),
    ("trainer/buffers.py", "total[:-1] / total[-1]", "total[:-1] / world.size", "tests/trainer/test_buffers.py"),
    ("report/metric.py", "return 1 - value if", "return value if", "tests/report/test_report_read.py"),
    ("online/joined.py", "if entry.tokens >= self._joined[k].tokens", "if True", f"{ONLINE}/test_stream_readers.py"),
    ("online/joined.py", "first=joined.tokens,", "first=joined.tokens + 1,", f"{ONLINE}/test_stream_readers.py"),
    ("online/joined.py", "over = all(", "over = any(", f"{ONLINE}/test_stream_readers.py"),
    (
        "online/joined.py",
        "            before = entry\n",
        "            before = Entry()\n",
        f"{ONLINE}/test_stream_readers.py",
    ),
    (
        "online/readers.py",
        "hosts[k % len(hosts)] == world.rank",
        "world.local_rank == 0",
        f"{ONLINE}/test_stream_readers.py",
    ),
    ("online/readers.py", "if settings.shared else (0, 1)", "if False else (0, 1)", f"{ONLINE}/test_stream_readers.py"),
    ("online/log.py", "begin = self._ends[at - 1] if at else 0", "begin = 0", f"{ONLINE}/test_stream_readers.py"),
    (
        "online/log.py",
        "        self._cut()\n\n    def _cut",
        "        pass\n\n    def _cut",
        f"{ONLINE}/test_reader.py {ONLINE}/test_log.py",
    ),
    (
        "online/log.py",
        "if zlib.crc32(np.ascontiguousarray(held).tobytes()) != entry.sum:",
        "if False:",
        f"{ONLINE}/test_log.py",
    ),
    ("online/log.py", "room = part[: SEGMENT - place]", "room = part", f"{ONLINE}/test_log.py"),
    (
        "online/log.py",
        "            self._index.truncate(size)\n            self._cut()\n",
        "            self._index.truncate(size)\n",
        f"{ONLINE}/test_reader.py {ONLINE}/test_log.py",
    ),
    ("online/decider.py", "last[entry.reader] = entry", "last[0] = entry", f"{ONLINE}/test_stream_readers.py"),
    (
        "online/decider.py",
        "self._unforgotten[0].tokens <= trained",
        "self._unforgotten[0].tokens <= 10**12",
        f"{ONLINE}/test_stream_readers.py {ONLINE}/test_log_stream.py",
    ),
    (
        "online/rounds.py",
        "np.array([round.next - 1]))[0]) + 1",
        "np.array([round.next]))[0])",
        f"{ONLINE}/test_log_rounds.py",
    ),
    (
        "online/rounds.py",
        "return whole * (self.slice - self.held) + min(rest, self.slice - self.held)",
        "return whole * (self.slice - self.held) + rest",
        f"{ONLINE}/test_log_rounds.py",
    ),
    ("online/rounds.py", "begin = fresh - self.fresh", "begin = first", f"{ONLINE}/test_log_rounds.py"),
    ("online/rounds.py", "stride = waiting // self.fresh", "stride = 1", f"{ONLINE}/test_log_rounds.py"),
    (
        "online/rounds.py",
        "begins = np.minimum([0, *(k * (layout.slice - layout.held)",
        "begins = np.minimum([0, *(k * layout.slice",
        f"{ONLINE}/test_replay.py",
    ),
    (
        "online/rounds.py",
        "return next((losses for _, since, losses in reversed(self._lines) if since <= number), None)",
        "return next((losses for _, since, losses in reversed(self._lines)), None)",
        f"{ONLINE}/test_replay.py",
    ),
    ("online/windows.py", "each *= 2", "each += 1", f"{ONLINE}/test_slices.py"),
    (
        "online/stream.py",
        "first, own = deal(len(chosen), count - 1 - number_of if turned else number_of, count)",
        "first, own = deal(len(chosen), number_of, count)",
        f"{ONLINE}/test_log_stream.py {ONLINE}/test_replay.py",
    ),
    (
        "online/stream.py",
        "batch.fresh = share.spelled[index] if index < len(share.spelled) else 0",
        "batch.fresh = 1",
        f"{ONLINE}/test_log_stream.py {ONLINE}/test_replay.py",
    ),
    ("online/sources.py", "return item % self.of == self.number", "return True", f"{ONLINE}/test_stream_readers.py"),
    ("online/sources.py", "self._inside = not taken.over", "self._inside = False", f"{ONLINE}/test_sources.py"),
    ("online/sources.py", "taken.lost = gone - self.count", "taken.lost = 0", f"{ONLINE}/test_sources.py"),
    ("online/sources.py", "            self._ask = 1\n", "            pass\n", f"{ONLINE}/test_sources.py"),
    (
        "online/sources.py",
        'minid=f"{milliseconds}-{number + 1}"',
        'minid=f"{milliseconds}-{number}"',
        f"{ONLINE}/test_sources.py {ONLINE}/test_stream_readers.py",
    ),
    (
        "online/waiting.py",
        "        self._heard += 1\n        return Asks(",
        "        return Asks(",
        f"{ONLINE}/test_waiting.py",
    ),
    (
        "online/waiting.py",
        "found.stop, found.save = found.stop or stop, found.save or save",
        "pass",
        f"{ONLINE}/test_waiting.py",
    ),
    ("online/drift.py", "self._deviation, MOST) - SLACK)", "self._deviation, MOST))", f"{ONLINE}/test_drift.py"),
    ("online/drift.py", "residual = max(-bound, min(bound, residual))", "pass", f"{ONLINE}/test_drift.py"),
    ("online/changes.py", "if round.next <= first:", "if round.next < first:", f"{ONLINE}/test_changes.py"),
    ("trainer/prequential.py", "-tokens / self.window))", "0))", PREQUENTIAL),
    ("trainer/prequential.py", "if not fresh or not self.window:", "if not self.window:", PREQUENTIAL),
]


def main(parts: list[str]) -> int:
    chosen = [each for each in MUTANTS if not parts or each[0].startswith(tuple(parts))]
    counted: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="hvdllm-mutants-") as tmp:
        copy = Path(tmp) / "tree"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "runs", "__pycache__", "*.egg-info"))
        named = sorted({test for *_, tests in chosen for test in tests.split()})
        if verdict(copy, copy / "hvdllm" / "plain.py", "Json = ", "Json = ", named) != "SURVIVED":
            print((copy.parent / "pytest.log").read_text()[-3000:])
            print("the tests fail without a mutant, so no mutant can be judged: mend them first")
            return 1
        for name, old, new, tests in chosen:
            begin = time.monotonic()
            ended = verdict(copy, copy / "hvdllm" / name, old, new, tests.split())
            counted[ended.split(":")[0]] += 1
            print(f"{ended:14} {name}: {old.strip()} -> {new.strip()}   {time.monotonic() - begin:.0f} s", flush=True)
    print(", ".join(f"{count} {ended}" for ended, count in sorted(counted.items())))
    return int(counted["dead"] < len(chosen))


def verdict(copy: Path, path: Path, old: str, new: str, tests: list[str]) -> str:
    text = path.read_text() if path.exists() else ""
    if text.count(old) != 1:
        return "NOT APPLICABLE"
    path.write_text(text.replace(old, new))
    pid = os.fork()
    if pid == 0:
        os.setsid()
        try:
            os._exit(judge(copy, tests))
        except BaseException:
            traceback.print_exc()
            os._exit(3)
    end = time.monotonic() + LIMIT_S
    while not (done := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            break
        time.sleep(0.05)
    path.write_text(text)
    if not done[0]:
        return "NO END"
    code = os.waitstatus_to_exitcode(done[1])
    if code not in (0, 1):
        print((copy.parent / "pytest.log").read_text())
    return {0: "SURVIVED", 1: "dead"}.get(code, f"pytest ended with {code}")


def judge(copy: Path, tests: list[str]) -> int:
    """In a fork, which has imported all but hvdllm: what pytest returns."""
    output = os.open(copy.parent / "pytest.log", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    for fd in (1, 2):
        os.dup2(output, fd)
    os.chdir(copy)
    os.environ["PYTHONPATH"] = str(copy)
    sys.path[:] = [str(copy), *(path for path in sys.path if Path(path) not in (ROOT, ROOT / "tests"))]
    return int(pytest.main(["-x", "-q", "-m", "not ranks and not thorough", "-p", "no:cacheprovider", *tests]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
