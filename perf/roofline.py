"""python profile/roofline.py --arch D --batch-size 256 --precision bf16 --gpu H100: the least time that a step can take.

From first principles: what a step computes and moves (costs.py), what the hardware does at most (peaks.py: a table of GPUs, or
measured here), and how long an all-reduce takes (all_reduce.py). With --step-seconds, how near a measured step comes to that.
And what more GPUs would do, each with the same batch (scaling.py).

The floor holds for direct convolutions whose activations do not stay in a cache from one layer to the next: on a batch so small
that they do, layers that the memory limits can be faster. Not counted: starting kernels, the loss, the data.
"""

import argparse
import json
from dataclasses import asdict, dataclass, replace

import torch

from common.errors import UserError
from common.process import run_program
from engine.precision import choose_precision, set_numerics
from perf.all_reduce import Links
from perf.cards import CARDS, find_card
from perf.costs import decoded_pixels, gradient_bytes, optimizer_bytes
from perf.floor import Job, floor_times, layer_row
from perf.peaks import Peaks, measure_peaks, peaks_here, peaks_of
from perf.roofline_flags import LATENCY_MICROSECONDS, NETWORK_GBITS_PER_SECOND, parse_args
from perf.roofline_tables import print_floor, print_layers, print_scaling
from perf.scaling import ComputeTimes, all_reduce_beside, predict


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Of one GPU in one step; None for what was not measured."""

    step_seconds: float | None = None
    """All-reduce included."""
    step_joules: float | None = None
    forward_seconds: float | None = None
    """Of all passes together, as the backward pass's."""
    backward_seconds: float | None = None
    """Without the all-reduce."""
    optimizer_seconds: float | None = None


_NOTHING = Measured()


def roofline(job: Job, *, peaks: Peaks, links: Links, algorithm: str = "best", measured: Measured = _NOTHING) -> dict:
    """Floor, MFU, images per joule and predictions, as plain values; None where something was not measured.

    floor_seconds: of one GPU in one step. total counts of the all-reduce only what the backward pass leaves exposed;
    all_reduce is all of it. layers: forward and backward together, of one step. mfu: FLOPs of the step / (step_seconds · peak).
    scaling: as scaling.predict has it. It starts from the measured forward, backward and optimizer times; if only the whole
    step of a single GPU was measured, from that one, divided as the floor is; otherwise from the floor (scaling_from).

    Raises ValueError as VGG does; UserError: GPUs that do not fill their machines.
    """
    layers = job.layers()
    parameters = sum(sum(layer.parameters) for layer in layers)
    floor = floor_times(job, layers, peaks)
    all_reduce = all_reduce_beside(
        floor.backward,
        ranks=job.ranks,
        links=links,
        algorithm=algorithm,
        bytes_per_gradient=gradient_bytes(1, job.grad_compression),
    )
    flops = job.passes * sum(layer.forward.flops + layer.backward.flops for layer in layers)
    times = _measured_times(job, floor, measured)
    return {
        "peaks": asdict(peaks),
        "floor_seconds": {
            "forward": job.passes * floor.forward_seconds,
            "backward": job.passes * floor.backward_seconds,
            "optimizer": floor.optimizer_seconds,
            "all_reduce": all_reduce.seconds,
            "total": floor.seconds + all_reduce.exposed_seconds,
        },
        "flops_per_image": flops / job.batch,
        "optimizer_bytes": optimizer_bytes(parameters, job.precision),
        "all_reduce_bytes": gradient_bytes(parameters, job.grad_compression),
        "mfu": flops / (measured.step_seconds * peaks.flops_per_second) if measured.step_seconds else None,
        "images_per_joule": job.batch / measured.step_joules if measured.step_joules else None,
        "layers": [layer_row(layer, job.passes, peaks) for layer in layers],
        "scaling_from": "measured" if times else "floor",
        "scaling": predict(times or floor, links=links, algorithm=algorithm),
    }


