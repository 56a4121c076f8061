"""The coded wires: nothing is lost, two roundings, the code's own numbers, the bytes."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from wire_kit import NOMINAL, Rig, run

from hvdllm.exchange.wire.build import make_wire
from hvdllm.exchange.wire.parts import Bf16, Fp16, Fp32, Int8, Sign, TopK

CODED = [Fp16(), Bf16(), Int8(), TopK(warmup_tokens=0), Sign(warmup_tokens=0), Sign(warmup_tokens=0, scale="l2")]
NAMES = ["fp16", "bf16", "int8", "topk", "sign", "sign-l2"]
each_wire = pytest.mark.parametrize("settings", CODED, ids=NAMES)


# ------------------------------------------------------------------ nothing is lost
@each_wire
@pytest.mark.parametrize("n", [2, 3, 4])
def test_all_that_came_in_is_decoded_or_kept(settings: Any, n: int) -> None:
    weights = np.linspace(0.02, 0.3, 30)
    weights[[0, 11]] = 0

    def body(rig: Rig) -> tuple[torch.Tensor, ...]:
        came = went = torch.zeros_like(rig.flat.x)
        for t, weight in enumerate(weights):
            rig.wire.begin(t * NOMINAL, weight)
            came = came + weight * rig.fill(t)
            went = went + weight * rig.sum()
        assert rig.left().any()
        return came, went, weights[-1] * rig.left(), rig.flat.g

    came, went, left, last = zip(*run(n, settings, body), strict=True)
    assert torch.allclose(went[0] + sum(left), sum(came), rtol=0, atol=1e-9 * sum(came).abs().max().item())
    for other in range(1, n):
        assert torch.equal(went[other], went[0]) and torch.equal(last[other], last[0])


@each_wire
def test_a_scatter_keeps_what_it_leaves_and_rounds_once(settings: Any) -> None:
    def body(rig: Rig) -> tuple[torch.Tensor, ...]:
        came = went = torch.zeros_like(rig.flat.x)
        for t in range(12):
            rig.wire.begin(t * NOMINAL, 0.1)
            came = came + rig.fill(t)
            went = went + rig.scatter()
        assert "owner" not in rig.saved()[1]
        return came, went, rig.left()

    came, went, left = (sum(each) for each in zip(*run(3, settings, body), strict=True))
    assert torch.allclose(went + left, came, rtol=0, atol=1e-9 * came.abs().max().item())


@pytest.mark.parametrize("settings", [*CODED, TopK(warmup_tokens=3 * NOMINAL), Fp32()], ids=[*NAMES, "warm-up", "fp32"])
def test_a_sum_launched_before_the_last_has_landed_is_the_same(settings: Any) -> None:
    """Weight and density are fixed at the launch: the driver thread may be late. Two in flight at most."""

    def body(rig: Rig, late: bool) -> torch.Tensor:
        flights, vectors = [], []
        for t, weight in enumerate((0.1, 0.3, 0.2)):
            rig.wire.begin(t * NOMINAL, weight)
            vectors.append(rig.fill(t)[: rig.flat.buckets[0].span.stop])
            flights.append(rig.wire.sum(vectors[-1], "grad.0"))
            if not late:
                flights[-1].land()
            elif t:
                flights[-2].land()
        flights[-1].land()
        return torch.cat([*vectors, rig.left()])

    late, soon = (run(3, settings, partial(body, late=late)) for late in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(late, soon, strict=True))


def test_at_weight_zero_residuals_stay_what_they_were_worth() -> None:
    def body(rig: Rig) -> list[torch.Tensor]:
        factors = []
        for weight in (0.0, 0.2, 0.0, 0.4):
            rig.wire.begin(0, weight)
            factors.append(rig.wire.launch("grad.0").factor)
        return factors

    assert run(1, Int8(), body)[0] == [0.0, 1.0, 0.0, 0.5]


def test_an_exact_sum_of_no_weight_leaves_what_is_kept_and_the_next_spends_it_all() -> None:
    """As in a warm-up of the rate from 0, or a round that nobody commits."""

    def body(rig: Rig) -> list[Any]:
        index = rig.flat.buckets[0].index
        rig.wire.begin(0, 0.2)
        rig.wire.launch("grad.0")
        rig.wire.residual[index] = torch.ones_like(rig.flat.x[: rig.flat.buckets[0].span.stop])
        seen = []
        for weight in (0.0, 0.4, 0.4):
            rig.wire.begin(0, weight)
            x = torch.zeros_like(rig.wire.residual.get(index, seen[-1] if seen else None))
            seen.append(rig.wire.spend(x, rig.wire.launch("grad.0")))
        return [x.unique().tolist() for x in seen]

    assert run(1, Sign(warmup_tokens=NOMINAL), body)[0] == [[0.0], [0.5], [0.0]]


@pytest.mark.parametrize("settings", [TopK(warmup_tokens=0), Sign(warmup_tokens=0)], ids=["topk", "sign"])
def test_a_rate_that_falls_to_nothing_leaves_the_decoded_sum_bounded(settings: Any) -> None:
    """schedule=wsd with its floor of 0. Weighed by old over new rate alone, the last sums are made of old residuals: 15
    and 4 times as long as those before the fall."""

    def body(rig: Rig) -> list[float]:
        norms = []
        for t, weight in enumerate([*[1.0] * 30, *np.linspace(1, 1 / 41, 41)]):
            rig.wire.begin(t * NOMINAL, float(weight))
            rig.fill(t)
            norms.append(rig.sum().norm().item())
        return norms

    norms = run(2, settings, body)[0]
    assert max(norms[30:]) < 4 * max(norms[:30])


@each_wire
def test_padding_stays_empty(settings: Any) -> None:
    def body(rig: Rig) -> torch.Tensor:
        used = torch.zeros_like(rig.flat.x)
        for place in rig.flat.at.values():
            used[place] = 1
        for t in range(3):
            rig.fill(t)
            rig.sum()
        return ((rig.flat.g.abs() + rig.left().abs()) * (1 - used)).sum()

    assert run(4, settings, body) == [0, 0, 0, 0]


# ------------------------------------------------------------------ against NumPy
def blocks(u: np.ndarray, size: int) -> list[np.ndarray]:
    return [u[i : i + size] for i in range(0, len(u), size)]


def np_fp16(u: np.ndarray) -> np.ndarray:
    scaled = (u * 2.0 ** (10 - 12)).astype(np.float32)  # 3000 tokens a batch: at most 2^12
    return scaled.astype(np.float16).astype(np.float64) * 4


def np_bf16(u: np.ndarray) -> np.ndarray:
    bits = u.astype(np.float32).view(np.uint32)
    kept = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return kept.view(np.float32).astype(np.float64)


def np_int8(u: np.ndarray) -> np.ndarray:
    out = []
    for b in blocks(u, 256):
        scale = np.float32(abs(b).max() / 127)
        inverse = 1 / scale if scale else scale
        out.append(np.clip(np.rint(b * np.float64(inverse)), -127, 127) * np.float64(scale))
    return np.concatenate(out)


def np_sign(u: np.ndarray) -> np.ndarray:
    return np.concatenate([np.where(b >= 0, 1, -1) * np.float64(np.float32(abs(b).mean())) for b in blocks(u, 1024)])


def np_sign_l2(u: np.ndarray) -> np.ndarray:
    return np.concatenate(
        [np.where(b >= 0, 1, -1) * np.float64(np.float32((b * b).mean() ** 0.5)) for b in blocks(u, 1024)]
    )


def np_topk(u: np.ndarray) -> np.ndarray:
    out = np.zeros(len(u))
    best = np.argsort(-abs(u), kind="stable")[: -(-len(u) // 100)]
    out[best] = u[best]
    return out


def same(u: np.ndarray) -> np.ndarray:
    return u


REFERENCE = [
    (np_fp16, np_fp16),
    (np_bf16, np_bf16),
    (np_int8, np_int8),
    (np_topk, same),
    (np_sign, np_sign),
    (np_sign_l2, np_sign_l2),
]


@pytest.mark.parametrize(("settings", "codes"), list(zip(CODED, REFERENCE, strict=True)), ids=NAMES)
@pytest.mark.parametrize("n", [2, 3])
def test_equals_the_algorithm_in_numpy(settings: Any, codes: Any, n: int) -> None:
    """The decode of what arrives, by another codec, over rounds: so residuals are those of both roundings."""
    there, back = codes
    rounds = 4

    def body(rig: Rig) -> tuple[list[torch.Tensor], list[torch.Tensor], Any]:
        came, went = [], []
        for t in range(rounds):
            came.append(rig.fill(t))
            went.append(rig.sum())
        return came, went, rig.flat

    results = run(n, settings, body)
    flat = results[0][2]
    used = np.zeros(len(flat.x), bool)
    for place in flat.at.values():
        used[place] = True
    for bucket in flat.buckets[:2]:  # the third is of vectors
        span = slice(bucket.span.start, bucket.span.stop)
        pieces = np.split(np.arange(span.start, span.stop), n)
        e, own = np.zeros((n, len(flat.x))), np.zeros(len(flat.x))
        for t in range(rounds):
            want = np.zeros(len(flat.x))
            for piece in pieces:
                y = own[piece]
                for i in range(n):
                    u = results[i][0][t][piece].numpy() + e[i, piece]
                    decoded = there(u) * used[piece]
                    e[i, piece] = u - decoded
                    y = y + decoded
                want[piece] = back(y) * used[piece]
                own[piece] = y - want[piece]
            got = results[0][1][t].numpy()
            assert np.allclose(got[span], want[span], rtol=1e-6, atol=1e-9 * abs(want).max()), f"round {t}"
            assert abs(got[span]).max() > 0


@pytest.mark.parametrize(
    "settings", [Fp16, Bf16, Int8, lambda **k: Sign(warmup_tokens=0, **k)], ids=["fp16", "bf16", "int8", "sign"]
)
def test_chunks_change_nothing(settings: Any) -> None:
    """Pieces of 13,000 elements in four chunks, of which the last is short, or in one."""

    def body(rig: Rig) -> torch.Tensor:
        for t in range(3):
            rig.fill(t)
            rig.sum()
        return torch.cat([rig.flat.g, rig.left()])

    whole, cut = run(3, settings(), body), run(3, settings(chunk_mb=0.08), body)
    assert all(torch.equal(a, b) for a, b in zip(whole, cut, strict=True))


def test_chunks_of_the_largest_lose_nothing_either() -> None:
    def body(rig: Rig) -> tuple[torch.Tensor, ...]:
        came = rig.fill(0)
        return came, rig.sum(), rig.left(), rig.scatter()

    came, went, left, _ = zip(*run(3, TopK(warmup_tokens=0, chunk_mb=0.08), body), strict=True)
    assert torch.allclose(went[0] + sum(left), sum(came), rtol=0, atol=1e-9)
    assert torch.count_nonzero(went[0]) > 100


# ------------------------------------------------------------------ numbers of a code
def test_sums_that_a_prescale_of_1_over_n_overflows() -> None:
    """Mean gradients of 1e-6 to 16 over 65,536 tokens of 4 ranks keep 9 of 11 bits; beyond 64 infinity says so."""
    tokens = 65_536
    means = torch.cat([10.0 ** torch.linspace(-6, 1.2, 48), -(10.0 ** torch.linspace(-6, 1.2, 48))])

    def body(rig: Rig) -> torch.Tensor:
        wire = make_wire(Fp16(), rig.world, rig.flat, tokens)
        x = rig.flat.g[: rig.flat.buckets[0].span.stop]
        x.zero_()[:96] = means * tokens * (rig.world.rank + 1) / 10
        wire.sum(x, "grad.0").land()
        good = x[:96] / tokens
        x.zero_()[0] = 130.0 * tokens / 4
        wire.sum(x, "grad.0").land()
        return torch.cat([good, x[:1]])

    for got in run(4, Fp32(), body, dtype=torch.float32):
        assert ((got[:96] / means - 1).abs() < 4 * 2.0**-11).all()
        assert not torch.isfinite(got[96])


@each_wire
def test_what_is_not_finite_arrives_as_something_that_is_not(settings: Any) -> None:
    def body(rig: Rig) -> list[float]:
        seen = []
        for bad in (float("nan"), float("inf")):
            rig.fill(0)
            if rig.world.rank == 1:
                rig.flat.g[777] = bad
            seen.append(rig.sum()[: rig.flat.buckets[0].span.stop].norm().item())
            rig.wire.residual.clear()
            rig.wire.owner.clear()
        return seen

    assert not any(np.isfinite(norm) for seen in run(2, settings, body) for norm in seen)


def test_warm_up_is_exact_and_a_lone_rank_too() -> None:
    def body(rig: Rig) -> tuple[torch.Tensor, torch.Tensor, bool]:
        rig.wire.begin(99, 0.1)
        came = rig.fill(0)
        went = rig.sum()
        kept = rig.left().any()
        rig.wire.begin(100, 0.1)
        rig.fill(0)
        return came, went, bool(kept), torch.equal(rig.sum(), went)

    came, went, kept, same = zip(*run(3, Sign(warmup_tokens=100), body), strict=True)
    assert torch.allclose(went[0], sum(came), atol=1e-12) and not any(kept) and not any(same)
    came, went, kept, same = run(1, Sign(warmup_tokens=0), body)[0]
    assert torch.equal(came, went) and not kept and same


@pytest.mark.parametrize("settings", [TopK(warmup_tokens=0), Sign(warmup_tokens=0)], ids=["topk", "sign"])
def test_vectors_travel_whole_where_the_code_is_coarse(settings: Any) -> None:
    def body(rig: Rig) -> tuple[torch.Tensor, ...]:
        span = rig.flat.buckets[2].span
        return rig.fill(0)[span.start : span.stop], rig.sum()[span.start : span.stop]

    came, went = zip(*run(3, settings, body), strict=True)
    assert torch.allclose(went[0], sum(came), atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "ratio"),
    [(Fp16(), 0.5), (Bf16(), 0.5), (Int8(), 0.2539), (Sign(warmup_tokens=0), 0.0323)],
    ids=["fp16", "bf16", "int8", "sign"],
)
@pytest.mark.parametrize("n", [2, 3, 4])
def test_bytes(settings: Any, ratio: float, n: int) -> None:
    """Of the bucket of matrices, against fp32."""

    def body(rig: Rig) -> float:
        rig.fill(0)
        before, span = rig.world.bytes_sent, rig.flat.buckets[0].span
        rig.wire.sum(rig.flat.g[: span.stop], "grad.0").land()
        return rig.world.bytes_sent - before

    plain, coded = (run(n, each, body, dtype=torch.float32)[0] for each in (Fp32(), settings))
    assert coded / plain == pytest.approx(ratio, rel=0.006)


# ------------------------------------------------------------------ top-k
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


# ------------------------------------------------------------------ checkpoints
STATEFUL = [*CODED, TopK(warmup_tokens=0, momentum=0.9)]


@pytest.mark.parametrize("settings", STATEFUL, ids=[*NAMES, "topk-momentum"])
def test_goes_on_bit_equal_at_the_same_size(settings: Any) -> None:
    def first(rig: Rig) -> Any:
        for t in range(3):
            rig.wire.begin(t, 0.1 * (t + 1))
            rig.fill(t)
            rig.sum()
        saved = rig.saved()
        rig.wire.begin(3, 0.7)
        rig.fill(3)
        return saved, rig.sum()

    results = run(3, settings, first)

    def second(rig: Rig) -> torch.Tensor:
        rig.wire.load(*results[rig.world.rank][0])
        rig.wire.begin(3, 0.7)
        rig.fill(3)
        return rig.sum()

    assert all(torch.equal(a, b[1]) for a, b in zip(run(3, settings, second), results, strict=True))
    forgotten = run(3, settings, lambda rig: (rig.fill(3), rig.sum())[1])
    assert not torch.equal(forgotten[0], results[0][1])


def tensors(rig: Rig, vector: torch.Tensor) -> torch.Tensor:
    """Without padding, which differs between world sizes."""
    return torch.cat([vector[place] for place in rig.flat.at.values()])


def reloaded(rig: Rig, results: list[Any]) -> None:
    """As a checkpoint of another world size is: rank 0 gets the sums, the others zeros."""
    shared, summed, extra = results[0][0]
    given = {}
    for kind in summed:
        total = sum(result[3][kind] for result in results)
        given[kind] = torch.zeros_like(rig.flat.x)
        end = 0
        for place in rig.flat.at.values() if rig.world.rank == 0 else ():
            given[kind][place] = total[end : end + place.stop - place.start]
            end += place.stop - place.start
    rig.wire.load(shared, given, extra)


@pytest.mark.parametrize("settings", STATEFUL, ids=[*NAMES, "topk-momentum"])
@pytest.mark.parametrize("sizes", [(3, 2), (2, 3), (4, 1)])
def test_another_size_keeps_the_total(settings: Any, sizes: tuple[int, int]) -> None:
    def first(rig: Rig) -> Any:
        for t in range(3):
            rig.wire.begin(t, 0.1 * (t + 1))
            rig.fill(t)
            rig.sum()
        saved = rig.saved()
        return saved, tensors(rig, rig.left()), None, {kind: tensors(rig, v) for kind, v in saved[1].items()}

    results = run(sizes[0], settings, first)
    kept = sum(result[1] for result in results)

    def second(rig: Rig) -> Any:
        reloaded(rig, results)
        before = tensors(rig, rig.left())
        velocity = rig.saved()[1].get("velocity")
        rig.wire.begin(3, 0.7)
        came = rig.fill(3)
        went = rig.sum()
        speed = torch.zeros_like(kept) if velocity is None else 0.9 * tensors(rig, velocity)
        return before, tensors(rig, came) + speed, tensors(rig, went), tensors(rig, rig.left())

    before, came, went, left = zip(*run(sizes[1], settings, second), strict=True)
    assert torch.allclose(sum(before), kept, rtol=1e-12, atol=1e-12)
    assert torch.allclose(went[0] + sum(left), sum(came) + kept * (0.3 / 0.7), rtol=1e-9, atol=1e-9)
