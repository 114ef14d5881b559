import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import predict
from tests.images import photographs
from tests.runs import ROOT
from tests.test_export import MEAN_RGB, trained

SIDES = [(40, 53), (40, 40), (61, 40)]


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("A"), "A")


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


def test_classes_of_imagenet_are_named_in_words():
    wordnet_ids = [f"n{number:08}" for number in range(1000)]
    assert predict.class_names(wordnet_ids)[:2] == ["tench", "goldfish"]
    assert predict.class_names([str(number) for number in range(1000)])[999] == "toilet tissue"
    assert predict.class_names(["cat", "dog"]) == ["cat", "dog"]


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
