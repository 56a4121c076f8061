"""One task of a TensorFlow cluster that trains the quickstart's transformer, from our weights, on our batches.

    python jobs/bench/tensorflow_train.py SPEC ROLE INDEX

It runs in an environment of TensorFlow's own, and is started by tests/tensorflow_bench.py (see tensorflow.sh), which
writes the JSON file SPEC. Roles are those of tf.distribute:

    alone    one process without a strategy
    worker   of MultiWorkerMirroredStrategy: the gradients of all workers are summed by TensorFlow's collectives
    chief    of ParameterServerStrategy: hands out pushes and evaluates; `worker` and `ps` of it only serve

Sums and divisors are those of hvdllm: the gradient is that of the sum of the losses, divided once by the tokens of all
workers, and clipped by its norm. With parameter servers a push is the share of one worker. It is divided by its own
tokens and clipped by its own norm, and makes a step of its own, at the rate divided by the number of workers.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow_shards import dataset, opened

from hvdllm.order.epochs import deal

Json = dict[str, Any]
CHUNK = 32  # windows that are evaluated at a time


def gelu(x: tf.Tensor) -> tf.Tensor:
    """The tanh form of GELU. In fp64 that of tf.nn has a constant that was rounded to fp32, which is off by 1e-8."""
    return 0.5 * x * (1 + tf.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


class GPT:
    """hvdllm's GPT (hvdllm/models/gpt.py) with rotary positions, RMSNorm, GELU and tied weights, and its AdamW.

    Shapes are written as there. Variables have the names of our parameters. `m` and `v` lie where their variable lies.
    Everything is in the precision of the weights that are given.
    """

    def __init__(self, spec: Json, strategy: tf.distribute.Strategy) -> None:
        self.spec, self.size = spec, spec["model"]
        self.start = dict(np.load(spec["weights"]))
        self.dtype = self.start["embed.weight"].dtype
        self.x = {name: tf.Variable(value, name=name) for name, value in self.start.items()}
        self.m, self.v = {}, {}
        for moments in (self.m, self.v):
            for name, x in self.x.items():
                with strategy.extended.colocate_vars_with(x):
                    moments[name] = tf.Variable(tf.zeros_like(x), trainable=False)
        T, E = self.size["context"], self.size["width"] // self.size["heads"]
        frequency_E2 = self.size["rope_theta"] ** (-np.arange(0, E, 2) / E)
        angle_TE2 = np.outer(np.arange(T), frequency_E2)
        self.cos_TE2, self.sin_TE2 = np.cos(angle_TE2).astype(self.dtype), np.sin(angle_TE2).astype(self.dtype)
        self.mask_TT = np.triu(np.full((T, T), -1e9, self.dtype), 1)

    def reset(self) -> None:
        """Sets the weights and the optimizer back to the beginning."""
        for name, value in self.start.items():
            self.x[name].assign(value)
            self.m[name].assign(np.zeros_like(value))
            self.v[name].assign(np.zeros_like(value))

    def weights(self) -> dict[str, tf.Tensor]:
        """The weights, each read once, since a read may travel."""
        return {name: tf.convert_to_tensor(x) for name, x in self.x.items()}

    def loss(self, x: dict[str, tf.Tensor], windows_BT1: tf.Tensor) -> tf.Tensor:
        """The sum of the cross entropies of all targets, in nats."""
        B, T, D = windows_BT1.shape[0], self.size["context"], self.size["width"]
        H, K = self.size["heads"], self.size["kv_heads"]
        E = D // H

        def linear(y_ND: tf.Tensor, name: str) -> tf.Tensor:
            return tf.matmul(y_ND, x[name + ".weight"], transpose_b=True)

        def norm(y_ND: tf.Tensor, name: str) -> tf.Tensor:
            mean_square = tf.reduce_mean(y_ND * y_ND, -1, keepdims=True)
            return y_ND * tf.math.rsqrt(mean_square + self.size["norm_eps"]) * x[name + ".weight"]

        y_ND = tf.gather(x["embed.weight"], tf.reshape(windows_BT1[:, :-1], [-1]))
        for k in range(self.size["layers"]):
            block = f"blocks.{k}"
            qkv_ND = linear(norm(y_ND, f"{block}.attention_norm"), f"{block}.attention.qkv")
            qkv_BHTE = tf.transpose(tf.reshape(qkv_ND, (B, T, H + 2 * K, E)), (0, 2, 1, 3))
            left, right = tf.split(qkv_BHTE[:, : H + K], 2, axis=-1)
            cos, sin = self.cos_TE2, self.sin_TE2
            turned_BHTE = tf.concat([left * cos - right * sin, right * cos + left * sin], -1)
            # Heads of queries that share a head of keys follow each other, so they become more rows of one product.
            q_BKGE = tf.reshape(turned_BHTE[:, :H], (B, K, H // K * T, E))
            k_BKTE, v_BKTE = turned_BHTE[:, H:], qkv_BHTE[:, H + K :]
            score = tf.reshape(tf.matmul(q_BKGE, k_BKTE, transpose_b=True), (B, H, T, T)) * E**-0.5
            share = tf.reshape(tf.nn.softmax(score + self.mask_TT), (B, K, H // K * T, T))
            seen_BHTE = tf.reshape(tf.matmul(share, v_BKTE), (B, H, T, E))
            y_ND += linear(tf.reshape(tf.transpose(seen_BHTE, (0, 2, 1, 3)), (B * T, D)), f"{block}.attention.out")
            hidden = linear(norm(y_ND, f"{block}.mlp_norm"), f"{block}.mlp.up")
            y_ND += linear(gelu(hidden), f"{block}.mlp.down")
        logits_NV = tf.matmul(norm(y_ND, "norm"), x["embed.weight"], transpose_b=True)
        targets_N = tf.reshape(windows_BT1[:, 1:], [-1])
        return tf.reduce_sum(tf.nn.sparse_softmax_cross_entropy_with_logits(targets_N, logits_NV))

    def evaluated(self, windows_BT1: tf.Tensor) -> tf.Tensor:
        """The summed loss of these windows, without a gradient."""
        x = self.weights()
        parts = [windows_BT1[at : at + CHUNK] for at in range(0, windows_BT1.shape[0], CHUNK)]
        return tf.add_n([self.loss(x, part) for part in parts]) if parts else tf.zeros((), self.dtype)

    def gradients(self, windows_BT1: tf.Tensor) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """The summed loss, and the gradient of it."""
        x = self.weights()
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = self.loss(x, windows_BT1)
        found = tape.gradient(loss, x)
        return loss, [tf.convert_to_tensor(found[name]) for name in self.x]

    def clipped(self, sums: list[tf.Tensor], tokens: int) -> list[tf.Tensor]:
        """The mean gradient, clipped by its norm."""
        limit, norm = self.spec["optim"]["clip"], tf.linalg.global_norm(sums) / tokens
        divisor = tokens * tf.maximum(norm / limit, 1.0) if limit else tf.constant(tokens, self.dtype)
        return [each / divisor for each in sums]

    def adamw(self, x: Any, m: Any, v: Any, g: tf.Tensor, rate: tf.Tensor, t: tf.Tensor) -> None:
        """hvdllm/optim/adamw.py for one tensor, in the device scope where that lies. rate and t are float64.

        ResourceApplyAdam makes x -= lr m / (sqrt(v) + epsilon), with m and v not corrected yet. Both corrections are in
        lr and epsilon here, so that this is rate (m / c1) / (sqrt(v / c2) + eps).
        """
        of = self.spec["optim"]
        c1, c2 = (1 - tf.pow(tf.constant(of[beta], tf.float64), t) for beta in ("beta1", "beta2"))
        if len(x.shape) > 1:  # matrices and embeddings decay
            x.assign_sub(tf.cast(rate * of["weight_decay"], self.dtype) * x)
        beta1, beta2, nothing = (tf.constant(value, self.dtype) for value in (of["beta1"], of["beta2"], 0.0))
        tf.raw_ops.ResourceApplyAdam(
            var=x.handle, m=m.handle, v=v.handle, grad=g,
            beta1=beta1, beta2=beta2, beta1_power=nothing, beta2_power=nothing,
            lr=tf.cast(rate * tf.sqrt(c2) / c1, self.dtype), epsilon=tf.cast(of["eps"] * tf.sqrt(c2), self.dtype),
        )  # fmt: skip


class Meter:
    """Seconds of training, and what the interface has sent meanwhile. Evaluations are left out of both.

    marks    [seconds, tokens, bytes sent, packets sent, bytes received, packets received, CPU seconds] at each record
    """

    def __init__(self, interface: str | None) -> None:
        self.folder = Path("/sys/class/net", interface, "statistics") if interface else None
        self.marks: list[list[float]] = []
        self.records: list[Json] = []
        self.evals: list[Json] = []
        self.begin, self.wall = self.now(), time.perf_counter()

    def now(self) -> np.ndarray:
        names = ("tx_bytes", "tx_packets", "rx_bytes", "rx_packets")
        counts = [int((self.folder / name).read_text()) for name in names] if self.folder else [0] * 4
        return np.array([time.perf_counter(), *counts, time.process_time()])

    def passed(self) -> list[float]:
        return (self.now() - self.begin).tolist()

    @contextlib.contextmanager
    def left_out(self) -> Iterator[None]:
        before = self.now()
        try:
            yield
        finally:
            self.begin += self.now() - before

    def record(self, tokens: int, loss: float, **more: float) -> None:
        seconds, *counts = self.passed()
        self.marks.append([seconds, tokens, *counts])
        self.records.append({"tokens": tokens, "seconds": seconds, "loss": loss, **more})

    def evaluated(self, tokens: int, loss: float) -> None:
        wall = time.perf_counter() - self.wall
        self.evals.append({"tokens": tokens, "seconds": self.passed()[0], "loss": loss, "wall_s": wall})


class Text:
    """The training windows of a worker, and those that are held out."""

    def __init__(self, spec: Json) -> None:
        self.spec, self.context = spec, spec["model"]["context"]

    def train(self, batch: int, places: range, k: int = 0, n: int = 1) -> tf.data.Dataset:
        return dataset(self.spec["train"], self.context, batch, self.spec["seed"], places, k, n)

    def held_out(self, k: int = 0, n: int = 1) -> tf.Tensor:
        first, count = deal(self.spec["eval_windows"], k, n)
        return tf.constant(opened(self.spec["validation"], self.context)[first : first + count].astype(np.int32))

    @property
    def eval_tokens(self) -> int:
        return int(self.spec["eval_windows"] * self.context)


def synchronous(spec: Json, strategy: tf.distribute.Strategy, options: Any, index: int) -> Meter:
    """Trains alone, or as a worker of MultiWorkerMirroredStrategy, and says what was seen."""
    workers, batch, text = spec["workers"], spec["batch"], Text(spec)
    tokens = batch * text.context
    with strategy.scope():
        model = GPT(spec, strategy)

    def update(strategy: Any, gradients: list[tf.Tensor], rate: tf.Tensor, t: tf.Tensor) -> None:
        for name, g in zip(model.x, gradients, strict=True):
            strategy.extended.update(model.x[name], model.adamw, args=(model.m[name], model.v[name], g, rate, t))

    def replica(windows: tf.Tensor, rate: tf.Tensor, t: tf.Tensor) -> tf.Tensor:
        loss, sums = model.gradients(windows)
        here = tf.distribute.get_replica_context()
        if workers > 1:
            loss, *sums = here.all_reduce(tf.distribute.ReduceOp.SUM, [loss, *sums], options)
        here.merge_call(update, args=(model.clipped(sums, tokens), rate, t))
        return loss

    @tf.function
    def step(windows: tf.Tensor, rate: tf.Tensor, t: tf.Tensor) -> tf.Tensor:
        return strategy.run(replica, args=(windows, rate, t))

    @tf.function
    def evaluate(windows: tf.Tensor) -> tf.Tensor:
        return strategy.reduce("SUM", strategy.run(model.evaluated, args=(windows,)), axis=None)

    held_out = text.held_out(index, workers)
    one = tf.constant(1.0, tf.float64)
    for windows in text.train(batch, range(2), index, workers):  # traces, allocates and connects
        step(windows, one * 0, one)
    evaluate(held_out)
    model.reset()
    evaluate(held_out)  # all workers have reset theirs
    meter = Meter(spec["interface"])
    for k, windows in enumerate(text.train(batch, range(spec["updates"]), index, workers), 1):
        loss = float(step(windows, one * spec["rates"][k - 1], one * k)) / tokens
        meter.record(k * tokens, loss, lr=spec["rates"][k - 1], updates=1)
        if k % spec["eval_every"] == 0 or k == spec["updates"]:
            with meter.left_out():
                total = float(evaluate(held_out))
            meter.evaluated(k * tokens, total / text.eval_tokens)
    return meter


def servers(spec: Json, cluster: Any) -> Meter:
    """Trains as the chief of ParameterServerStrategy, and says what was seen."""
    workers, text = spec["workers"], Text(spec)
    share = spec["batch"] // workers
    tokens, pushes = share * text.context, spec["updates"] * workers
    strategy = tf.distribute.ParameterServerStrategy(cluster)
    coordinator = tf.distribute.coordinator.ClusterCoordinator(strategy)
    with strategy.scope():
        model = GPT(spec, strategy)
        made = tf.Variable(0, dtype=tf.int64, trainable=False)  # pushes that were applied

    def push(windows: tf.Tensor, scale: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        before = made.read_value()
        with tf.control_dependencies([before]):
            loss, sums = model.gradients(windows)
        with tf.control_dependencies(sums):
            now = made.assign_add(1, read_value=True)
        t = tf.cast(now, tf.float64)
        rate = scale * tf.gather(tf.constant(spec["rates"], tf.float64), tf.minimum(now, pushes) - 1) / workers
        for (name, x), g in zip(model.x.items(), model.clipped(sums, tokens), strict=True):
            with tf.device(x.device):
                model.adamw(x, model.m[name], model.v[name], g, rate, t)
        return loss, now - 1 - before

    pushed, evaluate = tf.function(push), tf.function(model.evaluated)
    one, held_out = tf.constant(1.0, tf.float64), text.held_out()
    for windows in text.train(share, range(2 * workers)):
        coordinator.schedule(pushed, args=(windows, one * 0))
    coordinator.join()
    evaluate(held_out)
    model.reset()
    made.assign(0)
    meter, waiting = Meter(spec["interface"]), []
    for k, windows in enumerate(text.train(share, range(pushes)), 1):
        waiting.append(coordinator.schedule(pushed, args=(windows, one)))
        if k % (spec["eval_every"] * workers) and k < pushes:
            continue
        coordinator.join()  # nobody waits for anybody in between
        found = [each.fetch() for each in waiting]
        stale = [int(each[1]) for each in found]
        loss = sum(float(each[0]) for each in found) / (tokens * len(found))
        more = {"staleness_mean": sum(stale) / len(stale), "staleness_max": max(stale), "updates": len(found)}
        meter.record(k * tokens, loss, lr=spec["rates"][k - 1], **more)
        waiting = []
        with meter.left_out():
            total = float(evaluate(held_out))
        meter.evaluated(k * tokens, total / text.eval_tokens)
    return meter


def trained(spec: Json, role: str, index: int, addresses: tf.train.ClusterSpec) -> Meter:
    """What this task has seen of the training."""
    of = tf.distribute
    if role == "alone":
        return synchronous(spec, of.get_strategy(), None, index)
    cluster = of.cluster_resolver.SimpleClusterResolver(addresses, task_type=role, task_id=index, rpc_layer="grpc")
    if role == "chief":
        return servers(spec, cluster)
    kind = of.experimental.CommunicationImplementation[spec["communication"].upper()]
    options = of.experimental.CommunicationOptions(bytes_per_pack=spec["pack_bytes"], implementation=kind)
    # Before any other operation, or: "Collective ops must be configured at program startup".
    strategy = of.MultiWorkerMirroredStrategy(cluster_resolver=cluster, communication_options=options)
    return synchronous(spec, strategy, options, index)


def main(path: str, role: str, index: int) -> None:
    spec = json.loads(Path(path).read_text())
    folder, trains = Path(spec["folder"]), spec["trains"]
    tf.config.threading.set_intra_op_parallelism_threads(spec["threads"])
    tf.config.threading.set_inter_op_parallelism_threads(1)
    addresses, server = tf.train.ClusterSpec(spec["cluster"]), None
    if role != trains:
        server = tf.distribute.Server(addresses, role, index, protocol="grpc", start=True)
    else:
        meter = trained(spec, role, index, addresses)
        seen = {
            "marks": meter.marks, "records": meter.records, "evals": meter.evals,
            "versions": {"python": platform.python_version(), "tensorflow": tf.__version__, "numpy": np.__version__},
        }  # fmt: skip
        part = folder / f"{role}-{index}.part"
        part.write_text(json.dumps(seen))
        part.rename(folder / f"{role}-{index}.json")
    # All leave together, and at once: a shutdown would wait for peers that are gone, and a server serves for ever.
    while not all((folder / f"{trains}-{k}.json").exists() for k in range(len(spec["cluster"][trains]))):
        time.sleep(0.05)
    del server
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
