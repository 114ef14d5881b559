"""The command line of profile/roofline.py."""

import argparse
import math

from common.errors import UserError
from common.flags import FlagParser
from model.vgg import CONFIGURATIONS
from perf.all_reduce import ALGORITHMS
from perf.cards import CARDS

NETWORK_GBITS_PER_SECOND = 400.0
LATENCY_MICROSECONDS = 10.0


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Raises UserError."""
    parser = FlagParser(
        prog="python profile/roofline.py", description="The least time that a training step can take, and more GPUs."
    )
    add = parser.add_argument
    add("--arch", choices=CONFIGURATIONS, default="D", help="configuration of the paper's Table 1")
    add("--classes", type=_count, default=1000, help="classes of the data set")
    add("--crop", type=_count, default=224, help="side of the network's input in pixels")
    add("--batch-size", type=_count, default=256, help="images of each GPU in one step")
    add("--micro-batch", type=_count, help="images in one pass; the batch must be a multiple of it")
    add("--precision", choices=("auto", "bf16", "fp16", "fp32"), default="auto", help="as for train.py")
    add("--gpu", help=f"one of the table: {', '.join(card.name for card in CARDS)}. Default: what is in this machine")
    add("--measure", action="store_true", help="measure this machine's peaks, even if its GPU is in the table")
    add(
        "--step-seconds",
        type=_positive,
        help="time of one step, measured: gives the MFU, and predictions start from it",
    )
    add("--step-joules", type=_positive, help="energy of one GPU in one step, measured: gives images per joule")
    add("--ranks", type=_count, default=1, help="GPUs that the floor is for")
    add("--grad-compression", choices=("none", "bf16", "fp16"), default="none", help="of the floor, as for train.py")
    add("--all-reduce", choices=(*ALGORITHMS, "best"), default="best", help="algorithm; best: the faster at each size")
    add("--gpus-per-node", type=_count, help="GPUs in a machine; default 8, for CPUs 1")
    add(
        "--nvlink-gbytes-per-second",
        type=_positive,
        help="of a GPU to the others of its machine, in each direction; default: the table's NVLink, or PCIe",
    )
    add(
        "--network-gbits-per-second",
        type=_positive,
        default=NETWORK_GBITS_PER_SECOND,
        help="of a machine, in each direction, for all its GPUs together",
    )
    add("--latency-us", type=_positive, default=LATENCY_MICROSECONDS, help="microseconds of one message")
    add("--layers", action="store_true", help="print the floor of every layer too")
    add("--image-size", type=_size, metavar="HEIGHTxWIDTH", help="of the training images: gives the pixels to decode")
    add("--train-scale", type=_scale, default=(256, 256), help="as for train.py: 256, 256-512")
    add("--jpeg-bytes", type=_positive, help="of a training image's file: gives the bytes to read")
    arguments = parser.parse_args(argv)
    if arguments.micro_batch and arguments.batch_size % arguments.micro_batch:
        raise UserError(
            f"--batch-size {arguments.batch_size} is not a multiple of --micro-batch {arguments.micro_batch}"
        )
    if arguments.gpu and arguments.measure:
        raise UserError("--measure measures this machine: leave out --gpu")
    if arguments.train_scale[0] < arguments.crop and arguments.image_size:
        raise UserError(f"--train-scale {arguments.train_scale[0]} is less than --crop {arguments.crop}")
    return arguments


def _count(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return _count(height), _count(width)


def _scale(text: str) -> tuple[int, int]:
    lowest, _, highest = text.partition("-")
    scale = _count(lowest), _count(highest or lowest)
    if scale[0] > scale[1]:
        raise argparse.ArgumentTypeError(f"{text}: the lowest scale comes first")
    return scale
