#!/usr/bin/env python3
"""Write a trained network for other programs: python export.py --checkpoint BEST.pt --format onnx --output vgg16.onnx.

torchvision: a state dict for torchvision.models.vgg11 to vgg19 or vgg11_bn to vgg19_bn, whose images torchvision's Normalize
makes. torchvision finds weights only in it, so the mean for Normalize is said when it is written; this project's programs, given
torchvision:PATH, find the mean and the class names too. safetensors: the same in a file of that format, which is read without
running code; crop, mean and class names are in its metadata "vgg-dali", as JSON.

torch-export: a program for torch.export.load. onnx: an ONNX model in one file. Both take "images", float32 [batch, 3, crop,
crop], RGB pixels in 0–255 less the mean, any batch, and give "logits", float32 [batch, classes]. Crop, mean and class names
(null where there are none) are in the file, as JSON: the extra file network.json of torch-export, the metadata "network" of ONNX.
"""

if __name__ == "__main__":  # before the other imports: Ctrl-C ends them in a line, too
    from common.start import begin

    begin()

import dataclasses
import json
import sys
from pathlib import Path
from typing import Literal

from common.errors import UserError
from common.flags import parse_dataclass
from common.process import end, run_program
from common.progress import say


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """Write a trained network for other programs.

    The file is written only if its logits are those of the network.

    The last line on stdout is one line of JSON with the results.
    """

    checkpoint: str
    """A checkpoint of this trainer, or torchvision:PATH for a state dict of torchvision's or timm's. Averaged weights are used
    where there are any."""
    format: Literal["torchvision", "safetensors", "torch-export", "onnx"]
    """torchvision: a state dict for its networks. safetensors: the same in such a file. torch-export: a program for
    torch.export.load. onnx: an ONNX model."""
    output: Path
    """The file to write. An existing file is replaced when the new one is complete."""


def run(flags: Flags) -> dict:
    """Export as the flags say. Returns the results. Raises UserError, TrainingError."""
    # Here, not above: --help and mistyped flags answer without waiting for torch.
    from engine.export import export
    from engine.networks import TORCHVISION, load_network

    network = load_network(flags.checkpoint)
    if flags.output.exists() and flags.output.samefile(flags.checkpoint.removeprefix(TORCHVISION)):
        raise UserError(f"--output {flags.output}: is the checkpoint itself; choose another name")
    written = export(network, kind=flags.format, output=flags.output)
    say(f"{flags.output}, from {network.origin}: {written['usage']}")
    return {
        "checkpoint": flags.checkpoint,
        "format": flags.format,
        "output": str(flags.output),
        "arch": network.arch,
        "batch_norm": network.batch_norm,
        "crop": network.crop,
        "classes": network.outputs,
        "mean_rgb": network.mean_rgb,
        **written,
    }


def main(argv: list[str] | None = None) -> int:
    """Parse, export, print the results.

    Returns the exit code: 0, 1 (other logits), 2 (something given is wrong), 130 (Ctrl-C).
    """

    def work() -> int:
        results = run(parse_dataclass(Flags, sys.argv[1:] if argv is None else argv, None, "export.py"))
        print(json.dumps(results))
        return 0

    return run_program(work)


if __name__ == "__main__":
    end(main)
