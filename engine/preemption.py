"""SIGTERM or SIGUSR1 on any rank: all ranks stop after the same step, so that a checkpoint of it can be written.

So does the death of a rank's torchrun, of which the kernel tells by SIGTERM (common/orphans.py).
"""

import signal
from types import FrameType

import torch
import torch.distributed as dist

from common.ranks import Ranks

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequests:
    """A context manager: inside it, the two signals ask for a stop instead of ending the process.

    A second signal asks again, and changes nothing: a checkpoint that is being written is completed.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._asked = False
        self._total = torch.zeros(1, dtype=torch.int32)
        self._sum: dist.Work | None = None

    def __enter__(self) -> "StopRequests":
        self._before = {number: signal.signal(number, self._ask) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self) -> bool:
        """Whether to stop here: the same answer on all ranks, which must all call this equally often.

        With several ranks, the answer is about what was asked by the time of the call before: each call starts a sum over
        gloo that the next one collects, so that nobody waits for a message on its way.
        """
        if self._ranks.patient_group is None:
            return self._asked
        stop = False
        if self._sum is not None:
            self._sum.wait()
            stop = bool(self._total.item())
        self._total = torch.tensor([int(self._asked)], dtype=torch.int32)
        self._sum = dist.all_reduce(self._total, group=self._ranks.patient_group, async_op=True)
        return stop

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
