"""Ranks whose torchrun has died (kill -9, out of memory): nobody would restart them, and they would be in the next one's way."""

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_torchrun() -> None:
    """Have the kernel send SIGTERM to this process, if torchrun has started it, when torchrun dies.

    While ranks find each other that ends it, where it would wait for ever for an answer; in training, it saves and leaves.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()


def end_with_parent() -> None:
    """Have the kernel send SIGTERM to this process when the one that started it dies."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
