"""The ways in which a program of this project ends early on purpose, with their exit codes."""

EXIT_STOPPED = 75
"""Of a run that was asked to stop and saved its state: sysexits.h's "temporary failure, try again"."""


class UserError(Exception):
    """Something that the user gave is wrong: a flag, a path, a file, a world size. Exit code 2."""

    exit_code = 2


class TrainingError(Exception):
    """The run itself failed, though everything given was right: a loss that is not finite, an image lost. Exit code 1."""

    exit_code = 1
