"""Where the next text of a stream begins, if the stream is known to change: text.source=replay of a list of texts.

The log says which text each append came from (sources.py, Replay), and the rounds say which windows were trained on, so
the tokens that a run has trained on when a text begins are a function of its log alone, for every exchange.
"""

from __future__ import annotations

from hvdllm.online.log import Log
from hvdllm.online.rounds import Layout, Rounds


class Changes:
    """Follows a log and its rounds.

    Args:
        log: of the stream; it is read here, so give one of its own.
        rounds: of the run.
        layout: where windows lie.
        context: tokens in a window.
        seen: tokens that were trained on in earlier lives of the run, in which the changes up to there were told.
    """

    def __init__(self, log: Log, rounds: Rounds, layout: Layout, context: int, seen: int = 0) -> None:
        self.log, self.rounds, self.layout, self.context, self.seen = log, rounds, layout, context, seen
        self._text: int | None = None  # of the newest append
        self._end = 0  # tokens of the log up to there
        self._begun: list[tuple[int, int]] = []  # text, and the first fresh window of it, of those not yet trained on
        self._round = self._tokens = 0  # rounds that were walked, and the tokens in them

    def passed(self, tokens: int) -> list[tuple[int, int]]:
        """The texts that training has come to since the last call, when it has committed so many tokens.

        Returns for each its number in text.path, and the tokens of the rounds before the first with text of it.
        """
        for entry in self.log.refresh():
            text = entry.at.get("text")
            if isinstance(text, int):
                if self._text is not None and text != self._text:
                    self._begun.append((text, self.layout.fresh(self._end)))
                self._text = text
            self._end = entry.tokens
        found = []
        while self._begun and self._tokens < tokens and (round := self.rounds.get(self._round)) is not None:
            text, first = self._begun[0]
            if round.next <= first:
                self._round, self._tokens = self._round + 1, self._tokens + round.items * self.context
                continue
            self._begun.pop(0)
            if self._tokens and self._tokens >= self.seen:
                found.append((text, self._tokens))
        return found
