import dataclasses
import json
from collections import OrderedDict

import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn
from torchvision.transforms.v2 import Normalize

import export
from common.errors import UserError
from engine import export as exporting
from engine.checkpoint import Checkpoint, save
from engine.networks import load_network
from model.vgg import build
from model.weights import TORCHVISION_MEAN, TORCHVISION_STD

MEAN_RGB = [120.5, 110.25, 99.0]
CLASSES = ["one", "two", "three"]


def trained(folder, arch, *, batch_norm=False, crop=32, std_rgb=(1.0, 1.0, 1.0)):
    """A network that no other is like, in evaluation mode, and its checkpoint."""
    model = build(
        arch, classes=3, crop=crop, dropout=0.5, init="kaiming", device=torch.device("cpu"), batch_norm=batch_norm
    )
    generator = torch.Generator().manual_seed(0)
    for name, value in model.state_dict().items():
        if name.endswith(("running_mean", "bias")):
            value.uniform_(-0.3, 0.3, generator=generator)
        elif name.endswith("running_var"):
            value.uniform_(0.5, 1.5, generator=generator)
    checkpoint = Checkpoint(
        arch=arch,
        crop=crop,
        classes=CLASSES,
        mean_rgb=MEAN_RGB,
        std_rgb=list(std_rgb),
        model=model.state_dict(),
        optimizer={},
        scaler={},
        steps=1,
        samples_seen=32,
        history=[],
        fingerprint="",
        config={"train_scale": "36"},
        world_size=1,
        batch_norm=batch_norm,
    )
    return model.eval(), save(checkpoint, folder, is_best=False, keep=1)


@pytest.fixture(scope="module")
def with_lrn(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("A-LRN"), "A-LRN")


def run(capsys, *flags):
    """export.py's exit code, its last line on stdout, and what it says."""
    code = export.main([str(flag) for flag in flags])
    said = capsys.readouterr()
    return code, json.loads(said.out.splitlines()[-1]) if code == 0 else None, said.err


def pixels(n, crop=32):
    return torch.randint(0, 256, (n, 3, crop, crop), generator=torch.Generator().manual_seed(n)).float()


def less_mean(images):
    return images - torch.tensor(MEAN_RGB).view(3, 1, 1)


def check_equal(run_theirs, model, crop=32):
    """In batches of other sizes than those that the program has tried."""
    for n in (1, 5):
        with torch.no_grad():
            expected = model(less_mean(pixels(n, crop)))
            assert expected.std() > 0.1
            torch.testing.assert_close(
                run_theirs(pixels(n, crop)), expected, rtol=0, atol=1e-5 * expected.abs().max().item()
            )


@pytest.mark.seconds
def test_torchvision_runs_what_was_written_for_it(tmp_path, capsys):
    model, checkpoint = trained(tmp_path, "B", batch_norm=True)
    file = tmp_path / "vgg13_bn.pth"
    code, results, said = run(capsys, "--checkpoint", checkpoint, "--format", "torchvision", "--output", file)
    assert code == 0
    theirs = torchvision.models.vgg13_bn(num_classes=3, init_weights=False)
    theirs.avgpool, theirs.classifier[0] = nn.Identity(), nn.Linear(512, 4096)  # as the usage says
    assert "vgg13_bn(num_classes=3), avgpool = Identity(), classifier[0] = Linear(512, 4096)" in said
    theirs.eval().load_state_dict(torch.load(file, weights_only=True))
    assert "Normalize(mean=(0.472549, 0.4323529, 0.3882353), std=(0.229, 0.224, 0.225))" in results["usage"]
    prepared = Normalize([value / 255 for value in MEAN_RGB], [0.229, 0.224, 0.225])
    check_equal(lambda images: theirs(prepared(images / 255)), model)


@pytest.mark.seconds
def test_what_was_written_for_torchvision_is_read_again_with_its_names_and_its_mean(tmp_path, capsys):
    model, checkpoint = trained(tmp_path, "A")
    file = tmp_path / "vgg11.pth"
    assert run(capsys, "--checkpoint", checkpoint, "--format", "torchvision", "--output", file)[0] == 0
    network = load_network(f"torchvision:{file}")
    assert network.classes == tuple(CLASSES)
    again = network.build(torch.device("cpu"))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (network.mean_rgb, network.std_rgb))
    check_equal(lambda images: again((images - mean) / std), model)
    contents = torch.load(file)
    contents._metadata["vgg-dali"]["classes"] = ("one", "two")
    torch.save(contents, file)
    with pytest.raises(UserError, match="its class names or its mean are not those of its network; export it anew"):
        load_network(f"torchvision:{file}")


