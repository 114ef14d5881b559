"""What a run starts from: networks of other runs and of torchvision, and the mean that comes with them."""

import json
from pathlib import Path

import pytest
import torch
import torchvision
from torchvision.transforms.v2 import functional

import train
from common.errors import UserError
from common.ranks import ranks_of_this_run
from engine.checkpoint import load
from engine.config import parse_args
from engine.data import open_data
from engine.networks import load_network
from engine.precision import Precision
from pipeline import statistics
from pipeline.manifest import open_manifest
from pipeline.statistics import find_statistics
from tests.images import photo_folder
from tests.runs import SMALL

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """A data set of three classes whose statistics are known."""
    folder = photo_folder(tmp_path_factory.mktemp("data") / "photos", train=13, val=4, classes=3)
    assert statistics.main([str(folder)]) == 0
    return folder


def flags_for(data: Path, out: Path) -> list[str]:
    flags = ["--data", str(data), "--crop", "32", "--train-scale", "32-64", "--batch-size", "6", "--schedule", "step"]
    return [*flags, "--lr", "0.001", "--steps", "2", "--out", str(out)]


@pytest.fixture(scope="module")
def photo_run(photos, tmp_path_factory) -> Path:
    """The checkpoint of two steps of A on them, with an average of the weights."""
    out = tmp_path_factory.mktemp("runs") / "photos"
    assert train.main(["--arch", "A", *flags_for(photos, out), "--ema", "0.5"]) == 0
    return out / "last.pt"


def test_a_run_takes_the_data_sets_statistics_and_its_checkpoint_keeps_them(photos, photo_run):
    own, checkpoint = find_statistics(open_manifest(photos)), load(photo_run)
    assert own
    assert tuple(checkpoint.mean_rgb) == own.mean_rgb
    assert tuple(map(tuple, checkpoint.colour_shift)) == own.colour_shift


def test_a_checkpoint_as_a_network(photo_run):
    network, checkpoint = load_network(str(photo_run)), load(photo_run)
    assert (network.arch, network.batch_norm, network.crop) == ("A", False, 32)
    assert network.classes == ("class0", "class1", "class2")
    assert network.train_scale == (32, 64)
    assert network.mean_rgb == tuple(checkpoint.mean_rgb)
    model = network.build(CPU)
    assert not model.training
    assert checkpoint.ema
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, checkpoint.ema[name])
    assert not torch.equal(checkpoint.ema["classifier.6.weight"], checkpoint.model["classifier.6.weight"])


def test_the_mean_of_the_initial_network_is_what_the_loader_subtracts(photos, photo_run):
    """Images of the same plan, with the mean of another network and with the data set's own: they differ by the means."""
    config = parse_args(["--arch", "A", *flags_for(photos, Path("none"))])
    initial = load_network(str(photo_run))
    other = type(initial)(**{**vars(initial), "mean_rgb": (10.0, 20.0, 30.0)})
    with ranks_of_this_run("cpu") as ranks:
        for batches_of in (lambda data: data.train_batches(0), lambda data: data.validation_batches()[0]):
            (own, labels), (shifted, same_labels) = (
                next(batches_of(open_data(config, ranks, Precision("fp32", "cpu"), initial=network)))
                for network in (initial, other)
            )
            assert torch.equal(labels, same_labels)
            difference = torch.tensor(initial.mean_rgb) - torch.tensor(other.mean_rgb)
            assert torch.allclose(shifted - own, difference.view(1, 3, 1, 1).expand_as(own), atol=1e-4)


def test_weights_for_other_classes_replace_the_last_layer_and_begin_at_step_0(photo_run, tmp_path, capsys):
    flags = [*SMALL, "--weights", str(photo_run), "--lr", "1e-9", "--out", str(tmp_path / "run")]
    assert train.main([*flags, "--steps", "1"]) == 0
    said = capsys.readouterr().err
    assert f"all layers but the last are those of {photo_run}; that one is new, since there are other classes" in said
    source, fine_tuned = load(photo_run), load(tmp_path / "run/last.pt")
    assert (fine_tuned.steps, fine_tuned.samples_seen) == (1, 12)
    assert fine_tuned.mean_rgb == source.mean_rgb, "its first layer has learnt with that one"
    assert source.ema
    for name, weight in fine_tuned.model.items():
        if name.startswith("classifier.6"):
            assert len(weight) == 10
        else:
            assert torch.allclose(weight, source.ema[name], atol=1e-6), name
    # Once there is a checkpoint, it is what counts.
    assert train.main([*flags, "--steps", "2", "--weights", "gone.pt"]) == 0
    assert "going on from" in capsys.readouterr().err
    assert load(tmp_path / "run/last.pt").mean_rgb == source.mean_rgb


