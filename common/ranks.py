"""Ranks, their process group, and the few things that they say to each other outside of DDP."""

import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from common.errors import LostRankError, TrainingError, UserError
from common.lost_peers import LostPeers, own_addresses
from common.process import ignored_of_launch, read_launch, usable_cores
from common.progress import say

T = TypeVar("T")

COLLECTIVE_MINUTES = 15.0
"""How long a rank waits for the others inside a collective operation, over gloo or NCCL, before it gives the run up. Rank 0 may
write a checkpoint meanwhile, or compile."""
LOST_SECONDS = 60.0
"""After which a machine that answers nothing is taken to be lost (common/lost_peers.py)."""
# How long ranks wait for the one that scans a data set for the first time: hours, for a large one on a slow disk.
_PATIENCE = timedelta(days=2)
# And for all ranks to be there, once torchrun has started them on every machine.
_PATIENCE_TO_START = timedelta(minutes=10)
# For torchrun's own store, which it has before it starts any rank: without an answer, torchrun is gone.
_PATIENCE_FOR_TORCHRUN = timedelta(minutes=1)


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among all those of the run."""

    rank: int
    world_size: int
    local_rank: int
    """Rank among the processes of this machine."""
    local_world_size: int
    device: torch.device
    patient_group: dist.ProcessGroup | None
    """A gloo group that waits for days; None in a run of one process without torchrun."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def cpu_share(self) -> int:
        """Cores for this rank: those that this machine gives us, divided by the ranks on it."""
        return max(1, usable_cores() // self.local_world_size)


@contextmanager
def ranks_of_this_run(
    device: str, *, collective_minutes: float = COLLECTIVE_MINUTES, lost_seconds: float = LOST_SECONDS
) -> Iterator[Ranks]:
    """Join the process group that torchrun describes in the environment; without torchrun, one rank and no group.

    device: "auto", "cuda" or "cpu". collective_minutes, lost_seconds: see the constants.
    Raises UserError: cuda without a GPU, fewer GPUs than processes on this machine, half of
    what a launcher says. TrainingError: the ranks do not find each other. LostRankError: another rank has left while this one
    waited for it.

    After an error the group stays as it is: to take it apart, others would have to come out of the collective operation that
    they are in. The process is to tell its error and to leave (common/process.py).
    """
    launch = read_launch()
    if ignored := ignored_of_launch():
        say(f"warning: ignoring {', '.join(ignored)} in the environment: no launcher has set MASTER_ADDR and the rest")
    rank, world_size, local_rank, local_world_size = launch or (0, 1, 0, 1)
    own_device = _own_device(device, local_rank, local_world_size)
    patient_group: dist.ProcessGroup | None = None
    patience = timedelta(minutes=collective_minutes)
    if launch:
        on_gpu = own_device.type == "cuda"
        if local_world_size == world_size:  # one machine: nobody else needs to reach gloo's ports
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        try:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
                store=_store_of_this_start(rank, world_size, patience),
                rank=rank,
                world_size=world_size,
                timeout=patience,
                device_id=own_device if on_gpu else None,
            )
            patient_group = dist.new_group(backend="gloo", timeout=_PATIENCE)  # type: ignore[assignment]  # not for members
        except RuntimeError as error:
            raise TrainingError(
                f"the ranks cannot connect to each other ({_in_a_line(error)}); check GLOO_SOCKET_IFNAME and "
                "NCCL_SOCKET_IFNAME, and that no firewall stands between the machines"
            ) from error
    ranks = Ranks(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        device=own_device,
        patient_group=patient_group,
    )
    try:
        if world_size == local_world_size:  # what kills another rank leaves its kernel, which closes the connections
            yield ranks
        else:
            addresses = set().union(*gather(own_addresses(), ranks))
            with LostPeers(addresses, lost_seconds):
                yield ranks
    except RuntimeError as error:
        if launch and _is_of_a_lost_rank(error):
            raise LostRankError(
                f"the ranks have lost each other ({_in_a_line(error)}); the first one to leave has said why"
            ) from error
        raise
    if launch:
        dist.destroy_process_group()


def _in_a_line(error: RuntimeError) -> str:
    return " ".join(str(error).split())[:300]


def _is_of_a_lost_rank(error: RuntimeError) -> bool:
    """Whether gloo, NCCL or the store has failed. gloo has no error of its own, but names its source."""
    return isinstance(error, dist.DistError) or "gloo/" in str(error)


