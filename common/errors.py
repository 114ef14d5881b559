"""The ways in which a program of this project ends early on purpose, with their exit codes."""

EXIT_STOPPED = 75
"""Of a run that was asked to stop and saved its state: sysexits.h's "temporary failure, try again"."""
EXIT_INTERRUPTED = 130
"""After Ctrl-C: 128 + SIGINT, as shells have it."""


class UserError(Exception):
    """Something that the user gave is wrong: a flag, a path, a file, a world size. Exit code 2."""

    exit_code = 2


class TrainingError(Exception):
    """The run itself failed, though everything given was right: a loss that is not finite, an image lost. Exit code 1."""

    exit_code = 1


class DataSourceError(TrainingError):
    """What the images are read from failed in mid-run: a folder unmounted, a network gone, a token expired.

    The state of the run is whole: it can be saved, and the run goes on from it when the source is there again.
    """


class LostRankError(TrainingError):
    """Another rank has left, or does not answer. Why, it has told itself."""
