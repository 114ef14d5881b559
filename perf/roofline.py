"""The roofline of a training step, and profile/roofline.py, which prints it: floors, MFU, and what more GPUs would do."""

import argparse
import json
from dataclasses import asdict, replace

import msgspec
import torch

from common.errors import UserError
from common.flags import FlagParser, above_zero, whole_above_zero
from common.process import run_program
from engine.precision import fast_format, set_numerics
from model.vgg import CONFIGURATIONS, FUSIONS
from perf.costs import Job, LayerCost, decoded_pixels, gradient_bytes, optimizer_bytes
from perf.hybrid import communication_seconds, predict_hybrid
from perf.page import layer_table, links_sentence, prediction_table
from perf.peaks import CARDS, find_card, measure_peaks, peaks_here, peaks_of
from perf.report import FloorSeconds, Layer, Links, Peaks, Roofline, StepParts
from perf.scaling import (
    ComputeTimes,
    add_link_flags,
    floor_seconds,
    floor_times,
    links_from,
    predict,
)
from perf.words import milliseconds, name_of, number, percent, print_table, with_prefix


def roofline(
    job: Job,
    *,
    peaks: Peaks,
    links: Links | None,
    algorithm: str = "best",
    step_seconds: float | None = None,
    step_joules: float | None = None,
    parts: StepParts | None = None,
    layer_seconds: dict[str, float] | None = None,
) -> Roofline:
    """Floors, MFU, images per joule and predictions; None where something was not measured.

    Measured, of one GPU: step_seconds and step_joules of a whole step, parts of it, and layer_seconds of one pass forward and
    backward, by the layer's name. MFU: FLOPs of the step / (step_seconds · peak). scaling starts from the parts' means; if only
    the whole step of a single GPU was measured, from that one, divided as the floor is; otherwise from the fused floor
    (scaling_from). Without links nothing is predicted, and of the floor the all-reduce is 0.

    Raises ValueError as VGG does; UserError: GPUs that do not fill their machines, in-switch without such a switch.
    """
    layers = job.layers()
    parameters = sum(sum(layer.parameters) for layer in layers)
    fused, unfused = (
        floor_times(layers, peaks, batch=job.batch, passes=job.passes, precision=job.precision, fused=is_fused)
        for is_fused in (True, False)
    )
    flops = job.passes * sum(layer.forward.flops + layer.backward.flops for layer in layers)
    slower = _slower_than_floor(job, fused, step_seconds, parts)
    scaling = []
    if links:

        def times_of(sharing: int) -> ComputeTimes:
            layers = replace(job, sharing=sharing).layers()
            floor = floor_times(layers, peaks, batch=job.batch, passes=job.passes, precision=job.precision)
            return floor.stretched(**slower) if slower else floor

        scaling = predict(times_of(1), links=links, algorithm=algorithm)
        for row in scaling:
            plain = replace(job, ranks=row.ranks, grad_compression="none")
            row.hybrid = predict_hybrid(plain, times_of, links=links, algorithm=algorithm)
    return Roofline(
        peaks=peaks,
        floor_seconds=_floor(job, fused, links, algorithm),
        floor_seconds_unfused=_floor(job, unfused, links, algorithm),
        flops_per_image=flops / job.batch,
        optimizer_bytes=optimizer_bytes(parameters, job.precision),
        all_reduce_bytes=gradient_bytes(parameters, job.grad_compression),
        mfu=flops / (step_seconds * peaks.flops_per_second) if step_seconds else None,
        images_per_joule=job.batch / step_joules if step_joules else None,
        layers=[_layer(layer, job.passes, peaks, (layer_seconds or {}).get(layer.name)) for layer in layers],
        links=links,
        scaling_from="measured" if slower else "floor",
        scaling=scaling,
    )


def _floor(job: Job, times: ComputeTimes, links: Links | None, algorithm: str) -> FloorSeconds:
    seconds = exposed = 0.0
    if links:
        seconds, exposed = communication_seconds(job, times, sharing=job.sharing, links=links, algorithm=algorithm)
    return FloorSeconds(
        forward=job.passes * times.forward_seconds,
        backward=job.passes * times.backward_seconds,
        optimizer=times.optimizer_seconds,
        all_reduce=seconds,
        total=times.seconds + exposed,
    )


