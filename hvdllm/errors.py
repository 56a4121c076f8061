"""The three ways a command ends early. cli/main.py alone turns them into a sentence and an exit code."""

STOPPED = 75
"""Exit code of a run that was asked to stop and has saved, and of a sweep with points that are not finished: the same
command goes on. EX_TEMPFAIL of sysexits.h, what failed for now and is to be tried again."""


class UserError(Exception):
    """The request cannot work: one sentence that says what is wrong, where, and what to do. Exit code 2.

    Raised before training starts, wherever possible with the same words on every rank: rank 0 says it.
    """


class RunError(Exception):
    """The run cannot go on (a gradient that is not finite, a full disk). One sentence, exit code 1.

    everywhere: raised with the same words on every rank, so rank 0 alone says them.
    """

    def __init__(self, sentence: str, *, everywhere: bool = False) -> None:
        super().__init__(sentence)
        self.everywhere = everywhere


class PeerError(Exception):
    """Another rank failed, and that rank says why: this one only waits to be ended. Exit code 1."""
