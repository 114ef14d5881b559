"""The first thing that a program imports, by itself: until it has run, Ctrl-C is a traceback.

So it imports only what is built in. The module signal takes milliseconds, others take tens of them.
"""

import _signal  # type: ignore[import-not-found]  # typeshed does not know it
import os


def begin() -> None:
    """Have Ctrl-C end the program with a line, while it imports the rest; then make its streams safe."""
    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:  # and not ignored, as in a background job
        _signal.signal(_signal.SIGINT, end_at_once)
    from common.process import guard_streams

    guard_streams()


def end_at_once(number: int, frame: object) -> None:
    if os.environ.get("RANK") in (None, "", "0"):
        try:  # noqa: SIM105  # contextlib may not have been imported
            os.write(2, b"interrupted\n")
        except OSError:
            pass  # nobody listens
    os._exit(130)
