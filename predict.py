#!/usr/bin/env python3
"""What a trained network sees in image files: python predict.py --checkpoint runs/D-imagenet/best.pt IMAGE_OR_FOLDER …"""

if __name__ == "__main__":  # before the other imports: Ctrl-C ends them in a line, too
    from common.start import begin

    begin()

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from common.errors import UserError
from common.flags import parse_dataclass
from common.process import end, run_program
from common.progress import printable, say, show

# SHA-256 of ImageNet's 1000 WordNet ids (ILSVRC 2012), sorted, with a line feed between them.
IMAGENET_IDS = "385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """Name the likeliest classes of image files.

    The network sees the centre crop, as in a validation.

    The last line on stdout is one line of JSON with the results.
    """

    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Image files, or folders, of which all images are taken."""
    checkpoint: str
    """A checkpoint of this trainer, or torchvision:PATH for a state dict of torchvision's or timm's. If a checkpoint has averaged
    weights (--ema), these are used."""
    top: int = 5
    """Number of classes to name for each image."""
    scale: int | None = None
    """Shorter side Q of the rescaled image in pixels. Default: that of the training's validations."""
    json: bool = False
    """Print only the line of JSON."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where the network runs. auto: on the GPU if there is one."""


def run(flags: Flags) -> dict:
    """Predict as the flags say; print a table unless only JSON is asked for. Returns the results. Raises UserError."""
    # Here, not above: --help and mistyped flags answer without waiting for torch.
    from common.ranks import ranks_of_this_run
    from engine.evaluation.prediction import predict
    from engine.networks import load_network
    from engine.precision import choose_precision, set_numerics

    if flags.top < 1:
        raise UserError(f"--top {flags.top}: must be at least 1")
    paths = find_images(flags.images)
    network = load_network(flags.checkpoint)
    scale = flags.scale or network.test_scale
    if scale < network.crop:
        raise UserError(f"--scale {scale}: must be at least the network's crop, {network.crop}")
    with ranks_of_this_run(flags.device) as ranks:
        set_numerics(deterministic=False)
        predictions = predict(
            network,
            paths,
            top=flags.top,
            scale=scale,
            device=ranks.device,
            precision=choose_precision("auto", ranks),
            threads=ranks.cpu_share + 1,
        )
    names = class_names(network.classes) if network.classes else names_of_outputs(network.outputs)
    if not network.classes:
        taken = (
            "taken for ImageNet's, as torchvision's own files have them" if len(names) == 1000 else "shown by number"
        )
        say(f"{network.origin}: it has no class names; its {len(names)} outputs are {taken}")
    results = []
    for prediction in predictions:
        best = [
            {"class": names[label], "label": label, "probability": round(probability, 4)}
            for label, probability in zip(prediction.labels, prediction.probabilities, strict=True)
        ]
        results.append({"image": str(prediction.path), "predictions": best, "error": prediction.reason or None})
    if not flags.json:
        print_table(results)
    return {"checkpoint": flags.checkpoint, "arch": network.arch, "scale": scale, "images": results}


def find_images(given: Sequence[Path]) -> list[Path]:
    """The files given, and the images that a training would find in the folders given.

    Raises UserError: nothing there, a folder that cannot be listed, or one without any.
    """
    from pipeline.dataset.headers import says_image
    from pipeline.dataset.scan import is_folder_there, list_files, say_left_out

    paths: list[Path] = []
    for path in given:
        if is_folder_there(path):
            listing = list_files(path)
            found = [path / name for name in listing.files if says_image(path / name)]
            listing.left_out["no image"] += len(listing.files) - len(found)
            say_left_out(+listing.left_out, folder=path)
            if not found:
                raise UserError(f"{path}: holds no images")
            paths += found
        elif os.path.lexists(path):
            paths.append(path)
        else:
            raise UserError(f"{path}: no such file")
    if not paths:
        raise UserError(
            "no images; give files or folders: python predict.py --checkpoint runs/D-imagenet/best.pt IMAGE"
        )
    return paths


def class_names(classes: Sequence[str]) -> list[str]:
    """Class names for people: the words that ImageNet's WordNet ids stand for, where the classes are these 1000 and no others."""
    by_id = sorted(classes)
    digest = hashlib.sha256("\n".join(by_id).encode(errors="surrogatepass")).hexdigest()
    if digest != IMAGENET_IDS:
        return list(classes)
    words = dict(zip(by_id, _imagenet_words(), strict=True))
    return [words[name] for name in classes]


def names_of_outputs(count: int) -> list[str]:
    """What to call the outputs of a network without class names: 1000 are taken for ImageNet's, others keep their numbers."""
    return _imagenet_words() if count == 1000 else [f"output {number}" for number in range(count)]


def _imagenet_words() -> list[str]:
    from torchvision.models import VGG16_Weights

    return list(VGG16_Weights.IMAGENET1K_V1.meta["categories"])  # in the order of the WordNet ids


def print_table(results: list[dict]) -> None:
    for result in results:
        show(printable(result["image"]))
        for best in result["predictions"]:
            show(f"  {best['probability']:7.2%}  {printable(best['class'])}")
        if result["error"]:
            show(f"  cannot be decoded: {result['error']}")


def main(argv: list[str] | None = None) -> int:
    """Parse, predict, print.

    Returns the exit code: 0, 1 (some images cannot be decoded), 2 (something given is wrong), 130 (Ctrl-C).
    """

    def work() -> int:
        results = run(parse_dataclass(Flags, sys.argv[1:] if argv is None else argv, None, "predict.py"))
        print(json.dumps(results, allow_nan=False), flush=True)
        return 1 if any(result["error"] for result in results["images"]) else 0

    return run_program(work)


if __name__ == "__main__":
    end(main)