@pytest.mark.parametrize("kind", ["torchvision", "torch-export", pytest.param("onnx", marks=pytest.mark.slow)])
@pytest.mark.seconds
def test_a_network_whose_images_are_divided_is_written_so_that_the_usage_holds(tmp_path, capsys, kind):
    """For torchvision with its own std, else without a division."""
    std = (40.0, 100.0, 57.0)
    model, checkpoint = trained(tmp_path, "A", std_rgb=std)
    file = tmp_path / "out"
    code, results, _ = run(capsys, "--checkpoint", checkpoint, "--format", kind, "--output", file)
    assert code == 0
    assert results["largest_difference"] < 1e-5
    if kind == "torchvision":
        assert "std=(0.229, 0.224, 0.225)" in results["usage"]
        theirs = torchvision.models.vgg11(num_classes=3, init_weights=False)
        theirs.avgpool, theirs.classifier[0] = nn.Identity(), nn.Linear(512, 4096)
        theirs.eval().load_state_dict(torch.load(file, weights_only=True))
        prepared = Normalize([value / 255 for value in MEAN_RGB], [0.229, 0.224, 0.225])

        def run_theirs(images):
            return theirs(prepared(images / 255))
    elif kind == "torch-export":
        program = torch.export.load(file).module()

        def run_theirs(images):
            return program(less_mean(images))
    else:
        session = onnxruntime.InferenceSession(file)

        def run_theirs(images):
            return torch.from_numpy(session.run(["logits"], {"images": np.asarray(less_mean(images))})[0])

    divisor = torch.tensor(std).view(3, 1, 1)
    for n in (1, 5):
        with torch.no_grad():
            expected = model(less_mean(pixels(n)) / divisor)
            assert expected.std() > 1e-3
            torch.testing.assert_close(run_theirs(pixels(n)), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_a_network_whose_images_are_divided_is_read_with_its_std(tmp_path):
    std = (40.0, 100.0, 57.0)
    _, checkpoint = trained(tmp_path, "A", std_rgb=std)
    network = load_network(str(checkpoint))
    assert network.std_rgb == std
    images = less_mean(pixels(3))
    with torch.no_grad():
        divided = network.build(torch.device("cpu"))(images / torch.tensor(std).view(3, 1, 1))
        whole = network.for_std((1.0, 1.0, 1.0)).build(torch.device("cpu"))(images)
    torch.testing.assert_close(whole, divided, rtol=0, atol=1e-5 * divided.abs().max().item())


@pytest.mark.seconds
def test_a_safetensors_file_is_torchvisions_state_with_names_and_mean(tmp_path, capsys):
    model, checkpoint = trained(tmp_path, "A", batch_norm=True)
    file = tmp_path / "vgg11_bn.safetensors"
    code, results, said = run(capsys, "--checkpoint", checkpoint, "--format", "safetensors", "--output", file)
    assert code == 0
    assert results["bytes"] == file.stat().st_size
    assert "torchvision.models.vgg11_bn(num_classes=3)" in said
    theirs = torchvision.models.vgg11_bn(num_classes=3, init_weights=False)
    theirs.avgpool, theirs.classifier[0] = nn.Identity(), nn.Linear(512, 4096)  # as the usage says
    theirs.eval().load_state_dict(safetensors.torch.load_file(file))
    prepared = Normalize([value / 255 for value in MEAN_RGB], [0.229, 0.224, 0.225])
    check_equal(lambda images: theirs(prepared(images / 255)), model)
    with safetensors.safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    assert metadata["format"] == "pt"
    assert json.loads(metadata["vgg-dali"])["classes"] == CLASSES
    network = load_network(f"torchvision:{file}")
    assert (network.classes, network.crop) == (tuple(CLASSES), 32)
    again = network.for_std((1.0, 1.0, 1.0)).build(torch.device("cpu"))
    check_equal(lambda images: again(images - torch.tensor(network.mean_rgb).view(3, 1, 1)), model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.seconds
def test_a_file_in_16_bits_goes_through(tmp_path, capsys, dtype):
    """Its own first convolution, too."""
    model, _ = trained(tmp_path, "A")
    source, file = tmp_path / "theirs.pth", tmp_path / "again.pth"
    torch.save({name: value.to(dtype) for name, value in model.state_dict().items()}, source)
    code, results, _ = run(capsys, "--checkpoint", f"torchvision:{source}", "--format", "torchvision", "--output", file)
    assert code == 0
    assert results["classes"] == 3
    again = torch.load(file, weights_only=True)
    for name, value in torch.load(source).items():
        assert torch.equal(again[name].to(dtype), value), name


@pytest.mark.seconds
def test_torch_export_runs_what_was_written_for_it(tmp_path, capsys, with_lrn):
    model, checkpoint = with_lrn
    file = tmp_path / "a_lrn.pt2"
    code, results, _ = run(capsys, "--checkpoint", checkpoint, "--format", "torch-export", "--output", file)
    assert code == 0
    assert results["bytes"] == file.stat().st_size
    assert results["largest_difference"] < 1e-5
    extra_files = {"network.json": ""}
    program = torch.export.load(file, extra_files=extra_files).module()
    check_equal(lambda images: program(less_mean(images)), model)
    assert json.loads(extra_files["network.json"]) == {
        "arch": "A-LRN",
        "batch_norm": False,
        "crop": 32,
        "mean_rgb": MEAN_RGB,
        "classes": CLASSES,
    }


@pytest.mark.slow
def test_onnxruntime_runs_what_was_written_for_it(tmp_path, capsys):
    """With every kind of layer that there is."""
    model, checkpoint = trained(tmp_path, "A-LRN", batch_norm=True)
    file = tmp_path / "network.onnx"
    assert run(capsys, "--checkpoint", checkpoint, "--format", "onnx", "--output", file)[0] == 0
    assert sorted(entry.suffix for entry in tmp_path.iterdir()) == [".onnx", ".pt", ".pt"]  # no weights beside it
    session = onnxruntime.InferenceSession(file)

    def run_theirs(images):
        return torch.from_numpy(session.run(["logits"], {"images": np.asarray(less_mean(images))})[0])

    check_equal(run_theirs, model)
    description = json.loads(session.get_modelmeta().custom_metadata_map["network"])
    assert (description["arch"], description["mean_rgb"], description["classes"]) == ("A-LRN", MEAN_RGB, CLASSES)


@pytest.mark.slow
@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_file_of_torchvisions_goes_through_unchanged(tmp_path, capsys, batch_norm):
    """At 224 pixels, into torchvision's own network as it is; its classes have no names."""
    theirs = getattr(torchvision.models, "vgg16" + "_bn" * batch_norm)(num_classes=5)
    source, file = tmp_path / "theirs.pth", tmp_path / "again.pth"
    torch.save(OrderedDict(theirs.state_dict()), source)
    code, results, _ = run(capsys, "--checkpoint", f"torchvision:{source}", "--format", "torchvision", "--output", file)
    assert code == 0
    assert results["mean_rgb"] == pytest.approx([255 * value for value in TORCHVISION_MEAN])
    assert f"Normalize(mean={TORCHVISION_MEAN}, std={TORCHVISION_STD})" in results["usage"]
    again = torch.load(file, weights_only=True)
    assert again.keys() == theirs.state_dict().keys()
    for name, weight in theirs.state_dict().items():
        assert torch.equal(again[name], weight), name
    theirs.load_state_dict(again)


def test_what_torchvision_does_not_have_is_refused(tmp_path, capsys, with_lrn):
    file = tmp_path / "network.pth"
    file.write_text("before")
    code, _, said = run(capsys, "--checkpoint", with_lrn[1], "--format", "torchvision", "--output", file)
    assert code == 2
    assert said == (
        "error: torchvision has no network of configuration A-LRN; choose --format torch-export or --format onnx\n"
    )
    assert file.read_text() == "before"
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_with_other_logits_is_not_written(tmp_path, capsys, monkeypatch, with_lrn):
    file = tmp_path / "network.pt2"
    file.write_text("before")
    real = exporting.FORMATS["torch-export"]

    def forgets_lrn(network):
        return real.contents(dataclasses.replace(network, arch="A"))

    monkeypatch.setitem(exporting.FORMATS, "torch-export", real._replace(contents=forgets_lrn))
    code, _, said = run(capsys, "--checkpoint", with_lrn[1], "--format", "torch-export", "--output", file)
    assert code == 1
    assert "as torch-export gives other logits, by" in said
    assert file.read_text() == "before"
    assert list(tmp_path.iterdir()) == [file]


def test_missing_packages_are_named_with_the_command_that_installs_them(tmp_path, capsys, monkeypatch, with_lrn):
    monkeypatch.setattr(exporting, "find_spec", lambda package: None if package == "onnxruntime" else package)
    code, _, said = run(capsys, "--checkpoint", with_lrn[1], "--format", "onnx", "--output", tmp_path / "network.onnx")
    assert code == 2
    assert said == ("error: --format onnx needs onnxruntime: python -m pip install onnx onnxscript onnxruntime\n")


def test_a_place_that_cannot_be_written_is_said_in_one_sentence(tmp_path, capsys, with_lrn):
    for output, reason in ((tmp_path / "none" / "network.pt2", "No such file"), (tmp_path, "Is a directory")):
        code, _, said = run(capsys, "--checkpoint", with_lrn[1], "--format", "torch-export", "--output", output)
        assert code == 2
        assert said.startswith(f"error: --output {output}: cannot be written ({reason}")
        assert said.count("\n") == 1


def test_the_checkpoint_is_not_written_over(capsys, with_lrn):
    checkpoint = with_lrn[1]
    before = checkpoint.stat().st_mtime_ns
    code, _, said = run(capsys, "--checkpoint", checkpoint, "--format", "torch-export", "--output", checkpoint)
    assert (code, said) == (2, f"error: --output {checkpoint}: is the checkpoint itself; choose another name\n")
    assert checkpoint.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--format", "caffe"], "invalid choice 'caffe' for argument '--format'"),
        (["--format", "onnx"], "--checkpoint"),
        (["--checkpoint", "none.pt", "--format", "onnx", "--output", "x"], "checkpoint none.pt: no such file"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(capsys, flags, sentence):
    code, _, said = run(capsys, *flags)
    assert code == 2
    assert said.startswith("error: ")
    assert sentence in said
    assert said.count("\n") == 1
