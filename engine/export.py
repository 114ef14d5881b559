"""A trained network in the files of other programs, each of which is read again and compared before it is written."""

import io
import json
from collections import OrderedDict
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision
from torch import Tensor, nn
from torchvision.transforms.v2.functional import normalize

from common.errors import TrainingError, UserError
from common.files import replacing
from engine.networks import DESCRIPTION, Network
from model.vgg import STRIDE, VGG
from model.weights import NOT_DIVIDED, TORCHVISION_STD, to_torchvision

Logits = Callable[[Tensor], Tensor]
"""Pixels of images, float32 [n, 3, crop, crop] in 0–255, n from 1 on → logits [n, classes]."""


class Format(NamedTuple):
    """A kind of file."""

    contents: Callable[[Network], bytes]
    """Of a file with the network."""
    read: Callable[[Network, bytes], Logits]
    """The network in such a file, as the program that the format is for runs it."""
    usage: Callable[[Network], str]
    """A sentence that says how to."""
    packages: tuple[str, ...] = ()
    """What it needs beyond requirements.txt."""


# Programs add up the same products in different orders: a millionth of the largest logit, or a few. A wrong network is far
# beyond this.
_TOLERANCE = 1e-4

_TORCHVISION_CROP = 224  # at which its adaptive 7×7 average pool is the identity
_TORCHVISION_NAMES = {"A": "vgg11", "B": "vgg13", "D": "vgg16", "E": "vgg19"}


def export(network: Network, *, kind: str, output: Path) -> dict:
    """Write a network to a file, once what was to be written gives the same logits as the network on random images.

    kind: a key of FORMATS. Returns plain values: bytes of the file, usage (a sentence for people), largest_difference (of the
    logits, as a share of the largest logit).

    Raises UserError: the format has no such network, packages are missing, the file cannot be written. TrainingError: other
    logits. What was at `output` is replaced at the very end, or stays.
    """
    form = FORMATS[kind]
    if missing := [package for package in form.packages if not find_spec(package)]:
        raise UserError(f"--format {kind} needs {', '.join(missing)}: python -m pip install {' '.join(form.packages)}")
    try:
        with replacing(output) as file:  # opened first: a folder that cannot be written is known at once
            contents = form.contents(network)
            difference = _largest_difference(network, form.read(network, contents))
            if not difference <= _TOLERANCE:  # of a NaN too
                raise TrainingError(
                    f"{network.name} as {kind} gives other logits, by {difference:.1e} of the largest; nothing was written"
                )
            file.write(contents)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror})") from error
    return {"bytes": len(contents), "usage": form.usage(network), "largest_difference": difference}


def _torchvision_name(network: Network) -> str:
    """The function in torchvision.models that builds such a network. Raises UserError where there is none."""
    if network.arch not in _TORCHVISION_NAMES:
        raise UserError(
            f"torchvision has no network of configuration {network.arch}; choose --format torch-export or --format onnx"
        )
    return _TORCHVISION_NAMES[network.arch] + "_bn" * network.batch_norm


def _largest_difference(network: Network, logits: Logits) -> float:
    """Over a batch of one image and one of three: a file whose batch is fixed fails on one of them."""
    model, generator = _evaluated(network), torch.Generator().manual_seed(0)
    batches = [255 * torch.rand(n, 3, network.crop, network.crop, generator=generator) for n in (1, 3)]
    with torch.no_grad():
        std = torch.tensor(network.std_rgb).view(3, 1, 1)
        expected = torch.cat([model(_less_mean(network, pixels) / std) for pixels in batches])
        result = torch.cat([logits(pixels) for pixels in batches])
    return ((result - expected).abs().max() / expected.abs().max()).item()


def _evaluated(network: Network) -> VGG:
    # Other programs expect weights as torch lays them out by default.
    return network.build(torch.device("cpu")).to(memory_format=torch.contiguous_format)


def _less_mean(network: Network, pixels: Tensor) -> Tensor:
    return pixels - torch.tensor(network.mean_rgb).view(3, 1, 1)


def _description(network: Network) -> str:
    """What travels with the file, as JSON: nobody can use the network without its mean and the names of its classes."""
    names = ("arch", "batch_norm", "crop", "mean_rgb", "classes")
    return json.dumps({name: getattr(network, name) for name in names})


def _torchvision_state(network: Network) -> OrderedDict[str, Tensor]:
    _torchvision_name(network)  # refuses what torchvision does not have
    state, _ = to_torchvision(network.state, network.mean_rgb, network.std_rgb)
    return OrderedDict((name, value.contiguous()) for name, value in state.items())


