"""How every program starts, speaks and ends: its streams, Ctrl-C, its exit code, and what the machine lets it use.

A program's file calls begin() (common/start.py) before its other imports and end(main) in its last line; main() hands its work to
run_program().
"""

import errno
import io
import os
import re
import select
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn, TextIO

from common.errors import EXIT_INTERRUPTED, EXIT_STOPPED, LostRankError, TrainingError, UserError
from common.start import end_at_once

MOST_THREADS = 1024
"""That a flag may ask for: far more only take long to start, or are refused by the kernel."""
_SECONDS_FOR_RANK_0 = 5.0
"""From its error to its end, and for torchrun to notice; a busy machine has needed more than one."""
_SECONDS_TO_UNWIND = 10.0
"""From Ctrl-C to the end: for threads to finish what they are at, and for whoever swallowed it."""
_SECONDS_OF_ONE = 1.0
"""Between two Ctrl-C that are meant as two: torchrun passes on to its ranks what they have got from the terminal already."""
_FEWEST_COLUMNS = 40
"""What help and error frames are laid out for; on fewer, tyro does not come to an end."""
_NO_MORE = re.compile("can't start new thread|failed to map segment|[Cc]annot allocate memory")
_OF_A_NAME = {
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EROFS,
    errno.EEXIST,
}  # fmt: skip


# ---- a process's first and last lines ----------------------------------------------------------------------------


def guard_streams() -> None:
    """Have stdout and stderr never raise. What cannot be written to stderr is dropped; of stdout run_program tells in the end.

    A stream that was closed when the program started keeps its number: else the next file that is opened would get it, and
    with it what libraries print.
    """
    for descriptor, mode in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):  # 1: writing fails, and is told
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, mode)  # gets the lowest number that is free: this one
    sys.stdout = sys.__stdout__ = _text(1, sys.stdout)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = _text(2, sys.stderr)  # type: ignore[misc]
    sys.unraisablehook = _ask_again


def end(main: Callable[[], int]) -> NoReturn:
    """The last thing that a program does: run main and leave with its exit code.

    After an error it does not wait for threads, for a GPU, or for other ranks that are inside a collective operation.
    """
    try:
        code = main()
    except SystemExit:
        raise
    except BaseException:  # a fault of the program
        traceback.print_exc()
        code = TrainingError.exit_code
    if code in (0, EXIT_STOPPED):
        # All is done. A Ctrl-C that comes while libraries clean up ends the process, without a word of what it has interrupted.
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


class _Descriptor(io.FileIO):
    """stdout or stderr, of which nobody has to expect that it fails."""

    failure: OSError | None = None
    """The first one, but for that of a pipe whose reader has left, as in `| head`: who reads no more misses nothing."""

    def write(self, data: Any) -> int:
        try:
            while (written := super().write(data)) is None:  # it is full, and does not block
                select.select([], [self], [])
            return written
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
        except OSError as error:
            self.failure = self.failure or error
        return len(data)


def _text(descriptor: int, before: TextIO | None) -> io.TextIOWrapper:
    """A text stream in the encoding that it had before, in which what cannot be encoded is escaped."""
    raw = _Descriptor(descriptor, "w", closefd=False)
    encoding = getattr(before, "encoding", None) or "utf-8"
    interactive = descriptor == 2 or raw.isatty() or getattr(before, "write_through", False)  # python -u
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding=encoding, errors="backslashreplace", line_buffering=interactive
    )


# ---- the work ----------------------------------------------------------------------------------------------------


def run_program(body: Callable[[], int], *, interrupted: str | Callable[[], str] = "interrupted") -> int:
    """Run a program's work. Returns the exit code: body's; 2 for a UserError, 1 for a TrainingError, 130 for Ctrl-C.

    Each of these, and what goes wrong with memory or files, is one line on stderr. interrupted: the line for Ctrl-C, which a
    KeyboardInterrupt with a text of its own replaces. --help, which exits, gives 0. Other exceptions are faults of the program,
    and are raised.
    """
    _set_surroundings()
    try:
        return _run(body, interrupted)
    except RuntimeError as error:  # of the thread that watches for Ctrl-C
        if told := _as_sentence(error):
            return _tell(told)
        raise


def _run(body: Callable[[], int], interrupted: str | Callable[[], str]) -> int:
    with _Interrupts(interrupted) as interrupts:
        try:
            code = body()
        except SystemExit as exit:
            if exit.code:
                raise
            code = 0
        except BaseException as error:
            # Which libraries turn into errors of their own.
            if isinstance(error, KeyboardInterrupt) or interrupts.asked:
                own = str(error) if isinstance(error, KeyboardInterrupt) else ""
                if is_first_rank():
                    print(visible(own or interrupts.text()), file=sys.stderr, flush=True)
                return EXIT_INTERRUPTED
            told = _as_sentence(error)
            if told is None:
                raise
            return _tell(told)
        return _flushed(code)


