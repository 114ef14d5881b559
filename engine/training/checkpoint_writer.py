"""Checkpoints while the training goes on: the state is copied between two steps, and a thread writes the copy.

Memory for the copy is taken with the first checkpoint, and kept for those that follow. On a GPU it is pinned, which a copy needs
to be fast; torch rounds each tensor's pinned memory up to a power of two.
"""

import copy
import functools
import threading
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.memory import available_bytes
from common.progress import say
from engine import checkpoint as checkpoints
from engine.checkpoint import Checkpoint


class CheckpointWriter:
    """Writes one checkpoint at a time. A context manager: behind it nothing is being written any more."""

    def __init__(self) -> None:
        self._memory: list[Tensor] | None = None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._has_warned = False

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread:  # after an error, which is the one to tell
            self._thread.join()

    def begin(self, checkpoint: Checkpoint, out: Path, *, is_best: bool, keep: int) -> None:
        """Copy a checkpoint, and begin to save it as checkpoints.save() does. To be called after finish().

        When this returns, the state may change. Where there is no memory for the copy, it waits until the file is written; the
        first time with a warning. Then it raises what checkpoints.save() does.
        """
        assert not self._thread
        content = {entry.name: getattr(checkpoint, entry.name) for entry in fields(checkpoint)}
        tensors = list(_tensors_of(content))
        self._memory = self._memory or self._memory_for(tensors)
        if self._memory is None:
            checkpoints.save(checkpoint, out, is_best=is_best, keep=keep)
            return
        for tensor, copied in zip(tensors, self._memory, strict=True):
            copied.copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors):
            torch.cuda.current_stream().synchronize()
        whole = Checkpoint(**_with_tensors(content, iter(self._memory)))
        write = functools.partial(self._write, whole, out, is_best=is_best, keep=keep)
        self._thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def has_failed(self) -> bool:
        """Whether finish() would raise now."""
        return self._failure is not None

    def finish(self) -> None:
        """Wait until what was begun is on the disk. Raises, once, what checkpoints.save() has raised in the thread."""
        if self._thread:
            self._thread.join()
        self._thread = None
        failure, self._failure = self._failure, None
        if failure:
            raise failure

    def _write(self, checkpoint: Checkpoint, out: Path, *, is_best: bool, keep: int) -> None:
        try:
            checkpoints.save(checkpoint, out, is_best=is_best, keep=keep)
        except BaseException as error:  # whatever it is, it is the main thread's
            self._failure = error

    def _memory_for(self, tensors: list[Tensor]) -> list[Tensor] | None:
        needed = sum(tensor.nbytes for tensor in tensors)
        if 2 * needed <= available_bytes():  # pinned it is rounded up; and something has to be left
            try:
                return [torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda) for tensor in tensors]
            except RuntimeError:  # a limit of this process, or of what may be pinned
                pass
        if not self._has_warned:
            say(
                f"warning: no memory for a copy of the state ({needed >> 20:,} MiB): training waits for its checkpoints"
            )
            self._has_warned = True
        return None


def _tensors_of(value: Any) -> Iterator[Tensor]:
    """Those in dictionaries and lists, in their order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _tensors_of(entry)


def _with_tensors(value: Any, tensors: Iterator[Tensor]) -> Any:
    """The dictionaries and lists once more, with others in place of _tensors_of(them)."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, dict):
        other = copy.copy(value)  # which keeps what torch has noted in a state dict
        for name, entry in value.items():
            other[name] = _with_tensors(entry, tensors)
        return other
    if isinstance(value, list):
        return [_with_tensors(entry, tensors) for entry in value]
    return value