def _torchvision_contents(network: Network) -> bytes:
    contents = _torchvision_state(network)
    # Where torch keeps versions of modules, and load_state_dict() does not mind more: for this project's own programs.
    described = {"classes": network.classes, "mean_rgb": network.mean_rgb}
    contents._metadata = {DESCRIPTION: described}  # type: ignore[attr-defined]  # as Module.state_dict() does
    file = io.BytesIO()
    torch.save(contents, file)
    return file.getvalue()


def _read_torchvision(network: Network, contents: bytes) -> Logits:
    return _in_torchvision(network, torch.load(io.BytesIO(contents), weights_only=True))


def _safetensors_contents(network: Network) -> bytes:
    from safetensors.torch import save  # not in requirements.txt

    # Its metadata are texts. Other programs look for "format", which says that these are torch's tensors.
    return save(_torchvision_state(network), {"format": "pt", DESCRIPTION: _description(network)})


def _read_safetensors(network: Network, contents: bytes) -> Logits:
    from safetensors.torch import load  # not in requirements.txt

    return _in_torchvision(network, load(contents))


def _in_torchvision(network: Network, state: dict[str, Tensor]) -> Logits:
    with torch.device("meta"):
        model = getattr(torchvision.models, _torchvision_name(network))(num_classes=network.outputs)
        if network.crop != _TORCHVISION_CROP:
            model.avgpool = nn.Identity()
            model.classifier[0] = nn.Linear(_fc6_inputs(network), 4096)
    model.to_empty(device="cpu").eval().load_state_dict(state)
    _, mean = to_torchvision(network.state, network.mean_rgb, network.std_rgb)
    return lambda pixels: model(normalize(pixels / 255, list(mean), list(TORCHVISION_STD)))


def _torchvision_usage(network: Network) -> str:
    _, mean = to_torchvision(network.state, network.mean_rgb, network.std_rgb)
    fc6 = ""
    if network.crop != _TORCHVISION_CROP:
        fc6 = f", avgpool = Identity(), classifier[0] = Linear({_fc6_inputs(network)}, 4096)"
    return (
        f"torchvision.models.{_torchvision_name(network)}(num_classes={network.outputs}){fc6}; images of {network.crop} "
        f"pixels, Normalize(mean=({', '.join(f'{value:.7g}' for value in mean)}), std={TORCHVISION_STD})"
    )


def _fc6_inputs(network: Network) -> int:
    return 512 * (network.crop // STRIDE) ** 2


def _exported(network: Network) -> torch.export.ExportedProgram:
    # An example of two images: of one, torch.export would conclude that there is always one.
    example = torch.zeros(2, 3, network.crop, network.crop)
    batch = {"images": {0: torch.export.Dim("batch")}}
    # Without the division: who uses the file has to know the mean alone.
    model = _evaluated(network.for_std(NOT_DIVIDED))
    return torch.export.export(model, (example,), dynamic_shapes=batch)


def _torch_export_contents(network: Network) -> bytes:
    file = io.BytesIO()
    torch.export.save(_exported(network), file, extra_files={"network.json": _description(network)})
    return file.getvalue()


def _read_torch_export(network: Network, contents: bytes) -> Logits:
    model = torch.export.load(io.BytesIO(contents)).module()
    return lambda pixels: model(_less_mean(network, pixels))


def _onnx_contents(network: Network) -> bytes:
    program = torch.onnx.export(
        _exported(network), dynamo=True, input_names=["images"], output_names=["logits"], verbose=False
    )
    assert program  # there is one with dynamo
    program.model.metadata_props["network"] = _description(network)
    return program.model_proto.SerializeToString()


def _read_onnx(network: Network, contents: bytes) -> Logits:
    import onnxruntime  # not in requirements.txt

    session = onnxruntime.InferenceSession(contents, providers=["CPUExecutionProvider"])

    def logits(pixels: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"images": _less_mean(network, pixels).numpy()})[0])

    return logits


def _program_usage(load: str) -> Callable[[Network], str]:
    def usage(network: Network) -> str:
        mean = ", ".join(f"{value:.7g}" for value in network.mean_rgb)
        return (
            f"{load}; images [batch, 3, {network.crop}, {network.crop}] of RGB pixels in 0–255 less the mean ({mean})"
        )

    return usage


FORMATS = {
    "torchvision": Format(_torchvision_contents, _read_torchvision, _torchvision_usage),
    "safetensors": Format(_safetensors_contents, _read_safetensors, _torchvision_usage, packages=("safetensors",)),
    "torch-export": Format(
        _torch_export_contents, _read_torch_export, _program_usage("torch.export.load(FILE).module()")
    ),
    "onnx": Format(
        _onnx_contents,
        _read_onnx,
        _program_usage("onnxruntime.InferenceSession(FILE)"),
        packages=("onnx", "onnxscript", "onnxruntime"),
    ),
}