def _layer(layer: LayerCost, passes: int, peaks: Peaks, measured_seconds: float | None) -> Layer:
    """A layer's part of a step, forward and backward together."""
    kernels = (*layer.forward_kernels, *layer.backward_kernels)
    return Layer(
        name=layer.name,
        kind=layer.kind,
        flops=passes * (layer.forward.flops + layer.backward.flops),
        bytes=passes * (layer.forward.bytes + layer.backward.bytes),
        bytes_unfused=passes * sum(kernel.bytes for kernel in kernels),
        floor_seconds=passes * floor_seconds([layer.forward, layer.backward], peaks),
        floor_seconds_unfused=passes * floor_seconds(kernels, peaks),
        measured_seconds=passes * measured_seconds if measured_seconds is not None else None,
    )


def _slower_than_floor(
    job: Job, floor: ComputeTimes, step_seconds: float | None, parts: StepParts | None
) -> dict[str, float] | None:
    """How many times as long as the floor each part was measured to take; None where that does not say enough."""
    if parts:
        return {
            "forward": parts.forward.mean / (job.passes * floor.forward_seconds),
            "backward": parts.backward.mean / (job.passes * floor.backward_seconds),
            "optimizer": parts.optimizer.mean / floor.optimizer_seconds,
        }
    if step_seconds and job.ranks == 1:
        return dict.fromkeys(("forward", "backward", "optimizer"), step_seconds / floor.seconds)
    return None


# ---- the program ---------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    return run_program(lambda: _run(argv))


def _run(argv: list[str] | None) -> int:
    arguments = _parse_args(argv)
    peaks, precision = _choose_peaks(arguments)
    same = ("arch", "classes", "crop", "micro_batch", "grad_compression", "ranks", "batch_norm", "fuse")
    job = Job(batch=arguments.batch_size, precision=precision, **{name: getattr(arguments, name) for name in same})
    links = links_from(arguments, peaks, ranks_a_machine=None, ranks=job.ranks)
    measured = {name: getattr(arguments, name) for name in ("step_seconds", "step_joules")}
    try:
        result = roofline(job, peaks=peaks, links=links, algorithm=arguments.all_reduce, **measured)
    except ValueError as error:  # of VGG: a crop that is not a multiple of 32
        raise UserError(f"--crop: {error}") from error
    size, crop, scale, jpeg_bytes = arguments.image_size, arguments.crop, arguments.train_scale, arguments.jpeg_bytes
    pixels = decoded_pixels(*size, crop=crop, scale=scale) if size else None
    if arguments.layers:
        print_table(layer_table(result))
    _print_floor(job, result, arguments.step_seconds)
    rate = job.ranks * job.batch / result.floor_seconds.total
    if pixels:
        print(f"to decode: {pixels:,.0f} pixels an image, {pixels * rate / 1e6:,.0f} million a second")
    if jpeg_bytes:
        print(f"to read: {jpeg_bytes:,.0f} bytes an image, {jpeg_bytes * rate / 1e6:,.0f} MB a second")
    print(f"\n{links_sentence(result)}")
    if result.scaling:
        print(f"All-reduce: {arguments.all_reduce}.")
        print_table(prediction_table(result))
    decode = {"pixels_per_image": pixels, "jpeg_bytes_per_image": jpeg_bytes}
    print(json.dumps({**asdict(job), **msgspec.to_builtins(result), "decode": decode}))
    return 0


def _parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = FlagParser(
        prog="python profile/roofline.py",
        description="The least time that a training step can take, on one GPU and on more.",
    )
    add = parser.add_argument
    add("--arch", choices=CONFIGURATIONS, default="D", help="configuration of the paper's Table 1")
    add("--batch-norm", action="store_true", help="as for train.py")
    add("--fuse", choices=FUSIONS, default="none", help="as for train.py: it lowers the unfused floor")
    add("--classes", type=whole_above_zero, default=1000, help="classes of the data set")
    add("--crop", type=whole_above_zero, default=224, help="side of the network's input in pixels")
    add("--batch-size", type=whole_above_zero, default=256, help="images of each GPU in one step")
    add("--micro-batch", type=whole_above_zero, help="images in one pass; the batch must be a multiple of it")
    add("--precision", choices=("auto", "bf16", "fp16", "fp32"), default="auto", help="as for train.py")
    add("--gpu", help=f"GPU of the table: {', '.join(card.name for card in CARDS)}. Default: this machine's")
    add("--measure", action="store_true", help="measure this machine's peaks, even if its GPU is in the table")
    add(
        "--step-seconds",
        type=above_zero,
        help="measured time of one step: gives the MFU, and predictions start from it",
    )
    add("--step-joules", type=above_zero, help="measured energy of one GPU in one step: gives images per joule")
    add("--ranks", type=whole_above_zero, default=1, help="number of GPUs for which to compute the least time")
    add("--grad-compression", choices=("none", "bf16", "fp16"), default="none", help="precision of sent gradients")
    add_link_flags(parser)
    add("--layers", action="store_true", help="also print the least time of every layer")
    add(
        "--image-size",
        type=_size,
        metavar="HEIGHTxWIDTH",
        help="mean size of the training images: gives the pixels to decode",
    )
    add("--train-scale", type=_scale, default=(256, 256), help="as for train.py: 256, 256-512")
    add("--jpeg-bytes", type=above_zero, help="mean size of a training image's file: gives the bytes to read")
    arguments = parser.parse_args(argv)
    batch, micro_batch = arguments.batch_size, arguments.micro_batch
    if micro_batch and batch % micro_batch:
        raise UserError(f"--batch-size {batch} is not a multiple of --micro-batch {micro_batch}")
    if arguments.gpu and arguments.measure:
        raise UserError("--measure measures this machine: leave out --gpu")
    if arguments.train_scale[0] < arguments.crop and arguments.image_size:
        raise UserError(f"--train-scale {arguments.train_scale[0]} is less than --crop {arguments.crop}")
    return arguments


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return whole_above_zero(height), whole_above_zero(width)


