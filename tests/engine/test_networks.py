"""What a run starts from: networks of other runs and of torchvision, and the mean that comes with them."""

import argparse
import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from torchvision.transforms.v2 import functional

import train
from common.errors import UserError
from common.ranks import ranks_of_this_run
from engine.checkpoint import load
from engine.config import Config, parse_args
from engine.data import open_training_data
from engine.networks import Network, for_data, in_order_of, initial_network, load_network, start_from
from engine.precision import Precision
from engine.training import assembly
from model.vgg import build
from pipeline.dataset.manifest import open_manifest
from pipeline.preparation import statistics
from pipeline.preparation.statistics import find_statistics
from tests.support.images import photo_folder
from tests.support.launch import SMALL

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


@pytest.mark.seconds
def test_a_run_takes_the_data_sets_statistics_and_its_checkpoint_keeps_them(photos, photo_run):
    own, checkpoint = find_statistics(open_manifest(photos)), load(photo_run)
    assert own
    assert tuple(checkpoint.mean_rgb) == own.mean_rgb
    assert tuple(map(tuple, checkpoint.colour_shift)) == own.colour_shift


@pytest.mark.seconds
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
        for batches_of in (lambda data: data.train_batches(0), lambda data: data.validation_batches(data.viewing)[0]):
            (own, labels), (shifted, same_labels) = (
                next(batches_of(open_training_data(config, ranks, Precision("fp32", "cpu"), initial=network)))
                for network in (initial, other)
            )
            assert torch.equal(labels, same_labels)
            difference = torch.tensor(initial.mean_rgb) - torch.tensor(other.mean_rgb)
            assert torch.allclose(shifted - own, difference.view(1, 3, 1, 1).expand_as(own), atol=1e-4)


@pytest.mark.seconds
def test_weights_for_other_classes_replace_the_last_layer_and_begin_at_step_0(photo_run, tmp_path, capsys):
    flags = [*SMALL, "--weights", str(photo_run), "--lr", "1e-9", "--out", str(tmp_path / "run")]
    assert train.main([*flags, "--steps", "1"]) == 0
    said = capsys.readouterr().err
    new = "the last layer is new, since it knows 3 classes, the data set has 10"
    assert f"all layers but the last are those of {photo_run}; {new}" in said
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


@pytest.mark.seconds
def test_init_from_a(photos, photo_run, tmp_path, capsys):
    out = tmp_path / "B"
    flags = ["--arch", "B", *flags_for(photos, out), "--init-from", str(photo_run), "--lr", "1e-9"]
    assert train.main(flags) == 0
    captured = capsys.readouterr()
    copied = "features.0, features.5, features.10, features.12, classifier.0, classifier.3, classifier.6"
    kept = "the last layer too: its classes are the data set's"
    assert f"{copied} are those of {photo_run}, {kept}, the other layers are new (xavier)" in captured.err
    source, deeper = load_network(str(photo_run)).state, load(out / "last.pt").model
    origins = {"features.0": "features.0", "features.5": "features.3", "features.12": "features.8"}
    for ours, theirs in {**origins, "classifier.6": "classifier.6"}.items():
        assert torch.allclose(deeper[f"{ours}.weight"], source[f"{theirs}.weight"], atol=1e-6)
    assert json.loads(captured.out.splitlines()[-1])["steps"] == 2


