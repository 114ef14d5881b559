"""The command lines of evaluate.py and features.py: frozen dataclasses, their field docstrings are the text of --help.

Nothing here imports torch, so that --help and a mistyped flag answer at once.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Literal

from common.errors import UserError
from common.flags import expand_switch, parse_dataclass
from engine.config import SYNTHETIC, LoadingFlags, check_loading, check_numbers, default_data


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputFlags:
    """Which images a network is shown, and how."""

    data: str = dataclasses.field(default_factory=default_data)
    """As for train.py: a folder with train/ and val/, prepared data in a folder or a bucket, or `digits`."""
    scales: str | None = None
    """Shorter sides Q of the rescaled test image in pixels, separated by commas, as 256,384,512. The results are averaged.
    Default: for each network that of its training's validations."""
    flip: Literal["auto", "on", "off"] = "auto"
    """Average over each view of an image and its mirror image; --flip and --no-flip are short for on and off. auto: on,
    as in the paper, except with --protocol center."""
    batch_size: int = 128
    """Images of the network's input size that a rank computes together; of larger images, as many as have no more pixels."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where the network runs. auto: on the GPU if there is one."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Precision of autocast. auto: on GPUs bf16, or fp16 if one of them does not support bf16; on a CPU fp32."""
    decoder: Literal["auto", "gpu", "cpu"] = "auto"
    """Where JPEGs are decoded. auto: where the network runs."""
    threads: int | None = None
    """DALI's CPU threads in each rank. Default: one more than the rank's share of the cores."""
    max_bad_images: int | None = None
    """How many images may turn out not to be decodable; if there are more, the program ends. Default: 0.1 % of the images."""

    @property
    def loading(self) -> LoadingFlags:
        return LoadingFlags(decoder=self.decoder, threads=self.threads)

    def chosen_scales(self) -> tuple[int, ...] | None:
        """--scales as numbers. Raises UserError."""
        if self.scales is None:
            return None
        try:
            return tuple(int(scale) for scale in self.scales.split(","))
        except ValueError:
            raise UserError(f"--scales {self.scales}: give numbers of pixels with commas, as 256,384,512") from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateFlags(InputFlags):
    """Test networks on the validation images, as the paper does.

    The last line on stdout is one line of JSON with the results.
    """

    checkpoint: tuple[str, ...]
    """Checkpoints of train.py, or torchvision:PATH for a state dict of torchvision's or timm's. Several networks are fused by
    averaging their posteriors."""
    protocol: Literal["center", "dense", "multicrop", "multicrop+dense"] = "dense"
    """What the network is shown. center: the centre crop, as in train.py's validation. dense: every place of the whole image.
    multicrop: a grid of 5×5 crops. multicrop+dense: the mean of both."""
    table: Literal[3, 4, 5, 6] | None = None
    """Print this table of the paper, with our figures beside the paper's and each checkpoint in its row. The table decides
    protocol, scales and flip."""
    posteriors: Path = Path("runs/posteriors")
    """Folder where the posteriors are kept. Posteriors that are already there are not computed again."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureFlags(InputFlags):
    """Write a network's features of a data set, for another classifier.

    They are the activations before the last layer (appendix B of the paper).

    The last line on stdout is one line of JSON with the results.
    """

    checkpoint: str
    """A checkpoint of train.py, or torchvision:PATH for a state dict of torchvision's or timm's."""
    output: Path
    """Folder to write to: train.npy and val.npy, float32 [images, 4096], train-labels.npy and val-labels.npy, int64
    [images], and classes.txt."""
    svm: bool = False
    """Fit a linear support vector machine to the features of train, and test it on those of val."""
    svm_c: float = 1.0
    """C of the support vector machine: small values regularise more."""


def parse_evaluate(argv: list[str] | None = None) -> EvaluateFlags:
    """evaluate.py's flags. Raises UserError; --help prints and exits."""
    flags = parse_dataclass(EvaluateFlags, _expanded(argv), None, "evaluate.py")
    _check(flags)
    decided = {"--protocol": flags.protocol != "dense", "--scales": flags.scales, "--flip": flags.flip != "auto"}
    if flags.table and (given := next((flag for flag, is_given in decided.items() if is_given), None)):
        raise UserError(f"{given}: --table {flags.table} decides it; leave one of the two out")
    return flags


def parse_features(argv: list[str] | None = None) -> FeatureFlags:
    """features.py's flags. Raises UserError; --help prints and exits."""
    flags = parse_dataclass(FeatureFlags, _expanded(argv), None, "features.py")
    _check(flags)
    if flags.svm_c <= 0:
        raise UserError(f"--svm-c {flags.svm_c}: must be above 0")
    return flags


def _expanded(argv: list[str] | None) -> list[str]:
    return expand_switch(sys.argv[1:] if argv is None else argv, "flip")


def _check(flags: InputFlags) -> None:
    if flags.data == SYNTHETIC:
        raise UserError(f"--data {SYNTHETIC}: has no images to test on; give a folder, or digits")
    check_numbers(flags)
    if flags.batch_size < 1:
        raise UserError(f"--batch-size {flags.batch_size}: must be at least 1")
    check_loading(flags.loading, flags.max_bad_images)
    flags.chosen_scales()
