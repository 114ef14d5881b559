"""The step in which ranks share FC6 and FC7 (--parallel hybrid): what travels, how long that takes, and whether it is worth it.

In each pass of n ranks that share the layers, with m images each:
- forward, FC6's inputs of all n · m images are gathered, and FC7's outputs are added up, each rank getting its own images';
- backward, the gradient of FC7's outputs is gathered, and that of FC6's inputs is added up.
Nothing runs beside these four: the layer before has to be done, and the next one waits. A gather of S bytes in all, or a sum of
as many, is one half of a ring's all-reduce: n − 1 messages of S / n. Between machines, each rank first has it with the same GPU
of the others, all through the machine's one connection, then within the machine. A switch that adds up saves nothing here that
counts: each rank has to receive, or to send, nearly all S bytes.

The other gradients are all-reduced beside the convolutions' backward pass, as those of all layers are without sharing. Where the
ranks of one machine share, the gradients of FC6 and FC7 are added up over the machines first, each rank its part.
"""

from collections.abc import Callable
from dataclasses import replace

import msgspec
import torch

from common.progress import say
from common.ranks import Ranks, on_rank_0
from engine.config import Config
from model.vgg import FC_WIDTH, STRIDE
from perf.costs import Job, gradient_bytes
from perf.peaks import peaks_of
from perf.report import Links, Peaks, Scaled
from perf.scaling import (
    ComputeTimes,
    all_reduce_beside,
    all_reduce_seconds,
    floor_times,
    links_from,
    no_link_flags,
)

_WORTH_IT = 1.1
"""By how much hybrid must be faster for --parallel auto to take it: the prediction is a model."""


def possible_sharing(ranks: int, gpus_per_node: int) -> list[int]:
    """By how many of so many ranks the layers may be shared: by those of a machine, and by all; nothing where they do not divide.

    Within a machine the activations take the fast links, but each part's gradient has to go over the network; over all machines
    it is the other way round, and better for small batches.
    """
    machine = gpus_per_node if ranks % gpus_per_node == 0 else ranks
    return [count for count in sorted({machine, ranks}) if count > 1 and FC_WIDTH % count == 0]


def gather_seconds(size_bytes: float, *, ranks: int, links: Links) -> float:
    """Of so many bytes in all, of which each rank has its part before; adding up and scattering them takes as long."""
    local = min(ranks, links.gpus_per_node)
    machines = ranks // local

    def ring(count: int, bytes_per_second: float) -> float:
        return (count - 1) * (links.latency_seconds + size_bytes / count / bytes_per_second)

    return ring(local, links.peer_bytes_per_second) + ring(machines, links.network_bytes_per_second)


