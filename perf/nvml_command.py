"""Run a command as a shell would, in the foreground, with the signals that come to us passed on to it."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from common.errors import UserError

_PASSED_ON = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}
_WAITED_FOR = _PASSED_ON | {signal.SIGCHLD}


@contextmanager
def held_signals() -> Iterator[set]:
    """Signals wait until run_command takes them, and threads started inside take none. Yields the mask from before.

    Only before there are other threads. Waiting tells who sent a signal, as handling it in Python does not.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _WAITED_FOR)
    try:
        yield mask
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def run_command(command: list[str], mask: set) -> int:
    """Run it, inside held_signals() which gave the mask, and wait for its end.

    Returns its exit code, or 128 + the signal that ended it, as shells do. Raises UserError: it cannot be run.
    """
    try:
        # setsigdef: these two Python ignores, and the command would inherit that.
        process = os.posix_spawnp(
            command[0], command, os.environ, setsigmask=mask, setsigdef=[signal.SIGPIPE, signal.SIGXFSZ]
        )
    except OSError as error:
        raise UserError(f"cannot run {command[0]}: {error.strerror}") from error
    while True:
        received = signal.sigwaitinfo(_WAITED_FOR)
        if received.si_signo == signal.SIGCHLD:
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code
        elif received.si_code <= 0:  # from a process; a terminal's own (Ctrl-C) has reached the command already
            os.kill(process, received.si_signo)
