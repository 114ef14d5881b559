"""Test protocols against PIL and torchvision, and averages against NumPy in float64."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms.v2 import functional

from common.errors import TrainingError
from common.ranks import Ranks
from engine.config import LoadingFlags
from engine.data import Data, Viewing, open_data
from engine.evaluation.inference import answers
from engine.evaluation.posteriors import LOST, POSTERIOR_SCALE, Weighted, count, digest, open_posteriors, pack
from engine.evaluation.protocols import PROTOCOLS, grid_corners, grid_crops, mean_over_views, parts_of, whole_image
from engine.evaluation.trials import posteriors_of
from engine.networks import Network
from engine.precision import Precision
from model.dense import Dense
from model.vgg import build
from pipeline.dataset.headers import Header
from pipeline.dataset.scan import build_table
from pipeline.dataset.table import FileTable
from pipeline.plan.samples import IMAGENET_MEAN_RGB
from pipeline.plan.whole_images import WholePlan
from tests.support.images import photographs
from tests.support.networks import Noting

CPU = torch.device("cpu")
RANKS = Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1, device=CPU, patient_group=None)
FP32 = Precision("fp32", "cpu")
CROP, CLASSES = 32, 7
MEAN = (120.0, 110.0, 100.0)
SIDES = ((48, 70), (70, 48), (48, 48), (48, 71), (48, 70), (60, 90))  # height, width


@pytest.fixture(scope="module")
def network():
    """A network whose posteriors differ between images and between crops."""
    model = build("A", classes=CLASSES, crop=CROP, dropout=0.5, init="kaiming", device=CPU, seed=3).eval()
    last = model.classifier[-1]
    assert isinstance(last, nn.Linear)
    last.weight.data *= 0.2
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    for split in ("train", "val"):
        for number, (height, width) in enumerate(SIDES):
            place = root / split / f"class{number % 2}"
            place.mkdir(parents=True, exist_ok=True)
            image = photographs()[number % 2].crop((40 * number, 0, 40 * number + 300, 300)).resize((width, height))
            image.save(place / f"{number}.png")
    return root


def data_of(folder: Path) -> Data:
    return open_data(str(folder), RANKS, FP32, LoadingFlags(), max_bad_images=None)


def viewing_at(scale: int) -> Viewing:
    return Viewing(crop=CROP, scale=scale, mean_rgb=IMAGENET_MEAN_RGB, std_rgb=(1, 1, 1), batch_size=8)


def whole_images(folder: Path, scale: int):
    """Row → the loader's image, float32 [3, height, width]; and the sizes of the batches."""
    data, viewing = data_of(folder), viewing_at(scale)
    batches, count = data.whole_batches(viewing, "val")
    images: dict[int, torch.Tensor] = {}
    sizes = []
    for batch, rows in batches:
        assert len(batch) == 1 or batch.numel() <= 3 * 8 * CROP**2
        sizes.append(tuple(batch.shape))
        images |= {
            int(row): image + torch.tensor(viewing.mean_rgb)[:, None, None]
            for row, image in zip(rows, batch, strict=True)
        }
    assert count == len(images) == len(SIDES)
    return images, sizes, data


def pil_image(data, row: int) -> Image.Image:
    return Image.open(data.manifest.val.path(row)).convert("RGB")


def pil_crops(image: Image.Image) -> torch.Tensor:
    """The 50 crops as anyone would write them: float32 [50, 3, CROP, CROP]."""
    crops = []
    for i in range(5):
        for j in range(5):
            top, left = (round(n * (side - CROP) / 4) for n, side in ((i, image.height), (j, image.width)))
            crop = image.crop((left, top, left + CROP, top + CROP))
            crops += [crop, functional.horizontal_flip(crop)]
    return torch.stack([functional.pil_to_tensor(crop).float() for crop in crops])


def normalised(images: torch.Tensor) -> torch.Tensor:
    return images - torch.tensor(MEAN)[:, None, None]