@pytest.mark.seconds
def test_torchvisions_weights(tmp_path):
    """A at 32 pixels: the logits of torchvision's network behind torchvision's own preprocessing."""
    torch.manual_seed(0)
    reference = torchvision.models.vgg11(num_classes=7)
    reference.avgpool = torch.nn.Identity()
    reference.classifier[0] = torch.nn.Linear(512, 4096)
    torch.save(reference.eval().state_dict(), tmp_path / "vgg11.pth")
    network = load_network(f"torchvision:{tmp_path / 'vgg11.pth'}")
    assert (network.arch, network.batch_norm, network.crop, network.train_scale) == ("A", False, 32, None)
    assert (network.classes, network.outputs) == (None, 7)
    pixels = torch.randint(256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0)).float()
    theirs = functional.normalize(pixels / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    with torch.no_grad():
        expected = reference(theirs)
        assert expected.std() > 1e-3
        for own in (network, network.for_std((1.0, 1.0, 1.0)), network.for_std((40.0, 100.0, 127.5))):
            ours = pixels - torch.tensor(own.mean_rgb).view(1, 3, 1, 1)
            logits = own.build(CPU)(ours / torch.tensor(own.std_rgb).view(1, 3, 1, 1))
            assert torch.allclose(logits, expected, atol=1e-5), own.std_rgb
    assert all(torch.equal(network.state[name], weight) for name, weight in reference.state_dict().items())


TORCHVISION_STD = "58.395,57.12,57.375"


@pytest.mark.parametrize("std", ["1,1,1", TORCHVISION_STD])
@pytest.mark.seconds
def test_a_training_starts_with_torchvisions_logits_whatever_its_std(photos, tmp_path, std):
    """torchvision's network behind its own Normalize, and ours behind the loaders, training's and validation's."""
    torch.manual_seed(0)
    reference = torchvision.models.vgg11(num_classes=3)
    reference.avgpool = torch.nn.Identity()
    reference.classifier[0] = torch.nn.Linear(512, 4096)
    torch.save(reference.eval().state_dict(), tmp_path / "vgg11.pth")
    flags = ["--arch", "A", *flags_for(photos, tmp_path / "out"), "--weights", f"torchvision:{tmp_path / 'vgg11.pth'}"]
    config = parse_args([*flags, "--std", std])
    initial = initial_network(config)
    model = assembly.network_of(config, classes=3, device=CPU).eval()
    assert initial
    start_from(initial, model, config, ["class0", "class1", "class2"])
    if std == TORCHVISION_STD:
        assert all(torch.equal(model.state_dict()[name], value) for name, value in reference.state_dict().items())
    with ranks_of_this_run("cpu") as ranks:
        divided, whole = (
            open_training_data(some, ranks, Precision("fp32", "cpu"), initial=initial)
            for some in (config, dataclasses.replace(config, std="1,1,1"))
        )
        mean = torch.tensor(divided.mean_rgb).view(3, 1, 1)
        for batches_of in (lambda data: data.train_batches(0), lambda data: data.validation_batches(data.viewing)[0]):
            (images, _), (less_mean, _) = (next(batches_of(data)) for data in (divided, whole))
            seen = functional.normalize((less_mean + mean) / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
            with torch.no_grad():
                assert torch.allclose(model(images), reference(seen), atol=1e-5)


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
        (
            ["--weights", "torchvision:{run}"],
            "torchvision:{run}: it is a checkpoint of this trainer; give {run}, without torchvision:",
        ),
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


@pytest.mark.seconds
def test_the_std_of_a_run_is_kept_and_cannot_change_in_its_middle(photos, photo_run, tmp_path, capsys):
    flags = ["--arch", "A", *flags_for(photos, tmp_path / "run"), "--lr", "1e-9"]
    assert train.main([*flags, "--std", TORCHVISION_STD, "--weights", str(photo_run)]) == 0
    checkpoint, source = load(tmp_path / "run/last.pt"), load(photo_run)
    assert (checkpoint.std_rgb, source.std_rgb) == ([58.395, 57.12, 57.375], [1.0, 1.0, 1.0])
    assert source.ema
    first = source.ema["features.0.weight"] * torch.tensor(checkpoint.std_rgb).view(1, 3, 1, 1)
    assert torch.allclose(checkpoint.model["features.0.weight"], first, rtol=1e-5, atol=1e-6), "its results stay"
    capsys.readouterr()
    assert train.main([*flags, "--steps", "3"]) == 2
    said = "was trained with --std 58.395,57.12,57.375, this run asks for 1.0,1.0,1.0; choose another --out"
    assert said in capsys.readouterr().err
    assert train.main([*flags, "--steps", "3", "--std", "58.395, 57.12, 57.375"]) == 0
    assert load(tmp_path / "run/last.pt").steps == 3


LETTERS = ("a", "b", "c")


@pytest.fixture(scope="module")
def small() -> dict[str, torch.Tensor]:
    return build("A", classes=3, crop=32, dropout=0.5, init="xavier", device=CPU).state_dict()


def network_of(state: dict[str, torch.Tensor], classes: tuple[str, ...] | None) -> Network:
    return Network(
        name="net",
        arch="A",
        batch_norm=False,
        crop=32,
        classes=classes,
        mean_rgb=(1.0, 2.0, 3.0),
        train_scale=None,
        state=state,
    )


def numbered(count: int) -> dict[str, torch.Tensor]:
    """As much of a state as is asked for: output n has the weight and the bias n."""
    return {"classifier.6.weight": torch.arange(count)[:, None], "classifier.6.bias": torch.arange(count)}


TWELVE = [str(number) for number in range(12)]


@pytest.mark.parametrize(
    ("theirs", "ours", "order", "how"),
    [
        (("a", "b", "c"), ("a", "b", "c"), [0, 1, 2], "its classes are the data set's"),
        (("b", "c", "a"), ("a", "b", "c"), [2, 0, 1], "in another order, and so its outputs were reordered"),
        (sorted(TWELVE), sorted(TWELVE), list(range(12)), "its classes are the data set's"),
        # Without names: by number where the folders are the outputs' numbers, else by name.
        (None, sorted(TWELVE), [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9], "folder n, not for the nth one by name"),
        (None, TWELVE, list(range(12)), "output n is taken for the class folder n, not for the nth one by name"),
        (None, [f"{number:03}" for number in range(12)], list(range(12)), "output n is taken for the class folder n"),
        (None, ["cat", "dog", "emu"], [0, 1, 2], "sorted by name (cat, dog, emu)"),
        (None, ["dog", "cat"], [1, 0], "sorted by name"),
        (
            None,
            [f"c{number:02}" for number in range(12)],
            list(range(12)),
            "sorted by name (c00, c01, c02 and 9 more)",
        ),
        (None, [str(number) for number in range(1, 10)], list(range(9)), "sorted by name"),
        (None, ["7up", "12oz"], [1, 0], "sorted by name"),
    ],
)
def test_outputs_come_into_the_order_of_the_data_sets_classes(theirs, ours, order, how):
    network, said = in_order_of(network_of(numbered(len(ours)), theirs and tuple(theirs)), ours)
    assert network.classes == tuple(ours)
    assert network.state["classifier.6.weight"][:, 0].tolist() == network.state["classifier.6.bias"].tolist() == order
    assert how in said


@pytest.mark.parametrize(
    ("theirs", "ours", "sentence"),
    [
        (("cat", "dog"), ("audi", "saab"), "it knows the classes cat, dog, the data set has audi, saab"),
        (("cat", "dog"), ("cat", "emu"), "it knows the classes dog, the data set has emu"),
        (("cat", "dog"), ("cat", "dog", "emu"), "it knows 2 classes, the data set has 3"),
        (("0", "1"), ("cat", "dog"), "it knows the classes 0, 1, the data set has cat, dog"),
        (("é",), ("e\u0301",), r"it knows the classes '\xe9', the data set has 'e\u0301'"),
        (None, ("cat", "dog", "emu"), "it has 2 outputs without names, the data set has 3 classes"),
        (
            None,
            [str(number) for number in range(1, 13)],
            "come in one order by name (1, 10, 11 and 9 more) and in another by",
        ),
        (None, [f"class{number}" for number in range(11)], "one order by name (class0, class1, class10 and 8 more)"),
        (None, ["1", "01"], "come in one order by name (01, 1)"),
    ],
)
def test_classes_that_are_others_or_could_be_misread_are_refused(theirs, ours, sentence):
    outputs = 2 if len(ours) == 3 else len(ours)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        in_order_of(network_of(numbered(outputs), theirs), ours)
    cure = (
        "name the folders so that they sort in the order of its outputs" if "order" in sentence else "give the data set"
    )
    with pytest.raises(UserError, match=f"net: .*; {cure}"):
        for_data(network_of(numbered(outputs), theirs), ours, tell=False)


@pytest.mark.parametrize("config", [Config(arch="A", weights="net"), Config(arch="A", init_from="net")])
@pytest.mark.parametrize(
    ("theirs", "ours", "kept", "said"),
    [
        (LETTERS, LETTERS, [0, 1, 2], "the last layer too: its classes are the data set's"),
        (LETTERS, ("c", "b", "a"), [2, 1, 0], "the data set's in another order, and so its outputs were reordered"),
        (LETTERS, ("a", "b", "d"), None, "the last layer is new, since it knows the classes c, the data set has d"),
        (
            LETTERS,
            ("0", "1", "2"),
            None,
            "the last layer is new, since it knows the classes a, b, c, the data set has 0, 1, 2",
        ),
        (
            None,
            LETTERS,
            [0, 1, 2],
            "the last layer too: it has no class names; its outputs are taken for the classes sorted",
        ),
        (
            None,
            ("1", "2", "10"),
            None,
            "the last layer is new, since it has no class names, and the data set's classes come",
        ),
    ],
)
@pytest.mark.seconds
def test_the_last_layer_is_kept_only_for_the_same_classes(small, config, theirs, ours, kept, said):
    model = build("A", classes=3, crop=32, dropout=0.5, init="xavier", device=CPU, seed=1)
    fresh = model.state_dict()["classifier.6.weight"].clone()
    done = start_from(network_of(small, theirs), model, config, ours)
    assert said in done
    result = model.state_dict()
    assert torch.equal(result["classifier.6.weight"], small["classifier.6.weight"][kept] if kept else fresh)
    assert torch.equal(result["classifier.3.weight"], small["classifier.3.weight"])


@pytest.mark.parametrize(
    "write",
    [
        lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),  # as torchvision's own files
        lambda state, path: torch.save({"model": state, "args": argparse.Namespace(lr=0.1)}, path),  # as its trainings
        lambda state, path: pytest.importorskip("safetensors.torch").save_file(
            {name: value.contiguous() for name, value in state.items()}, path
        ),
    ],
)
def test_files_of_other_programs_are_read(small, tmp_path, write):
    write(small, tmp_path / "w.pth")
    network = load_network(f"torchvision:{tmp_path / 'w.pth'}")
    assert torch.equal(network.state["classifier.6.weight"], small["classifier.6.weight"])
    assert (network.classes, network.outputs) == (None, 3)


@pytest.mark.parametrize("described", ["[", "[" * 100_000, "3", '{"mean_rgb": [1, 2, 3], "classes": ["a"]}'])
def test_a_description_in_a_safetensors_file_that_is_not_its_networks(small, tmp_path, described):
    path = tmp_path / "w.safetensors"
    state = {name: value.contiguous() for name, value in small.items()}
    pytest.importorskip("safetensors.torch").save_file(state, path, {"vgg-dali": described})
    with pytest.raises(UserError, match="its class names or its mean are not those of its network; export it anew"):
        load_network(f"torchvision:{path}")


def test_without_its_package_a_safetensors_file_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    path = tmp_path / "w.safetensors"
    path.write_bytes((2).to_bytes(8, "little") + b"{}")
    for spec in (str(path), f"torchvision:{path}"):
        with pytest.raises(UserError, match=f"pip install safetensors, and give it as torchvision:{path}$"):
            load_network(spec)


def light(tensors: dict) -> dict:
    """The same names and shapes, each of one number, which takes a file of kilobytes."""
    return {name: torch.zeros((), dtype=value.dtype).expand(value.shape) for name, value in tensors.items()}


@pytest.fixture
def content(photo_run) -> dict:
    """Of a checkpoint that a run could go on from."""
    content = torch.load(photo_run, mmap=True)
    momenta = {number: state["momentum_buffer"] for number, state in content["optimizer"]["state"].items()}
    content["optimizer"]["state"] = {number: {"momentum_buffer": value} for number, value in light(momenta).items()}
    return {**content, "model": light(content["model"]), "ema": None}


@pytest.mark.parametrize(
    ("config", "trained", "tested"),
    [
        ({"train_scale": "36-73"}, (36, 73), 54),  # as older files have it
        ({"train_scale": "36-73", "crop_mode": "paper", "validation_scale": 40}, (36, 73), 40),
        ({"train_scale": "36", "crop_mode": "random-resized", "validation_scale": None}, None, 36),
        ({"train_scale": "36", "crop_mode": "random-resized", "validation_scale": 41}, None, 41),
        ({"train_scale": "16", "crop_mode": "random-resized"}, None, 36),
    ],
)
def test_a_network_is_tested_at_the_scale_of_its_trainings_validations(content, tmp_path, config, trained, tested):
    torch.save({**content, "config": config}, tmp_path / "last.pt")
    network = load_network(str(tmp_path / "last.pt"))
    assert (network.train_scale, network.test_scale) == (trained, tested)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"config": {}}, "its configuration names no train_scale that its network could have been trained at"),
        ({"config": {"train_scale": "16"}}, "its configuration names no train_scale that its network could have been"),
        ({"config": {"train_scale": "36", "validation_scale": 16}}, "its configuration's validation_scale is not a"),
        ({"config": {"train_scale": "36", "validation_scale": "64"}}, "its configuration's validation_scale is not a"),
        (
            {"arch": "D"},
            "holds the weights of A for 32 pixels and 3 classes, but says that they are those of D for 32 pixels",
        ),
        ({"classes": ["a", "b"]}, "holds the weights of A for 32 pixels and 3 classes, but says"),
        (
            {"model": {"features.0.weight": torch.ones(1)}},
            "these are not the weights of a VGG: its fully-connected layers",
        ),
    ],
)
def test_a_checkpoint_that_contradicts_itself_is_refused(content, tmp_path, change, sentence):
    path = tmp_path / "last.pt"
    torch.save({**content, **change}, path)
    with pytest.raises(UserError, match=f"checkpoint {path}: {sentence}"):
        load_network(str(path))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda content: content["model"].update({"classifier.6.bias": torch.ones(9)}), "they differ from those of A"),
        (
            lambda content: content["model"]["classifier.6.bias"].fill_(torch.nan),
            "its tensor model.classifier.6.bias holds",
        ),
        (
            lambda content: content["optimizer"].update(param_groups=[]),
            "its entry optimizer is not the state of this trainer's",
        ),
        (
            lambda content: content["optimizer"]["state"][0].update(momentum_buffer=torch.ones(3)),
            "its entry optimizer has a momentum that is not finite or does not fit",
        ),
        (
            lambda content: content["optimizer"]["state"][0].update(
                momentum_buffer=content["model"]["features.0.weight"].to(torch.float8_e4m3fn)
            ),
            "its entry optimizer has a momentum that is not finite or does not fit",
        ),
        (
            lambda content: content["optimizer"]["state"][3].update(
                momentum_buffer=torch.tensor([*[1.0] * 127, torch.nan])
            ),
            "its entry optimizer has a momentum that is not finite or does not fit",
        ),
        (
            lambda content: content.update(scaler={"scale": 1.0}),
            "its entry scaler is not the state of a gradient scaler",
        ),
        (lambda content: content["classes"].reverse(), "it has the data set's classes in another order"),
        (lambda content: content.update(classes=["x", "class1", "class2"]), "the classes x, the data set has class0"),
    ],
)
def test_a_run_does_not_go_on_from_what_would_fail_it_later_and_leaves_all_as_it_is(
    photos, content, tmp_path, capsys, change, sentence
):
    out = tmp_path / "run"
    out.mkdir()
    change(content)
    torch.save(content, out / "last.pt")
    before = (out / "last.pt").stat().st_mtime_ns
    assert train.main(["--arch", "A", *flags_for(photos, out)]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert "Traceback" not in said
    assert {path.name for path in out.iterdir()} <= {"last.pt", ".lock"}
    assert (out / "last.pt").stat().st_mtime_ns == before
