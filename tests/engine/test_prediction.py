import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import predict
from tests.engine.test_export import MEAN_RGB, trained
from tests.support.images import photographs
from tests.support.launch import ROOT

SIDES = [(40, 53), (40, 40), (61, 40)]


STD = (40.0, 100.0, 57.0)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("A"), "A", std_rgb=STD)


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    for number, size in enumerate(SIDES):
        image = photographs()[number % 2].resize(size)
        image.save(folder / ("more/last.png" if number == 2 else f"{number}.png"))
    (folder / "notes.txt").write_text("no image")
    return folder


def probabilities_with_pil(model, path):
    """Of an image whose shorter side is 40 already: only the centre has to be cut out."""
    image = Image.open(path)
    left, top = (round((side - 32) / 2) for side in image.size)
    pixels = np.asarray(image.crop((left, top, left + 32, top + 32)), dtype=np.float32) - np.array(
        MEAN_RGB, dtype=np.float32
    )
    pixels /= np.array(STD, dtype=np.float32)
    with torch.no_grad():
        return model(torch.from_numpy(pixels).permute(2, 0, 1)[None]).softmax(dim=1)[0]


def run(capsys, *flags):
    code = predict.main([str(flag) for flag in flags])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_predictions_are_the_networks_own(network, images, capsys):
    model, checkpoint = network
    code, out, _ = run(capsys, "--checkpoint", checkpoint, "--scale", "40", images)
    assert code == 0
    results = json.loads(out.splitlines()[-1])
    assert [result["image"] for result in results["images"]] == [
        str(images / name) for name in ("0.png", "1.png", "more/last.png")
    ]
    for result in results["images"]:
        expected = probabilities_with_pil(model, result["image"])
        order = expected.argsort(descending=True).tolist()
        assert [best["class"] for best in result["predictions"]] == [("one", "two", "three")[label] for label in order]
        found = [best["probability"] for best in result["predictions"]]
        assert found == pytest.approx(expected[order].tolist(), abs=1e-3)
        assert f"{found[0]:7.2%}" in out


def test_json_only_and_the_scale_of_the_training(network, images, capsys):
    _, checkpoint = network
    code, out, _ = run(capsys, "--checkpoint", checkpoint, "--json", "--top", "2", images / "0.png")
    assert code == 0
    results = json.loads(out)
    assert results["scale"] == 36
    assert len(results["images"][0]["predictions"]) == 2


def test_an_image_that_cannot_be_decoded_does_not_take_the_others_along(network, images, capsys):
    cut = images / "cut.png"
    photographs()[0].save(cut)
    content = cut.read_bytes()
    cut.write_bytes(content[: len(content) // 2] + content[-12:])  # with its end marker: only the decoder finds out
    code, out, _ = run(
        capsys, "--checkpoint", network[1], images / "1.png", cut, images / "notes.txt", images / "0.png"
    )
    assert code == 1
    results = json.loads(out.splitlines()[-1])["images"]
    assert [bool(result["error"]) for result in results] == [False, True, True, False]
    assert [len(result["predictions"]) for result in results] == [3, 0, 0, 3]
    _, alone, _ = run(capsys, "--checkpoint", network[1], "--json", images / "0.png")
    assert results[3] == json.loads(alone)["images"][0]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["nowhere.jpg"], "nowhere.jpg: no such file"),
        ([], "no images; give files or folders"),
        (["."], "holds no images"),
        (["--top", "0", "x"], "--top 0: must be at least 1"),
        (["--scale", "31", "IMAGE"], "--scale 31: must be at least the network's crop, 32"),
        (["notes.txt"], "notes.txt: cannot be decoded (not an image)"),
    ],
)
def test_mistakes_are_told_in_a_sentence(network, images, capsys, monkeypatch, tmp_path, flags, sentence):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty" if flags == ["."] else images)
    code, out, err = run(capsys, "--checkpoint", network[1], *("0.png" if flag == "IMAGE" else flag for flag in flags))
    assert (code, out) == (2, "")
    assert sentence in err
    assert err.count("\n") == 1