# At the images' own short side nothing is resized. PIL's antialiased resize and DALI's differ by a few grey levels.
@pytest.mark.parametrize(("scale", "tolerance"), [(48, 1e-3), (40, 2e-2)])
@pytest.mark.seconds
def test_multicrop_equals_fifty_crops_made_with_pil_and_torchvision(network, folder, scale, tolerance):
    images, _, data = whole_images(folder, scale)
    compute = posteriors_of(network, FP32)
    spread = []
    for row, image in images.items():
        original = pil_image(data, row)
        if scale == 48 and min(original.size) != scale:
            continue  # this one is resized
        rescaled = functional.resize(original, list(image.shape[1:]), antialias=True)
        with torch.no_grad():
            alone = network(normalised(pil_crops(rescaled))).double().softmax(1)
        views = PROTOCOLS["multicrop"].views(normalised(image)[None], CROP)
        ours = mean_over_views(compute, views, flip=True, pixels=20 * CROP**2)[0]
        assert len(views) == 25
        assert np.abs(ours.numpy() - alone.mean(0).numpy()).max() < tolerance
        spread.append(float(alone.std(0).max()))
    assert len(spread) >= 5
    assert max(spread) > 0.02, "the crops must differ for this to show anything"


def test_whole_images_are_batched_by_size_and_each_is_there_once(folder):
    _, sizes, _ = whole_images(folder, 48)
    assert sorted(sizes) == sorted([(1, 3, 70, 48), (1, 3, 48, 48), (1, 3, 48, 71), (1, 3, 48, 72), (2, 3, 48, 70)])


@pytest.mark.parametrize(("length", "corners"), [(32, [0] * 5), (36, [0, 1, 2, 3, 4]), (39, [0, 2, 4, 5, 7])])
def test_grid(length, corners):
    assert grid_corners(length, 32) == corners


def test_the_middle_of_the_grid_is_torchvisions_centre_crop():
    for height in range(32, 45):
        image = torch.randn(1, 3, height, 51)
        assert torch.equal(grid_crops(image, 32)[12], functional.center_crop(image, [32, 32]))


def test_dense_on_an_image_of_the_crops_size_is_the_plain_network(network):
    images = torch.randn(4, 3, CROP, CROP) * 60
    plain = mean_over_views(posteriors_of(network, FP32), whole_image(images, CROP), flip=False, pixels=10**6)
    dense = mean_over_views(posteriors_of(Dense(network), FP32), whole_image(images, CROP), flip=False, pixels=10**6)
    assert torch.allclose(dense, plain, atol=1e-6)


class Linear(nn.Module):
    """Logits that anyone can compute: of the first pixel."""

    def forward(self, images):
        return images[:, :, 0, 0]


