"""PowerSGD: the projection that it says it is, nothing lost, the best of its rank in the end."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from wire_kit import NOMINAL, Rig, run

from hvdllm.errors import UserError
from hvdllm.exchange.wire.build import make_wire
from hvdllm.exchange.wire.parts import Fp32, PowerSGD
from hvdllm.flat import Flat
from hvdllm.world import virtual

SETTINGS = PowerSGD(rank=3, warmup_tokens=0)


def matrix(rig: Rig, vector: torch.Tensor, name: str = "a.weight") -> np.ndarray:
    return rig.flat.view(name, vector).numpy().copy()


@pytest.mark.parametrize("n", [2, 4])
def test_is_the_projection_of_the_sum_and_loses_nothing(n: int) -> None:
    weights = np.linspace(0.3, 0.03, 30)  # no less than a tenth: there residuals no longer grow
    weights[11] = 0

    def body(rig: Rig) -> Any:
        came = went = torch.zeros_like(rig.flat.x)
        start = rig.wire.q["a.weight"].numpy().copy()
        first = None
        for t, weight in enumerate(weights):
            rig.wire.begin(t * NOMINAL, weight)
            g = rig.fill(t)
            out = rig.sum()
            first = first or (matrix(rig, g), matrix(rig, out), matrix(rig, rig.left()), g[40_000:], out[40_000:])
            came, went = came + weight * g, went + weight * out
        return came, went, weights[-1] * rig.left(), first, start, rig.flat.g

    came, went, left, first, start, last = zip(*run(n, SETTINGS, body), strict=True)
    assert torch.allclose(went[0] + sum(left), sum(came), rtol=0, atol=1e-9 * sum(came).abs().max().item())
    assert all(torch.equal(each, last[0]) for each in last)
    total, q = sum(each[0] for each in first), start[0]
    y = total @ q
    assert np.allclose(first[0][1], y @ np.linalg.solve(y.T @ y, y.T) @ total)
    assert all(np.allclose(y.T @ each[2], 0, atol=1e-7) for each in first), "each rank's own residual"
    assert all(np.array_equal(each, q) for each in start)
    rest = sum(each[3] for each in first)  # the second matrix is compressed too, vectors are not
    assert np.allclose(first[0][4][-290:], rest[-290:])


def test_exact_up_to_its_rank_and_the_best_of_it_in_the_end() -> None:
    rng = np.random.default_rng(0)
    low = rng.normal(size=(260, 3)) @ rng.normal(size=(3, 150))
    full = rng.normal(size=(260, 260)) @ np.diag(0.7 ** np.arange(260))[:, :150]
    best = np.sqrt((np.linalg.svd(full, compute_uv=False)[3:] ** 2).sum())

    def body(rig: Rig) -> list[float]:
        errors = []
        for target in (low, *[full] * 15):
            rig.flat.g.zero_()
            rig.wire.residual.clear()
            rig.flat.view("a.weight", rig.flat.g).copy_(torch.from_numpy(target) * (2 if rig.world.rank else -1))
            errors.append(float(np.linalg.norm(matrix(rig, rig.sum()) - target)))
        return errors

    exact, first, *_, last = run(2, SETTINGS, body)[0]
    assert exact < 1e-9 * np.linalg.norm(low) and last < 1.01 * best < 1.1 * best < first


def test_bytes_at_width_256() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(256, 1024, bias=False), nn.Linear(1024, 256, bias=False)
            self.out = nn.Linear(256, 256, bias=False)

    def body(world: Any) -> list[float]:
        flat, sent = Flat(Block(), world.size, 1e9), [0.0]
        for settings in (Fp32(), PowerSGD(warmup_tokens=0)):
            make_wire(settings, world, flat, NOMINAL).sum(flat.g, "grad.0").land()
            sent.append(world.bytes_sent - sum(sent))
        return sent[1:]

    plain, thin = virtual.run(2, body)[0]
    elements = 4 * (256 + 1024 + 1024 + 256 + 256 + 256)
    assert plain / thin >= 20 and thin == elements * 4


def test_what_would_not_shrink_enough_travels_whole_and_so_does_the_warm_up() -> None:
    def body(rig: Rig) -> tuple[Any, ...]:
        rig.wire.begin(99, 0.1)
        came, went = rig.fill(0), rig.sum()
        kept = bool(rig.left().any())
        rig.wire.begin(100, 0.1)
        late, later = rig.fill(1), rig.sum()
        return came, went, kept, matrix(rig, late, "b.weight"), matrix(rig, later, "b.weight"), list(rig.wire.q)

    settings = PowerSGD(rank=3, warmup_tokens=100, min_compression=10.0)  # b.weight would shrink 1271 / 216 times
    both = run(3, settings, body, bucket_bytes=1e9)  # in one bucket, in one sum
    came, went, kept, late, later, names = zip(*both, strict=True)
    assert torch.allclose(went[0], sum(came)) and not any(kept)
    assert names[0] == ["a.weight"] and np.allclose(later[0], sum(late))


def test_zeros_and_what_is_not_finite() -> None:
    def body(rig: Rig) -> tuple[float, bool, float]:
        rig.flat.g.zero_()
        zero = rig.sum().norm().item()
        rig.fill(0)
        after = bool(rig.sum()[:39_000].any())
        rig.fill(1)
        rig.flat.g[5] = float("nan")
        return zero, after, rig.sum().norm().item()

    for zero, after, bad in run(2, SETTINGS, body):
        assert zero == 0 and after and not np.isfinite(bad)


def test_only_whole_sums() -> None:
    with pytest.raises(UserError, match="whole matrices on every rank"):
        run(2, SETTINGS, lambda rig: rig.scatter())
    with pytest.raises(UserError, match="hierarchical=false"):
        run(2, PowerSGD(hierarchical=True), lambda rig: None)


def test_a_checkpoint_goes_on_bit_equal_and_at_another_size_with_all_that_is_left() -> None:
    def first(rig: Rig) -> Any:
        for t in range(3):
            rig.wire.begin(t, 0.1)
            rig.fill(t)
            rig.sum()
        saved = rig.saved()
        rig.wire.begin(3, 0.4)
        rig.fill(3)
        return saved, rig.sum()

    results = run(2, SETTINGS, first)

    def second(rig: Rig) -> Any:
        rig.wire.load(*results[rig.world.rank][0])
        rig.wire.begin(3, 0.4)
        rig.fill(3)
        return rig.sum()

    assert all(torch.equal(got, result[1]) for got, result in zip(run(2, SETTINGS, second), results, strict=True))

    def alone(rig: Rig) -> Any:
        shared, _, tensors = results[0][0]
        total = sum(result[0][1]["residual"] for result in results)
        rig.wire.load(shared, {"residual": total[: len(rig.flat.x)]}, tensors)
        rig.wire.begin(3, 0.4)
        return rig.fill(3), rig.sum(), total[:39_000], rig.left()

    came, went, total, left = run(1, SETTINGS, alone)[0]
    assert torch.allclose(went[:39_000], came[:39_000] + total * (0.1 / 0.4)) and not left.any() and total.any()
