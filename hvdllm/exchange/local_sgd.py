"""Local SGD: some steps alone, then the mean of the weights (Stich, 2018, arXiv 1805.09767).

    each group:  H steps of the update, own moments;  x_i = mean of all x

Post-local (Lin et al., 2018, arXiv 1808.07217): H = 1 until warmup_tokens are committed.

Invariant: with H = 1 and plain descent it is synchronous descent (with Adam it is not: the mean of normalised steps is
no normalised step of the mean). With the same curvature everywhere a round is H steps on the mean data; where it
differs the fixed point does too (client drift), which fewer steps make smaller. Evaluation and samples use the mean of
the ranks' weights.

Bytes a rank and round: 2 (N-1)/N P b, and meta for each pulse. Memory: the anchor, P.
More in hvdllm/exchange/README.md, `local_sgd`.
"""

from __future__ import annotations

from hvdllm.exchange.local_rounds import LocalRounds


class LocalSGD(LocalRounds):
    def round_steps(self) -> int:
        return 1 if self._base < self.settings.warmup_tokens else super().round_steps()

    def agreed(self) -> int | None:
        for bucket in self.flat.buckets:
            x = self.flat.x[bucket.span.start : bucket.span.stop]
            x.copy_(self.world.sum(x.clone(), f"act.mean.{bucket.index}").land() / self.world.size)
        return None