def _tell(error: UserError | TrainingError) -> int:
    """Print the error, one line on stderr. Returns the exit code."""
    if isinstance(error, LostRankError) or not is_first_rank():
        # Most errors are those of all ranks: rank 0 tells, torchrun ends the others. A lost rank has told why it left.
        threading.Event().wait(_SECONDS_FOR_RANK_0)
    print(f"error: {visible(str(error))}", file=sys.stderr, flush=True)
    return error.exit_code


def _as_sentence(error: BaseException) -> UserError | TrainingError | None:
    """What to tell of an error; None: it is a fault of the program."""
    if isinstance(error, UserError | TrainingError):
        return error
    if isinstance(error, MemoryError):
        return TrainingError(f"this machine's memory is used up ({error or 'no more is given'}); end other programs")
    if isinstance(error, RuntimeError | ImportError) and _NO_MORE.search(str(error)):
        return TrainingError(
            f"the system gives this process no more memory or threads ({error}); raise its limits (ulimit -v, ulimit -u)"
        )
    if isinstance(error, OSError):
        reason = error.strerror or str(error) or type(error).__name__
        if isinstance(error.filename, str | bytes):
            name = os.fsdecode(error.filename)
            if is_of_a_name(error):
                return UserError(f"{name}: {reason}; mend that, or name another")
            return TrainingError(f"{name}: {reason}")
        place = traceback.extract_tb(error.__traceback__)[-1]
        return TrainingError(f"the system refuses: {reason} (in {Path(place.filename).name}, line {place.lineno})")
    return None


def is_of_a_name(error: OSError) -> bool:
    """Whether whoever named the file can mend it, by another name or by a permission, and the disk is not at fault."""
    return error.errno in _OF_A_NAME


def _flushed(code: int) -> int:
    """The exit code, when all that was printed has been written; told, if it could not be."""
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if isinstance(raw, _Descriptor) and raw.failure:
        reason = "it was closed" if raw.failure.errno == errno.EBADF else raw.failure.strerror
        lost = TrainingError(
            f"stdout cannot be written ({reason}): what was to be printed there is lost, files are not"
        )
        return code or _tell(lost)
    return code


def _set_surroundings() -> None:
    """The width of the terminal, and the user's name and home, as libraries want them."""
    columns = os.environ.get("COLUMNS")
    width = shutil.get_terminal_size().columns
    if width < _FEWEST_COLUMNS or (columns is not None and not columns.isdecimal()):
        os.environ["COLUMNS"] = str(max(width, _FEWEST_COLUMNS))
    import pwd

    try:
        pwd.getpwuid(os.getuid())
    except KeyError:  # docker -u, some batch systems: libraries that ask for them end in a traceback
        os.environ.setdefault("USER", f"uid-{os.getuid()}")
        if not os.environ.get("HOME"):
            from common.files import private_folder

            os.environ["HOME"] = str(private_folder())


class _Interrupts:
    """Ctrl-C while a program works: the first raises KeyboardInterrupt, so that it can clean up; the second ends it at once.
    Where the program handles it in a way of its own meanwhile, the third one does.

    So does time. Between Python's instructions alone can KeyboardInterrupt be raised, and whoever calls Python from C++ may
    swallow it: a thread that the signal wakes ends the process where it has not ended by itself.
    """

    current: "_Interrupts | None" = None

    def __init__(self, said: str | Callable[[], str]) -> None:
        self._said = said
        self.asked = False

    def text(self) -> str:
        return self._said() if callable(self._said) else self._said

    def __enter__(self) -> "_Interrupts":
        self._before = signal.getsignal(signal.SIGINT)
        self._installed = threading.current_thread() is threading.main_thread() and self._before in (
            signal.default_int_handler,
            end_at_once,
        )
        if self._installed:
            self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            self._watcher = threading.Thread(target=self._watch, name="interrupts", daemon=True)
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            try:
                self._watcher.start()  # with no signal for it: else it would get those that this thread holds back
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
            signal.signal(signal.SIGINT, self._ask)
            _Interrupts.current = self
        return self

    def __exit__(self, *_: object) -> None:
        if self._installed:
            _Interrupts.current = None
            signal.signal(signal.SIGINT, self._before)
            signal.set_wakeup_fd(self._wakeup_before)
            os.close(self._writer)  # which ends the thread
            self._watcher.join()
            os.close(self._reader)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            self._end()
        self.asked = True
        raise KeyboardInterrupt

    def _end(self) -> NoReturn:
        if is_first_rank():
            with suppress(OSError):  # not by way of sys.stderr, which the main thread may hold
                os.write(2, f"{visible(self.text())}\n".encode(errors="backslashreplace"))
        os._exit(EXIT_INTERRUPTED)

    def _watch(self) -> None:
        seconds: float | None = None
        times, last = 0, 0.0
        while True:
            if not select.select([self._reader], [], [], seconds)[0]:
                self._end()
            numbers = os.read(self._reader, 64)
            if not numbers:
                return
            if signal.SIGINT not in numbers:
                continue
            now = time.monotonic()
            times, last = times + (now - last > _SECONDS_OF_ONE), now
            if signal.getsignal(signal.SIGINT) == self._ask:
                seconds = _SECONDS_TO_UNWIND
            elif times > 2:
                # Somebody else handles it meanwhile, as a training that saves first, and does not come to it.
                self._end()