def test_init_from_a(photos, photo_run, tmp_path, capsys):
    out = tmp_path / "B"
    flags = ["--arch", "B", *flags_for(photos, out), "--init-from", str(photo_run), "--lr", "1e-9"]
    assert train.main(flags) == 0
    captured = capsys.readouterr()
    copied = "features.0, features.5, features.10, features.12, classifier.0, classifier.3, classifier.6"
    assert f"{copied} are those of {photo_run}, the other layers are new (xavier)" in captured.err
    source, deeper = load_network(str(photo_run)).state, load(out / "last.pt").model
    origins = {"features.0": "features.0", "features.5": "features.3", "features.12": "features.8"}
    for ours, theirs in {**origins, "classifier.6": "classifier.6"}.items():
        assert torch.allclose(deeper[f"{ours}.weight"], source[f"{theirs}.weight"], atol=1e-6)
    assert json.loads(captured.out.splitlines()[-1])["steps"] == 2


def test_torchvisions_weights(tmp_path):
    """A at 32 pixels: the logits of torchvision's network behind torchvision's own preprocessing."""
    torch.manual_seed(0)
    reference = torchvision.models.vgg11(num_classes=7)
    reference.avgpool = torch.nn.Identity()
    reference.classifier[0] = torch.nn.Linear(512, 4096)
    torch.save(reference.eval().state_dict(), tmp_path / "vgg11.pth")
    network = load_network(f"torchvision:{tmp_path / 'vgg11.pth'}")
    assert (network.arch, network.batch_norm, network.crop, network.train_scale) == ("A", False, 32, None)
    assert network.classes == tuple("0123456")
    pixels = torch.randint(256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0)).float()
    theirs = functional.normalize(pixels / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    ours = pixels - torch.tensor(network.mean_rgb).view(1, 3, 1, 1)
    with torch.no_grad():
        expected, logits = reference(theirs), network.build(CPU)(ours)
    assert expected.std() > 1e-3
    assert torch.allclose(logits, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--arch", "B", "--weights", "{run}"],
            "--weights {run}: these are the weights of A for 32 pixels, the network",
        ),
        (["--batch-norm", "--weights", "{run}"], "--weights {run}: these are the weights of A for 32 pixels"),
        (["--arch", "B", "--init-from", "{text}"], "checkpoint {text}: damaged, or not a checkpoint of this trainer"),
        (["--weights", "torchvision:{text}"], "torchvision:{text}: damaged, or not a state dict"),
        (["--weights", "torchvision:none.pth"], "torchvision:none.pth: no such file"),
        (["--weights", "torchvision:{run}"], "torchvision:{run}: these are not the weights of a VGG"),
    ],
)
def test_networks_that_do_not_fit(photo_run, tmp_path, capsys, flags, message):
    text, out = tmp_path / "text.pt", tmp_path / "out"
    text.write_text("hello")
    places = {"run": photo_run, "text": text}
    assert train.main([*SMALL, "--steps", "1", "--out", str(out), *(flag.format(**places) for flag in flags)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"error: {message.format(**places)}" in captured.err
    assert not out.exists()


def test_a_network_that_is_not_there():
    with pytest.raises(UserError, match=r"checkpoint none\.pt: no such file$"):
        load_network("none.pt")


def test_batch_norm_cannot_come_or_go_in_the_middle_of_a_run(photos, photo_run, capsys):
    flags = ["--arch", "A", *flags_for(photos, photo_run.parent), "--batch-norm"]
    assert train.main(flags) == 2
    assert "was trained without --batch-norm, this run is with; choose another --out" in capsys.readouterr().err
