"""PLANT=… [torchrun …] tests/planted.py FLAGS: profile/throughput.py on a machine with a bottleneck of the test's choice."""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from perf import throughput
from pipeline.storage import FolderStorage


def slow_disk() -> None:
    """Each image takes 0.1 s longer."""
    read = FolderStorage.read

    def slowly(self, name, offsets, targets) -> None:
        time.sleep(0.1 * len(offsets))
        read(self, name, offsets, targets)

    FolderStorage.read = slowly  # type: ignore[method-assign]


def slow_host() -> None:
    """The host needs 20 ms more for each layer."""
    torch.nn.modules.module.register_module_forward_hook(lambda *_: time.sleep(0.02))


def nothing() -> None:
    """The flags are bottleneck enough."""


{"slow_disk": slow_disk, "slow_host": slow_host, "nothing": nothing}[os.environ["PLANT"]]()
sys.exit(throughput.main())