def _ask_again(unraisable: "sys.UnraisableHookArgs") -> None:
    """Where KeyboardInterrupt was raised in a place that cannot pass it on (a destructor, a callback), raise it once more."""
    interrupts = _Interrupts.current
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
    elif interrupts:
        interrupts.asked = False
        threading.Timer(0.05, signal.raise_signal, [signal.SIGINT]).start()


@contextmanager
def out_of_ctrl_c() -> Iterator[None]:
    """A process that is started in this block never hears of Ctrl-C, from its first moment on: its parent ends it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def visible(text: str) -> str:
    """The same text on one line, without characters that a terminal would obey or cannot show: these are escaped."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


# ---- what the launcher and the machine say -----------------------------------------------------------------------

_TOGETHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun and every other launcher of torch's sets."""
_LOCAL = ("LOCAL_RANK", "LOCAL_WORLD_SIZE")
"""What torchrun sets besides; other launchers may leave it out."""


class Launch(NamedTuple):
    """This process among those that a launcher has started."""

    rank: int
    world_size: int
    local_rank: int
    """Among those of this machine."""
    local_world_size: int


def read_launch() -> Launch | None:
    """What the launcher has put into the environment. None: there was none, this process is alone. Empty variables count as none.

    Raises UserError: a part is missing that matters, or a number is wrong.
    """
    given = {name: value for name in (*_TOGETHER, *_LOCAL) if (value := os.environ.get(name))}
    missing = [name for name in _TOGETHER if name not in given]
    if not missing:
        rank, world_size = _number("RANK", 0), _number("WORLD_SIZE", 1)
        if rank >= world_size:
            raise UserError(
                f"RANK={rank} but WORLD_SIZE={world_size}: ranks count from 0; mend how the ranks are launched"
            )
        if _number("MASTER_PORT", 1) > 65535:
            raise UserError(f"MASTER_PORT={given['MASTER_PORT']}: must be in 1–65535")
        local_rank, local_world_size = _number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", 1)
        if "LOCAL_WORLD_SIZE" in given and not local_rank < local_world_size <= world_size:
            raise UserError(
                f"LOCAL_RANK={local_rank}, LOCAL_WORLD_SIZE={local_world_size}, WORLD_SIZE={world_size}: the ranks of a machine "
                "count from 0, and are not more than all; mend how the ranks are launched"
            )
        return Launch(rank, world_size, local_rank, local_world_size)
    left = [name for name in given if name.endswith(("RANK", "WORLD_SIZE"))]
    if given.get("RANK", "0") != "0" or given.get("WORLD_SIZE", "1") != "1":
        said = " ".join(f"{name}={given[name]}" for name in left)
        raise UserError(
            f"{said} in the environment, without {', '.join(missing)}: start this with torchrun, or unset {' '.join(left)}"
        )
    return None


def ignored_of_launch() -> list[str]:
    """Variables of a launcher that are set, though it is no launcher that has started this process."""
    if all(map(os.environ.get, _TOGETHER)):
        return []
    return [name for name in ("RANK", "WORLD_SIZE", *_LOCAL) if os.environ.get(name)]


def _number(name: str, least: int) -> int:
    text = os.environ.get(name) or str(least)
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < least:  # more digits are none of torch's numbers
        raise UserError(f"{name}={text}: must be a whole number from {least} on; mend how the ranks are launched")
    return int(text)


def is_first_rank() -> bool:
    """Whether this process speaks for all: it is alone, or rank 0."""
    return not all(map(os.environ.get, _TOGETHER)) or os.environ["RANK"] == "0"


def usable_cores(root: Path = Path("/")) -> int:
    """Cores that this process may use, at least 1: by its affinity, and by the CPU quotas of its control groups.

    A quota of two and a half cores counts as three: threads share what is left of the last one. root: of the file system.
    """
    quotas = [quota for folder in control_groups(root, "cpu") if (quota := cpu_quota(folder))]
    return max(1, min([len(os.sched_getaffinity(0)), *(-int(-quota // 1) for quota in quotas)]))


def control_groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of the control groups that may limit this process: its own and those above it, version 2 and version 1.

    controller: "cpu" or "memory".

    In a container, the path is often that on the host, while the file system begins at the container's own group.
    """
    with suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            mounts = (controller, "cpu,cpuacct", "cpuacct,cpu") if controllers else ("", "unified")
            group = Path(os.path.normpath(f"/{path}"))
            for above in (group, *group.parents):
                for mount in mounts:
                    yield root / "sys/fs/cgroup" / mount / str(above).lstrip("/")


def cpu_quota(folder: Path) -> float | None:
    """Cores that a control group gives at most; None: no limit, or no such group."""
    with suppress(OSError, ValueError, ZeroDivisionError):
        text = (folder / "cpu.max").read_text().split()
        return int(text[0]) / int(text[1])  # of "max" there is no int
    with suppress(OSError, ValueError, ZeroDivisionError):
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        return quota / int((folder / "cpu.cfs_period_us").read_text()) if quota > 0 else None
    return None