@pytest.mark.parametrize("views_together", [1, 2, 3])
@pytest.mark.parametrize("flip", [False, True])
def test_posteriors_are_averaged_and_not_logits(flip, views_together):
    images = torch.randn(5, 3, 40, 44)
    posteriors, together = posteriors_of(Linear(), FP32), []

    def compute(batch):
        together.append(len(batch) // 5)
        return posteriors(batch)

    pixels = views_together * 5 * 32 * 32 + 5
    ours = mean_over_views(compute, grid_crops(images, 32), flip=flip, pixels=pixels)
    *others, last = together
    assert set(others) == {views_together}
    assert 1 <= last <= views_together
    seen = []
    for y in grid_corners(40, 32):
        for x in grid_corners(44, 32):
            for column in (x, x + 31) if flip else (x,):  # the first column of the crop, or of its mirror image
                exponential = np.exp(images[:, :, y, column].double().numpy())
                seen.append(exponential / exponential.sum(axis=1, keepdims=True))
    assert len(seen) == 25 * (1 + flip)
    assert np.allclose(ours, np.mean(seen, axis=0), atol=1e-6)
    assert math.isclose(float(ours.sum()), 5, rel_tol=1e-5)


def test_images_too_large_when_rescaled_are_named_and_in_no_batch(tmp_path, capsys):
    """1×60000 at Q = 36 would be 78 million pixels, and a network's activations 20 GB."""
    for split in ("train", "val"):
        (tmp_path / split / "class").mkdir(parents=True)
        for name, size in (("a", (60, 90)), ("b", (60_000, 1)), ("c", (1, 20_000)), ("d", (40, 2900))):
            photographs()[0].resize(size).save(tmp_path / split / f"class/{name}.png")
    batches, count = data_of(tmp_path).whole_batches(viewing_at(36), "val")
    said = capsys.readouterr().err
    assert (
        f"warning: {tmp_path}/val/class/b.png would have 2,160,000×36 pixels at a scale of 36, more than 4,194,304"
        in said
    )
    assert "class/c.png would have 36×720,000 pixels" in said
    assert "class/d.png" not in said
    assert count == 2
    assert sorted(int(row) for _, rows in batches for row in rows) == [0, 3]


def test_the_most_pixels_allow_long_images_at_any_scale():
    table = FileTable(Path("/"), build_table([("a", 0, Header(height=1, width=64, format="PNG"))] * 3))
    for scale, longest in ((32, 4096), (256, 64), (512, 16), (1024, 4), (4096, 4)):
        plan = WholePlan(table=table, scale=scale, pixels=1, mean_rgb=(0, 0, 0))
        assert plan.most_pixels == longest * scale**2
        assert plan.too_large.tolist() == ([] if longest >= 64 else [0, 1, 2])
        assert plan.images(rank=0, world_size=1) == (3 if longest >= 64 else 0)
        assert plan.largest_batch == 1


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_posteriors_are_computed_in_the_format_that_was_asked_for(name, dtype):
    network = Noting()
    with torch.no_grad():
        assert posteriors_of(network, Precision(name, "cpu"))(torch.ones(3, 4)).dtype == torch.float32
    assert network.dtypes == [dtype]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_logit_that_is_not_finite_leaves_an_image_without_posteriors(value):
    logits = torch.arange(12.0).reshape(3, 4)
    logits[1, 2] = value
    found = posteriors_of(lambda images: images, FP32)(logits)
    assert found[1].isnan().all()
    assert torch.allclose(found[[0, 2]], logits[[0, 2]].softmax(1))


@pytest.mark.parametrize("width", [1, 3])
def test_an_answer_with_one_value_that_is_not_finite_ends_the_program(folder, width):
    """Of one image in a batch of several, and named."""
    data = data_of(folder)
    some = network_of(CLASSES)

    def answers_of(batches):
        return list(answers(some, data, "val", iter(batches), 5, lambda images: images, "answers"))

    good = torch.rand(3, width)
    blocks = answers_of([(good, torch.tensor([4, -1, 0])), (good[:2], torch.tensor([1, 2]))])
    assert [block.rows.tolist() for block in blocks] == [[4, 0], [1, 2]]
    assert np.array_equal(blocks[0].values, good[[0, 2]].numpy())
    bad = good.clone()
    bad[1, width - 1] = math.nan
    assert len(answers_of([(bad, torch.tensor([4, -1, 0]))])) == 1, "of what fills up a batch it does not matter"
    with pytest.raises(TrainingError, match=r"its answer for .*/val/.* is not finite"):
        answers_of([(bad, torch.tensor([4, 3, 0]))])


def network_of(classes: int) -> Network:
    names = tuple(str(number) for number in range(classes))
    return Network(
        name="some", arch="A", batch_norm=False, crop=CROP, classes=names, mean_rgb=MEAN, train_scale=None, state={}
    )


def test_packed_posteriors_are_those_of_float16():
    """To half of its last bit; of a sure network, the other classes are told apart down to 2·10⁻¹²."""
    posteriors = torch.tensor([[1.0, 0.75, 1 / 3, 1e-4, 1e-9, 4e-12, 2e-12, 0.0]])
    packed = pack(posteriors)
    assert packed.dtype == torch.float16
    again = packed.double() / POSTERIOR_SCALE
    assert torch.allclose(again, posteriors.double(), rtol=2**-11, atol=1e-12)
    assert (again.diff() < 0).all()


def test_every_image_is_counted_of_however_many_there_are():
    """20 000 of them, against a stable sort of each by NumPy; those that are lost, and a second network with half the weight."""
    generator = np.random.default_rng(0)
    images, classes = 20_000, 9
    parts = [generator.integers(0, 40, (images, classes)).astype(np.float16) for _ in range(2)]  # with ties
    lost = [5, 8191, 8192, 19_999]
    parts[1][lost] = LOST
    labels = generator.integers(classes, size=images)
    hits = count(
        [Weighted(weight=1.0, posteriors=parts[0]), Weighted(weight=0.5, posteriors=parts[1])], labels, lost_before=3
    )
    order = np.argsort(-(parts[0] + 0.5 * parts[1].astype(float)), axis=1, kind="stable")
    right = order == labels[:, None]
    right[lost] = False
    assert (hits.images, hits.lost) == (images + 3, 7)
    assert (hits.top1, hits.top5) == (right[:, 0].sum(), right[:, :5].sum())
    assert hits.errors == pytest.approx((100 - 100 * hits.top1 / (images + 3), 100 - 100 * hits.top5 / (images + 3)))


@pytest.mark.parametrize("row", [0, 8191, 8192, 19_999])
@pytest.mark.parametrize("value", [np.nan, -2.0, np.inf, 40_000.0])
def test_a_file_with_one_number_that_is_no_posterior_is_not_used(tmp_path, row, value):
    posteriors = np.zeros((20_000, 3), dtype=np.float16)
    posteriors[7], posteriors[8, 1] = LOST, 2**15
    np.save(tmp_path / "some.npy", posteriors)
    found = open_posteriors(tmp_path / "some.npy", (20_000, 3))
    assert found is not None
    assert np.array_equal(found, posteriors)
    posteriors[row, 2] = value
    np.save(tmp_path / "some.npy", posteriors)
    assert open_posteriors(tmp_path / "some.npy", (20_000, 3)) is None


def test_protocols_are_those_of_the_paper():
    """Section 3.2: the dense network on whole images, and 5×5 crops of them; of each, the mirror image counts as well."""
    found = {name: (one.whole, one.dense, one.flip) for name, one in PROTOCOLS.items()}
    assert found == {
        "center": (False, False, False), "dense": (True, True, True), "multicrop": (True, False, True)
    }  # fmt: skip


def test_networks_that_compute_something_else_have_another_name():
    """By their layers, crop, mean, std, and every weight's name, shape, type and values."""
    one = dataclasses.replace(network_of(3), state={"a": torch.arange(6.0), "b": torch.ones(2)})
    others = [
        dataclasses.replace(one, **change)
        for change in (
            {"arch": "B"}, {"batch_norm": True}, {"crop": 64}, {"mean_rgb": (120.0, 110.0, 100.5)},
            {"std_rgb": (1.0, 1.0, 2.0)},
            {"state": {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}},
            {"state": {"a": torch.arange(6.0).half(), "b": torch.ones(2)}},
            {"state": {"a": torch.arange(6.0), "c": torch.ones(2)}},
            {"state": {"a": torch.arange(6.0), "b": torch.tensor([1.0, 1.0000001])}},
        )
    ]  # fmt: skip
    assert len({digest(network) for network in (one, *others)}) == 10
    same = dataclasses.replace(one, name="other", state=dict(reversed(one.state.items())))
    assert digest(same) == digest(one)


def test_a_protocol_is_itself_or_the_mean_of_two():
    assert {name: parts_of(name) for name in PROTOCOLS} == {name: [name] for name in PROTOCOLS}
    assert parts_of("multicrop+dense") == ["multicrop", "dense"]