def activation_bytes(job: Job, sharing: int) -> tuple[int, int]:
    """FC6's inputs and FC7's outputs of one pass of all ranks that share them."""
    rows = sharing * job.batch // job.passes
    bytes_per_value = 4 if job.precision == "fp32" else 2
    return rows * 512 * (job.crop // STRIDE) ** 2 * bytes_per_value, rows * FC_WIDTH * bytes_per_value


def communication_seconds(
    job: Job, times: ComputeTimes, *, sharing: int, links: Links, algorithm: str
) -> tuple[float, float]:
    """Of everything that travels in a step, and of what nothing hides. job.ranks: of all. times: with the layers shared by so
    many ranks; 1: data parallel.
    """
    per_gradient = gradient_bytes(1, job.grad_compression)
    waiting, busy = 0.0, 0.0
    if sharing > 1:
        of_a_pass = [gather_seconds(size, ranks=sharing, links=links) for size in activation_bytes(job, sharing)]
        waiting = 2 * job.passes * sum(of_a_pass)  # forward and backward
        if job.ranks > sharing:
            # All parts of a machine go through its one connection.
            size = sharing * times.shared_parameters * per_gradient
            between = msgspec.structs.replace(links, gpus_per_node=1, in_switch=False)
            busy = all_reduce_seconds(size, ranks=job.ranks // sharing, links=between, algorithm="ring")
    total, exposed = all_reduce_beside(
        times.backward,
        ranks=job.ranks,
        links=links,
        algorithm=algorithm,
        bytes_per_gradient=per_gradient,
        busy_until=busy,
    )
    return waiting + busy + total, waiting + exposed


def predict_hybrid(job: Job, times_of: Callable[[int], ComputeTimes], *, links: Links, algorithm: str) -> Scaled | None:
    """The fastest step of job.ranks ranks that share the layers; None where these do not divide among them. times_of: the
    computing of a rank when so many share."""
    alone, images = times_of(1), job.ranks * job.batch
    found = []
    for sharing in possible_sharing(job.ranks, links.gpus_per_node):
        times = times_of(sharing)
        total, exposed = communication_seconds(job, times, sharing=sharing, links=links, algorithm=algorithm)
        found.append(
            Scaled(
                images_per_second=images / (times.seconds + exposed),
                efficiency=alone.seconds / (times.seconds + exposed),
                all_reduce_seconds=total,
                exposed_seconds=exposed,
                images_per_second_without_overlap=images / (times.seconds + total),
                sharing=sharing,
            )
        )
    return max(found, key=lambda scaled: scaled.images_per_second, default=None)


def choose_parallel(config: Config, ranks: Ranks, job: Job) -> Config:
    """The configuration with --parallel auto replaced by what it comes to on rank 0, which says so; every rank must call this.
    job: the run's.

    Others may come to something else: their machine has more ranks or fewer, or other GPUs.

    Computing is taken to run at the rates of the table of cards, which no step reaches: the slower it is, the more of the
    all-reduce it hides, and the less there is to gain.
    """
    if config.parallel != "auto":
        return config
    if ranks.world_size == 1:
        return replace(config, parallel="data")
    sharing, reason = on_rank_0(ranks, lambda: _sharing(config, ranks, job))
    if ranks.is_main:
        choice, other = (f"hybrid over {sharing} ranks", "data") if sharing > 1 else ("data", "hybrid")
        say(f"--parallel auto is {choice} here: {reason}; --parallel {other} is the other way")
    if sharing == 1:
        return replace(config, parallel="data")
    return replace(config, parallel="hybrid", fc_ranks=sharing)


def _sharing(config: Config, ranks: Ranks, job: Job) -> tuple[int, str]:
    """How many ranks are to share the layers, 1 for none, and why."""
    name = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "CPU"
    peaks = peaks_of(name, job.precision)
    if peaks is None:
        return 1, f"the rates of this device ({name}) are not known"
    machine = _ranks_a_machine(ranks)
    links = _links(ranks, peaks)
    possible = possible_sharing(ranks.world_size, machine)
    if config.fc_ranks:
        possible = [config.fc_ranks] if ranks.world_size % config.fc_ranks == FC_WIDTH % config.fc_ranks == 0 else []
    if links is None or not possible:
        return 1, f"{FC_WIDTH} units do not divide among {config.fc_ranks or ranks.world_size} ranks"
    seconds = {}
    for sharing in (1, *possible):
        seconds[sharing] = least_step_seconds(job, peaks, ranks, sharing)
    best = min(possible, key=seconds.__getitem__)
    of_each = ", ".join(
        f"{f'hybrid over {count}' if count > 1 else 'data'} {1e3 * value:.2f}" for count, value in seconds.items()
    )
    why = f"predicted at the hardware's rates, ms a step: {of_each} ({links.source})"
    return (best if seconds[1] >= _WORTH_IT * seconds[best] else 1), why


def least_step_seconds(job: Job, peaks: Peaks, ranks: Ranks, sharing: int) -> float:
    """Of a step on these ranks, with the layers shared by so many, at the rates of the table of cards."""
    links = _links(ranks, peaks)
    assert links
    layers = replace(job, sharing=sharing).layers()
    times = floor_times(layers, peaks, batch=job.batch, passes=job.passes, precision=job.precision)
    _, exposed = communication_seconds(job, times, sharing=sharing, links=links, algorithm="best")
    return times.seconds + exposed


def _links(ranks: Ranks, peaks: Peaks) -> Links | None:
    return links_from(no_link_flags(), peaks, ranks_a_machine=_ranks_a_machine(ranks), ranks=ranks.world_size)


def _ranks_a_machine(ranks: Ranks) -> int:
    """As far as machines are filled evenly."""
    return ranks.local_world_size if ranks.world_size % ranks.local_world_size == 0 else 1