def _store_of_this_start(
    rank: int, world_size: int, patience: timedelta = timedelta(minutes=COLLECTIVE_MINUTES)
) -> dist.Store:
    """torchrun's key-value store, with keys of our own for each start of the ranks. Raises TrainingError: one never comes,
    or torchrun died before this process could ask the kernel to tell it (common/parent_death.py).

    torchrun keeps the store over restarts, and with it the addresses of ranks that are gone: one that is restarted and reads
    before the others have written would try to connect to those. Its count of restarts tells them apart on one machine only:
    on several, each counts its own failures, and not those who joined or left. So rank 0 makes up a name for this start, and
    gives it to whoever asks with a word that was made up for this start too.
    """
    torchruns = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store, _, _ = next(
            dist.rendezvous("env://", timeout=_PATIENCE_FOR_TORCHRUN if torchruns else _PATIENCE_TO_START)
        )
    except dist.DistError as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        if torchruns:
            raise TrainingError(
                f"nobody answers at {address}, where the ranks meet: torchrun is gone, start it again"
            ) from error
        raise TrainingError(
            f"the ranks cannot meet at {address} ({_in_a_line(error)}); check MASTER_ADDR and MASTER_PORT"
        ) from error
    store.set_timeout(patience)  # of what is asked later
    name = uuid.uuid4().hex
    if rank > 0:
        store.set(f"asks/{rank}", name)
        name = store.get(f"answer/{name}").decode()  # waits for it
        store.set(f"{name}/has/{rank}", "")
        return dist.PrefixStore(name, store)
    missing, deadline = set(range(1, world_size)), time.monotonic() + _PATIENCE_TO_START.total_seconds()
    while missing:
        for other in tuple(missing):
            if store.check([f"{name}/has/{other}"]):
                missing.remove(other)
            elif store.check([f"asks/{other}"]):  # perhaps one of an earlier start: then it asks again
                store.set(f"answer/{store.get(f'asks/{other}').decode()}", name)
        if time.monotonic() > deadline:
            raise TrainingError(f"rank {min(missing)} did not come within {_PATIENCE_TO_START.seconds // 60} minutes")
        time.sleep(0.02)
    return dist.PrefixStore(name, store)


def _own_device(device: str, local_rank: int, local_world_size: int) -> torch.device:
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here; check the driver with nvidia-smi, or use --device cpu")
    if local_world_size > torch.cuda.device_count():
        raise UserError(
            f"{local_world_size} processes on this machine but {torch.cuda.device_count()} GPUs; "
            "give torchrun --nproc_per_node the number of GPUs"
        )
    if local_rank >= torch.cuda.device_count():  # of a launcher that does not say how many processes there are
        raise UserError(
            f"LOCAL_RANK={local_rank} but {torch.cuda.device_count()} GPUs on this machine: local ranks count from 0; mend how "
            "the ranks are launched"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def on_rank_0(ranks: Ranks, call: Callable[[], T]) -> T:
    """Rank 0 makes the call while the others wait. Returns its result on every rank.

    A UserError or TrainingError of rank 0 is raised on every rank. Any other error of rank 0 ends the others, too.
    """
    if ranks.patient_group is None:
        return call()
    message: list = [None, None]
    if ranks.is_main:
        try:
            message[0] = call()
        except (UserError, TrainingError) as error:
            message[1] = error
        except Exception as error:
            message[1] = LostRankError(f"rank 0 has failed ({type(error).__name__}: {error})")
            dist.broadcast_object_list(message, src=0, group=ranks.patient_group)
            raise
    dist.broadcast_object_list(message, src=0, group=ranks.patient_group)
    result, failure = message
    if failure is not None:
        raise failure
    return result


def sum_over_ranks(values: Tensor, ranks: Ranks) -> Tensor:
    """Add a small tensor up over all ranks, in place; returns it."""
    if ranks.patient_group is not None:
        dist.all_reduce(values)
    return values


def gather(own: T, ranks: Ranks) -> list[T]:
    """A small object of each rank, in their order, on all of them; every rank must call this."""
    if ranks.patient_group is None:
        return [own]
    everyones: list = [None] * ranks.world_size
    dist.all_gather_object(everyones, own, group=ranks.patient_group)
    return everyones


def from_each_machine(own: T, ranks: Ranks) -> list[T]:
    """On rank 0 an object of the first rank of each machine, however large, in their order; [] on all other ranks. Every rank
    must call this.

    Nothing but these objects travels: a gathering of all ranks makes every message as long as the longest one.
    """
    firsts = [rank for rank, local_rank in enumerate(gather(ranks.local_rank, ranks)) if local_rank == 0]
    if ranks.rank not in firsts:
        return []
    if not ranks.is_main:
        dist.send_object_list([own], dst=0, group=ranks.patient_group)
        return []
    received: list = [own]
    for rank in firsts[1:]:
        message: list = [None]
        dist.recv_object_list(message, src=rank, group=ranks.patient_group)
        received += message
    return received


def union_over_ranks(own: set[int], ranks: Ranks) -> set[int]:
    """The union of a small set of each rank; every rank must call this."""
    return set().union(*gather(own, ranks))


def wait_for_all(ranks: Ranks) -> None:
    """Return when every rank has come here."""
    if ranks.patient_group is not None:
        dist.barrier(group=ranks.patient_group)