def _scale(text: str) -> tuple[int, int]:
    lowest, _, highest = text.partition("-")
    scale = whole_above_zero(lowest), whole_above_zero(highest or lowest)
    if scale[0] > scale[1]:
        raise argparse.ArgumentTypeError(f"{text}: the lowest scale comes first")
    return scale


def _choose_peaks(arguments: argparse.Namespace) -> tuple[Peaks, str]:
    """Peaks, and the precision that they are for. Raises UserError: no such GPU in the table, or not that precision."""
    if arguments.gpu is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        set_numerics(deterministic=False)
        precision = fast_format(device) if arguments.precision == "auto" else arguments.precision
        return (measure_peaks if arguments.measure else peaks_here)(device, precision), precision
    card = find_card(arguments.gpu)
    if card is None:
        raise UserError(f"--gpu {arguments.gpu}: not in the table, which has {', '.join(card.name for card in CARDS)}")
    precision = arguments.precision
    if precision == "auto":
        precision = "bf16" if card.bf16_tflops else "fp16"
    peaks = peaks_of(card.name, precision)
    if peaks is None:
        raise UserError(f"--gpu {card.name} has no {precision}; take --precision fp16 or fp32")
    return peaks, precision


def _print_floor(job: Job, result: Roofline, step_seconds: float | None) -> None:
    peaks, fused, unfused = result.peaks, result.floor_seconds, result.floor_seconds_unfused
    rate = job.ranks * job.batch / fused.total
    print(
        f"{job.arch}{' with batch normalisation' if job.batch_norm else ''}{f', --fuse {job.fuse}' * (job.fuse != 'none')}, "
        f"{job.classes} classes, crop {job.crop}, batch "
        f"{job.batch}{f' in passes of {job.micro_batch}' if job.passes > 1 else ''}, {job.precision}, {job.ranks} × "
        f"{peaks.name}: {with_prefix(peaks.flops_per_second, 'FLOP/s')}, {with_prefix(peaks.bytes_per_second, 'B/s')} "
        f"({peaks.source})\n{result.flops_per_image / 1e9:,.2f} GFLOP a training image\n"
    )
    power = f", {number(rate / job.ranks / peaks.watts)} images/joule at {peaks.watts:,g} W" if peaks.watts else ""
    notes = {
        "optimizer": f"{result.optimizer_bytes / 1e6:,.0f} MB",
        "all_reduce": f"{result.all_reduce_bytes / 1e6:,.0f} MB, beside the backward pass",
        "total": f"at most {rate:,.0f} images/s{power}",
    }
    table = [
        {
            "floor of a step": name_of(part),
            "fused, ms": milliseconds(getattr(fused, part)),
            "unfused, ms": milliseconds(getattr(unfused, part)),
            "": notes.get(part, ""),
        }
        for part in FloorSeconds.__struct_fields__
    ]
    print_table(table)
    if step_seconds:
        passes, rest = min(step_seconds, unfused.total) - fused.total, max(0.0, step_seconds - unfused.total)
        print(
            f"step {milliseconds(step_seconds)} ms: of it up to {milliseconds(max(0.0, passes))} ms memory passes that fusing "
            f"would save; {milliseconds(rest)} ms or more kernels below their rate, or waiting\nMFU {percent(result.mfu)}"
        )
    if result.images_per_joule is not None:
        print(f"images/joule {number(result.images_per_joule)}")