def test_only_imagenets_own_ids_are_named_in_words(monkeypatch):
    """Which no installed package has: others take their place."""
    wordnet_ids = [f"n{number:08}" for number in range(1000)]
    numbers = [str(number) for number in range(1000)]
    for others in (wordnet_ids, numbers, sorted(numbers), ["cat", "dog"], ["\ud800"]):
        assert predict.class_names(others) == others
    monkeypatch.setattr(predict, "IMAGENET_IDS", hashlib.sha256("\n".join(wordnet_ids).encode()).hexdigest())
    assert predict.class_names(wordnet_ids)[:2] == ["tench", "goldfish"]
    assert predict.class_names(wordnet_ids[::-1])[-2:] == ["goldfish", "tench"]
    assert predict.class_names(wordnet_ids[:-1]) == wordnet_ids[:-1]


def without_names(model, path, count=3, change=lambda state: None):
    """The network as a state dict, of so many outputs."""
    state = dict(model.state_dict())
    for name in ("classifier.6.weight", "classifier.6.bias"):
        state[name] = state[name].repeat(*(-(-count // 3), 1)[: state[name].ndim])[:count].clone()
    change(state)
    torch.save(state, path)
    return f"torchvision:{path}"


@pytest.mark.parametrize(
    ("count", "shown", "said"),
    [
        (3, "output ", "it has no class names; its 3 outputs are shown by number"),
        (1000, "", "its 1000 outputs are taken for ImageNet's, as torchvision's own files have them"),
    ],
)
def test_outputs_without_names_are_not_shown_as_if_they_had_some(network, images, tmp_path, capsys, count, shown, said):
    spec = without_names(network[0], tmp_path / "w.pth", count)
    code, out, err = run(capsys, "--checkpoint", spec, "--scale", "40", "--json", images / "0.png")
    assert code == 0
    best = json.loads(out)["images"][0]["predictions"][0]
    assert best["class"] == (f"{shown}{best['label']}" if shown else predict.names_of_outputs(count)[best["label"]])
    assert f"{spec}: {said}" in err or said in err


def test_a_network_that_has_no_finite_answer_ends_it_with_the_images_name(network, images, tmp_path, capsys):
    def overflow(state):
        for name in ("features.0.weight", "classifier.0.weight", "classifier.3.weight", "classifier.6.weight"):
            state[name] = torch.full_like(state[name], 1e30)

    spec = without_names(network[0], tmp_path / "w.pth", change=overflow)
    code, out, err = run(capsys, "--checkpoint", spec, "--scale", "40", "--json", images / "0.png", images / "1.png")
    assert (code, out) == (1, "")
    assert f"{spec}: its answer for {images / '0.png'} is not finite; its weights, though finite, cannot be used" in err


def test_a_network_with_nan_in_it_is_refused_by_the_tensors_name(network, images, tmp_path, capsys):
    spec = without_names(
        network[0], tmp_path / "w.pth", change=lambda state: state["classifier.3.bias"].fill_(torch.nan)
    )
    code, out, err = run(capsys, "--checkpoint", spec, "--json", images / "0.png")
    assert (code, out) == (2, "")
    assert (
        err
        == f"error: {spec}: its tensor classifier.3.bias holds values that are not finite (NaN or infinity); it cannot be used\n"
    )


@pytest.mark.slow
def test_a_pipe_that_closes_ends_it_without_a_traceback(network, images):
    flags = ["--checkpoint", str(network[1]), "--scale", "40", str(images)]
    with subprocess.Popen(
        [sys.executable, "predict.py", *flags], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as started:
        assert started.stdout
        assert started.stderr
        started.stdout.close()
        assert "Traceback" not in started.stderr.read()
    assert started.returncode == 0
