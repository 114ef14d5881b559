"""The ways in which a program of this project ends early on purpose, with their exit codes."""

import os
import sys
import time

_SECONDS_FOR_RANK_0 = 5.0
"""From its error to its end, and for torchrun to notice; a busy machine has needed more than one."""
EXIT_STOPPED = 75
"""Of a run that was asked to stop and saved its state: sysexits.h's "temporary failure, try again"."""


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


def tell(error: UserError | TrainingError) -> int:
    """Print the error, one line on stderr. Returns the exit code."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(_SECONDS_FOR_RANK_0)  # most errors are those of all ranks: rank 0 tells, torchrun ends the others
    print(f"error: {error}", file=sys.stderr, flush=True)
    return error.exit_code