def _measured_times(job: Job, floor: ComputeTimes, measured: Measured) -> ComputeTimes | None:
    """The floor's times, stretched to what was measured; None where that does not say enough."""
    if measured.forward_seconds and measured.backward_seconds and measured.optimizer_seconds:
        return floor.stretched(
            forward=measured.forward_seconds / (job.passes * floor.forward_seconds),
            backward=measured.backward_seconds / (job.passes * floor.backward_seconds),
            optimizer=measured.optimizer_seconds / floor.optimizer_seconds,
        )
    if measured.step_seconds and job.ranks == 1:
        times = measured.step_seconds / floor.seconds
        return floor.stretched(forward=times, backward=times, optimizer=times)
    return None


def links_of(
    peaks: Peaks,
    *,
    gpus_per_node: int | None = None,
    peer_gbytes_per_second: float | None = None,
    network_gbits_per_second: float = NETWORK_GBITS_PER_SECOND,
    latency_microseconds: float = LATENCY_MICROSECONDS,
) -> Links:
    """Links between devices like this one. Default: eight GPUs a machine, joined by the table's NVLink or PCIe; a device that is
    not in the table, as a CPU, has the network only."""
    network_bytes_per_second = network_gbits_per_second * 1e9 / 8
    card = find_card(peaks.name)
    gpus = gpus_per_node or (8 if card else 1)
    links = Links(
        peer_bytes_per_second=card.bytes_per_second_to_peers(gpus) if card else network_bytes_per_second,
        network_bytes_per_second=network_bytes_per_second,
        gpus_per_node=gpus,
        latency_seconds=latency_microseconds / 1e6,
    )
    return replace(links, peer_bytes_per_second=peer_gbytes_per_second * 1e9) if peer_gbytes_per_second else links


def main(argv: list[str] | None = None) -> int:
    return run_program(lambda: _run(argv))


def _run(argv: list[str] | None) -> int:
    try:
        arguments = parse_args(argv)
        peaks, precision = choose_peaks(arguments)
        job = Job(
            arch=arguments.arch,
            classes=arguments.classes,
            crop=arguments.crop,
            batch=arguments.batch_size,
            micro_batch=arguments.micro_batch,
            precision=precision,
            grad_compression=arguments.grad_compression,
            ranks=arguments.ranks,
        )
        links = links_of(
            peaks,
            gpus_per_node=arguments.gpus_per_node,
            peer_gbytes_per_second=arguments.nvlink_gbytes_per_second,
            network_gbits_per_second=arguments.network_gbits_per_second,
            latency_microseconds=arguments.latency_us,
        )
        measured = Measured(step_seconds=arguments.step_seconds, step_joules=arguments.step_joules)
        result = roofline(job, peaks=peaks, links=links, algorithm=arguments.all_reduce, measured=measured)
        result["decode"] = decode_work(arguments)
    except ValueError as error:  # of VGG: a crop that is not a multiple of 32
        raise UserError(f"--crop: {error}") from error
    if arguments.layers:
        print_layers(result)
    print_floor(job, result)
    print_scaling(result, links, arguments.all_reduce)
    print(json.dumps({**asdict(job), **result}))
    return 0


def choose_peaks(arguments: argparse.Namespace) -> tuple[Peaks, str]:
    """Peaks, and the precision that they are for. Raises UserError: no such GPU in the table, or not that precision."""
    if arguments.gpu is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        set_numerics(deterministic=False)
        precision = choose_precision(arguments.precision, device).name
        return (measure_peaks if arguments.measure else peaks_here)(device, precision), precision
    card = find_card(arguments.gpu)
    if card is None:
        raise UserError(f"--gpu {arguments.gpu}: not in the table, which has {', '.join(card.name for card in CARDS)}")
    precision = arguments.precision
    if precision == "auto":
        precision = "bf16" if card.bf16 else "fp16"
    peaks = peaks_of(card.name, precision)
    if peaks is None:
        raise UserError(f"--gpu {card.name} has no {precision}; take --precision fp16 or fp32")
    return peaks, precision


def decode_work(arguments: argparse.Namespace) -> dict:
    """Of one training image; None for what is not known."""
    pixels = None
    if arguments.image_size:
        pixels = decoded_pixels(*arguments.image_size, crop=arguments.crop, scale=arguments.train_scale)
    return {"pixels_per_image": pixels, "jpeg_bytes_per_image": arguments.jpeg_bytes}
