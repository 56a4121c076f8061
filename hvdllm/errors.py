"""The three errors with which a command ends early. Only cli/main.py turns them into a sentence and an exit code."""

STOPPED = 75
"""Exit code of a run that was asked to stop and has saved, and of a sweep with points that are not finished: the same
command goes on. EX_TEMPFAIL of sysexits.h, what failed for now and is to be tried again."""


class UserError(Exception):
    """The request cannot work. The message is one sentence that says what is wrong, where, and what to do. Exit code 2.

    It is raised before training starts, with the same words on every rank if possible, so that rank 0 can say it.
    """


class RunError(Exception):
    """The run cannot go on, because of a gradient that is not finite or a full disk, for example. Exit code 1.

    Args:
        sentence: what is wrong, and what to do.
        everywhere: it is raised with the same words on every rank, so only rank 0 says them.
    """

    def __init__(self, sentence: str, *, everywhere: bool = False) -> None:
        super().__init__(sentence)
        self.everywhere = everywhere


class PeerError(Exception):
    """Another rank has failed, and says why. This one only waits to be ended. Exit code 1."""
