"""Signals that ask a run to stop, and errors of one rank: all ranks stop at the same step, so that a checkpoint can be written.

SIGTERM, SIGUSR1, SIGUSR2 and SIGXCPU come from schedulers, SIGHUP from a terminal that closes, SIGINT from Ctrl-C. The death of
a rank's torchrun is a SIGTERM too, from the kernel (common/parent_death.py). Nothing here imports torch before it is needed: its
import belongs to the time in which a signal is to be answered.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING

from common.errors import EXIT_STOPPED, TrainingError
from common.process import is_first_rank

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import Work

    from common.ranks import Ranks
    from pipeline.dali.loader import Batch

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU, signal.SIGHUP)
_SECONDS_OF_ONE_INTERRUPT = 1.0
"""torchrun passes the Ctrl-C of a terminal on to its ranks, which have got it already: together they are one."""


class StopRequests:
    """A context manager: inside it, signals ask for a stop instead of ending the process.

    Until training() nothing could be saved: there, a signal but Ctrl-C ends the process at once, with 75 and a line, whatever it
    is doing. From then on, all ranks stop after the same step, in the middle of which a signal may find them. A second one asks
    again, and changes nothing; but a second Ctrl-C ends the run at once, or after the checkpoint that is being written.
    """

    def __init__(self) -> None:
        self._ranks: Ranks | None = None
        self._asked, self._agreed = False, False
        self._failure: Exception | None = None
        self.save_is_due: Callable[[], bool] = lambda: False
        """Asked whether a checkpoint is due; of several ranks rank 0's answer counts, since clocks differ."""
        self._save_agreed = False
        # Under way: int32 [3], how many ranks were asked for a stop, how many have failed, and whether rank 0 wants to save.
        self._message: tuple[Work, Tensor] | None = None
        self._interrupted_at: float | None = None
        self._writing, self._interrupted_again = False, False
        self.failed_together = False
        """Whether an error was told to all ranks, so that each of them is ending for it now."""

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C is among what asked for the stop."""
        return self._interrupted_at is not None

    def __enter__(self) -> "StopRequests":
        # Under nohup, a terminal that closes is to be ignored; torchrun passes it on nevertheless, and ends.
        ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN and "TORCHELASTIC_RUN_ID" not in os.environ
        numbers = [number for number in _SIGNALS if not (ignored and number == signal.SIGHUP)]
        reading, self._pipe = os.pipe()
        os.set_blocking(self._pipe, False)
        self._thread = threading.Thread(target=self._leave_at_once, args=(reading,), name="signals", daemon=True)
        self._pipe_before = -1
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        self._thread.start()  # with no signal for it: the main thread's calls are to be interrupted
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self._pipe_before = signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._ask) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._pipe_before)
        os.close(self._pipe)
        self._thread.join()

    def _leave_at_once(self, reading: int) -> None:
        """In a thread, since the main one may be waiting for other ranks in C++, where it runs no handler of Python's."""
        while numbers := os.read(reading, 16):  # as the kernel delivers them, until the pipe is closed
            if self._pipe_before != -1:  # who watches for Ctrl-C outside (common/process.py) goes on watching
                with contextlib.suppress(OSError):
                    os.write(self._pipe_before, numbers)
            for number in set(numbers).intersection(_SIGNALS):
                if self._ranks is None:
                    if is_first_rank():
                        name = signal.Signals(number).name
                        _say(f"stopped by {name} before the first step: nothing to save; start the same command again")
                    os._exit(EXIT_STOPPED)
        os.close(reading)

    @contextlib.contextmanager
    def training(self, ranks: "Ranks") -> Iterator[None]:
        """Inside, and afterwards, a signal is answered by agreed(); every rank must come here."""
        from common.ranks import wait_for_all

        wait_for_all(ranks)  # so that they are on the same side of this line when all of them get a signal
        self._ranks = ranks
        before = signal.getsignal(signal.SIGINT)
        if before != signal.SIG_IGN:  # as in the background of a script
            signal.signal(signal.SIGINT, self._interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def agreed(self) -> bool:
        """Whether to stop here: the same answer on all ranks, about what was asked by the time of the last tell_others().

        Raises as hear_others does.
        """
        self.hear_others()
        return self._agreed if self._ranks and self._ranks.patient_group else self._asked

    @property
    def agreed_to_save(self) -> bool:
        """Whether a checkpoint is due: the same answer on all ranks, as of the last tell_others()."""
        return self._save_agreed if self._ranks and self._ranks.patient_group else self.save_is_due()

    def tell_others(self, failure: Exception | None) -> None:
        """Begin to tell the other ranks whether this one cannot go on; every rank must call this equally often, and then
        hear_others(). What lies between the two hides the time that the message takes.
        """
        self._failure = failure
        if self._ranks and self._ranks.patient_group:
            import torch
            import torch.distributed as dist

            save = self._ranks.is_main and self.save_is_due()
            counts = torch.tensor([self._asked, failure is not None, save], dtype=torch.int32)
            self._message = dist.all_reduce(counts, group=self._ranks.patient_group, async_op=True), counts

    def hear_others(self) -> None:
        """Wait for what all ranks have begun to tell, if anything. Raises this rank's failure or, where it is another rank's,
        TrainingError with its sentence.
        """
        failure, self._failure = self._failure, None
        failed = int(failure is not None)
        if self._message:
            work, counts = self._message
            work.wait()
            asked, failed, save = counts.tolist()
            self._message, self._agreed, self._save_agreed = None, asked > 0, save > 0
        if not failed:
            return
        if self._ranks and self._ranks.patient_group:
            from common.ranks import gather

            reasons = gather(failure and str(_told(failure, self._ranks.rank)), self._ranks)
            self.failed_together = True
            reason = next(filter(None, reasons))
            raise failure or TrainingError(f"{reason}")
        assert failure
        raise failure

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Inside, no Ctrl-C interrupts: in the middle of torch's writing it would look like an error of the disk."""
        self._writing = True
        try:
            yield
        finally:
            self._writing = False
        if self._interrupted_again:
            raise KeyboardInterrupt

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        now = time.monotonic()
        if self._interrupted_at is None:
            self._interrupted_at = now
            if self._ranks and self._ranks.is_main:
                _say("Ctrl-C: saves after this step and ends; once more ends at once, without saving")
        elif now - self._interrupted_at > _SECONDS_OF_ONE_INTERRUPT:
            self._interrupted_again = True
            if not self._writing:
                raise KeyboardInterrupt


class SharedBatches:
    """An iterator of batches that all ranks get or none: where one cannot have its next, all of them raise in hear_others()."""

    def __init__(
        self, batches: Iterator["Batch"], requests: StopRequests, *, passes: int, hear_at_once: bool = False
    ) -> None:
        """passes: batches that make a step; the ranks talk to each other at the last of them. hear_at_once: for a forward pass in
        which ranks wait for each other.
        """
        self._batches, self._requests, self._passes, self._hear_at_once = batches, requests, passes, hear_at_once
        self._taken = 0

    def __iter__(self) -> Iterator["Batch"]:
        return self

    def __next__(self) -> "Batch":
        try:
            batch = next(self._batches)
        except Exception as error:
            self._requests.tell_others(error)
            self._requests.hear_others()
            raise
        self._taken += 1
        if self._taken % self._passes == 0:
            self._requests.tell_others(None)
            if self._hear_at_once:
                self._requests.hear_others()
        return batch


def _told(failure: Exception, rank: int) -> TrainingError:
    """How the other ranks are to hear of it."""
    if isinstance(failure, TrainingError):
        return failure
    words = " ".join(str(failure).split())
    return TrainingError(f"rank {rank} failed: {type(failure).__name__} {words}")


def _say(line: str) -> None:
    """Without Python's buffers, which the signal may have found in use."""
    after_bar = "\n" if os.isatty(2) else ""
    with contextlib.suppress(OSError):  # the terminal that is closing, perhaps
        os.write(2, f"{after_bar}{line}\n".encode())
