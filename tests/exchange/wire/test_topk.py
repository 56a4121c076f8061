"""wire=topk: the largest, where they are found, and the momentum of Deep Gradient Compression."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from wire_kit import LENGTH, Rig, equals_numpy, rows, run

from hvdllm.exchange.wire import codecs
from hvdllm.exchange.wire.parts import TopK


def np_topk(u: np.ndarray) -> np.ndarray:
    out = np.zeros(len(u))
    best = np.argsort(-abs(u), kind="stable")[: -(-len(u) // 100)]
    out[best] = u[best]
    return out


def same(u: np.ndarray) -> np.ndarray:
    return u


def test_chunks_of_the_largest_lose_nothing_either() -> None:
    def body(rig: Rig) -> tuple[torch.Tensor, ...]:
        came = rig.fill(0)
        return came, rig.sum(), rig.left(), rig.scatter()

    came, went, left, _ = zip(*run(3, TopK(warmup_tokens=0, chunk_mb=0.08), body), strict=True)
    assert torch.allclose(went[0] + sum(left), sum(came), rtol=0, atol=1e-9)
    assert torch.count_nonzero(went[0]) > 100


def test_density_1_is_the_exact_sum() -> None:
    def body(rig: Rig) -> tuple[torch.Tensor, ...]:
        return rig.fill(0), rig.sum(), rig.left()

    came, went, left = zip(*run(3, TopK(density=1.0, warmup_tokens=0), body), strict=True)
    total = came[0] + came[1] + came[2]
    assert torch.equal(went[0], total) and not any(each.any() for each in left)


@pytest.mark.parametrize("density", [1.0, 0.05])
def test_momentum_correction_is_dgc(density: float) -> None:
    """In NumPy, by pieces; at density 1 factor masking leaves plain sums of matrices. Vectors: momentum, unmasked."""
    n, mu, rounds = 2, 0.9, 5

    def body(rig: Rig) -> tuple[list[torch.Tensor], list[torch.Tensor], Any]:
        came, went = [], []
        for t in range(rounds):
            came.append(rig.fill(t))
            went.append(rig.sum())
        return came, went, rig.flat

    results = run(n, TopK(density=density, warmup_tokens=0, momentum=mu), body)
    flat = results[0][2]
    came = np.array([[g.numpy() for g in result[0]] for result in results])
    u, v = np.zeros((n, len(flat.x))), np.zeros((n, len(flat.x)))
    for t in range(rounds):
        want = np.zeros(len(flat.x))
        u = mu * u + came[:, t]
        v = v + u
        for bucket in flat.buckets:
            for piece in np.split(np.arange(bucket.span.start, bucket.span.stop), n):
                for i in range(n):
                    chosen = piece[np.argsort(-abs(v[i, piece]))[: int(np.ceil(density * len(piece)))]]
                    if bucket.span.decayed:
                        want[chosen] += v[i, chosen]
                        v[i, chosen] = u[i, chosen] = 0
                    else:
                        want[piece] += u[i, piece]
        assert np.allclose(results[0][1][t].numpy(), want, rtol=1e-9, atol=1e-9), f"round {t}"
    vectors = flat.buckets[2].span
    momentum = sum(mu ** (rounds - 1 - t) * came[:, t].sum(0) for t in range(rounds))
    assert np.allclose(results[0][1][-1].numpy()[vectors.start :], momentum[vectors.start :])
    if density == 1:
        assert np.allclose(results[0][1][-1].numpy()[: vectors.start], came[:, -1].sum(0)[: vectors.start])


def test_the_density_falls_in_equal_steps_from_a_quarter() -> None:
    settings = TopK(density=0.25 / 4**4, warmup_tokens=400)

    def body(rig: Rig) -> list[float]:
        return [rig.wire.density(c) for c in (0, 99, 100, 200, 399, 400, 10**6)]

    assert run(1, settings, body)[0] == pytest.approx([0.25, 0.25, 1 / 16, 1 / 64, 1 / 256, 1 / 1024, 1 / 1024])


@pytest.mark.parametrize("kind", ["normal", "ties", "small sample", "nan"])
def test_the_largest_are_the_largest(kind: str) -> None:
    sizes = torch.from_numpy(np.random.default_rng(1).exponential(size=50_000)).float()
    if kind == "ties":
        sizes = sizes.floor()
    if kind == "small sample":  # it says too much is small: all have to be looked at
        sizes[::64] += 100
    if kind == "nan":
        sizes[1] = float("nan")
    k = 900
    got = codecs._largest(sizes, k)
    assert len(set(got.tolist())) == k
    want = np.sort(np.nan_to_num(sizes.numpy(), nan=np.inf))[-k:]
    assert np.array_equal(np.sort(np.nan_to_num(sizes[got].numpy(), nan=np.inf)), want)


def test_the_way_back_of_the_largest_carries_all_there_is() -> None:
    code: Any = codecs.TopKCode(0.02)
    u = rows("normal")
    u[:, 0] = 9  # where the filling stands
    decoded = code.decode(code.encode(u), LENGTH, torch.float64)
    total, back = decoded.sum(0, keepdim=True), code.back(3)
    payload = back.encode(total)
    assert torch.equal(back.decode(payload, LENGTH, torch.float64), total) and payload.shape[1] == 3 * 108 * 12
    assert torch.equal(back.decode(back.encode(total * 0), LENGTH, torch.float64), total * 0)
    wide = codecs.TopKCode(0.3)
    assert wide.back(3).encode(total).shape[1] == LENGTH * 8  # not more than the row as it is


@pytest.mark.parametrize("k", [1, 5, 9, 10, 11, 40, 300])
def test_the_largest_are_found_though_all_large_numbers_were_sampled(k: int) -> None:
    """Each 64th number is looked at first: here those alone are large, and fewer than k pass the bound."""
    sizes = torch.arange(64 * 200) / 1e6
    sizes[::64] += torch.arange(200) + 1.0
    found = codecs._largest(sizes, k)
    assert sorted(found.tolist()) == sorted(sizes.argsort(descending=True)[:k].tolist())


@pytest.mark.parametrize("n", [2, 3])
def test_equals_the_algorithm_in_numpy(n: int) -> None:
    equals_numpy(n, TopK(warmup_tokens=0), np_topk, same)
