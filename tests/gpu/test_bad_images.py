"""JPEGs that are cut or destroyed after the scan: on the GPU's decoders the same are lost as on the CPU, and no other changes.

nvImageCodec calls what it gives to the JPEG engine good before the engine has decoded it (by its source), so a cut file could
pass there, with whatever was in the memory: that would be a wrong image without a word, and fails here by the file's name.
"""

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.dali.graph import GraphOptions
from pipeline.dali.loader import DaliLoader
from pipeline.dali.recovery import undecodable
from pipeline.dataset.manifest import open_manifest
from pipeline.dataset.table import Table
from pipeline.plan.samples import Samples
from pipeline.plan.training import TrainPlan
from tests.gpu.device import DECODERS_DIFFER_BY, DEVICE
from tests.support.images import photographs

pytestmark = pytest.mark.gpu

CPU = torch.device("cpu")
SIDE = 256  # of the images and of the crop: the window is the image, and a cut anywhere is within it
FORMS: dict[str, dict] = {
    "plain": {"subsampling": 2},
    "4-4-4": {"subsampling": 0},
    "progressive": {"progressive": True},
    "grey": {},
}
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut at a quarter": lambda content: content[: len(content) // 4],
    "cut in the middle": lambda content: content[: len(content) // 2],
    "cut near the end": lambda content: content[: -len(content) // 20],
    "without its end marker": lambda content: content[:-2],
    "cut in its header": lambda content: content[:100],
    "noise": lambda content: np.random.default_rng(0).bytes(len(content)),
    "empty": lambda content: b"",
}
DESTROYED: dict[str, Callable[[bytes], bytes]] = {
    "zeros up to its end marker": lambda content: (
        content[: len(content) // 2] + bytes(len(content) // 2) + content[-2:]
    ),
    "noise in its middle": lambda content: (
        content[: len(content) // 2] + np.random.default_rng(0).bytes(500) + content[len(content) // 2 + 500 :]
    ),
}
"""No decoder need find these, and what each makes of them is its own: they must not change the others of their batch."""


def encoded(image: Image.Image, form: str) -> bytes:
    file = io.BytesIO()
    (image.convert("L") if form == "grey" else image).save(file, "JPEG", quality=92, **FORMS[form])
    return file.getvalue()


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Table:
    """For each form and damage a good file, named as what becomes of it after the scan, and a good one that stays as it is."""
    root = tmp_path_factory.mktemp("photos")
    for split in ("train", "val"):
        (root / split / "class").mkdir(parents=True)
    photographs()[0].resize((SIDE, SIDE)).save(root / "val/class/0.JPEG")
    generator = np.random.default_rng(0)
    replaced = {}
    for form in FORMS:
        for damage, act in {**DAMAGES, **DESTROYED}.items():
            for what in (damage, f"good beside {damage}"):
                left, top = (int(place) for place in generator.integers(0, 100, size=2))
                content = encoded(photographs()[0].crop((left, top, left + SIDE, top + SIDE)), form)
                path = root / "train/class" / f"{form}, {what}.JPEG"
                path.write_bytes(content)
                if what == damage:
                    replaced[path] = act(content)
    train = open_manifest(root).train
    for path, content in replaced.items():
        path.write_bytes(content)
    return train


@pytest.fixture(scope="module")
def samples(table) -> Samples:
    plan = TrainPlan(table=table, batch_size=len(table), crop=SIDE, scale=(SIDE, SIDE), seed=0)
    return plan.samples(np.arange(len(table)))


@pytest.fixture(scope="module")
def names(table, samples) -> dict[int, str]:
    """Of the rows: form and damage."""
    return {int(row): Path(table.name(source)).stem for row, source in zip(samples.rows, samples.source, strict=True)}


@pytest.fixture(scope="module")
def lost_on_cpu(samples) -> set[int]:
    """Rows whose whole image the CPU cannot decode, each tried alone."""
    return {int(samples.rows[index]) for index in undecodable(samples, SIDE, None, whole=True)}


@pytest.fixture(scope="module")
def pixels_on_cpu(samples, names) -> dict[int, torch.Tensor]:
    """Of the good ones, without the others in their batch."""
    good = samples.take([index for index, row in enumerate(samples.rows) if ", good beside" in names[int(row)]])
    return delivered(good, CPU, decoder="cpu", hw_decoder_load=0.0)[0]


def delivered(
    samples: Samples, device: torch.device, *, decoder: str, hw_decoder_load: float, share: float = 0.5
) -> tuple[dict[int, torch.Tensor], set[int]]:
    """What a loader makes of a batch: the image of each row, [3, SIDE, SIDE] on the CPU, and the rows it says are lost."""
    lost: set[int] = set()

    def batches(skip: int) -> Iterator[Samples]:
        left = samples.take([index for index, row in enumerate(samples.rows) if int(row) not in lost])
        given.append(left.rows)
        for _ in range(10 - skip):
            yield left

    given: list[np.ndarray] = []
    loader = DaliLoader(
        batches,
        GraphOptions(crop=SIDE, device_id=device.index, decoder=decoder, hw_decoder_load=hw_decoder_load, threads=4),
        lose=lambda failed, dead, reasons: lost.update(failed.rows.tolist()),
        batch_size=len(samples.labels),
    )
    loader.share = share  # with decoder "split"
    images, _ = next(loader)
    return dict(zip(given[-1].tolist(), images.cpu().clone(), strict=True)), lost


def assert_same_as_on_cpu(
    name_of: Callable[[int], str],
    images: dict[int, torch.Tensor],
    lost: set[int],
    pixels_on_cpu: dict[int, torch.Tensor],
    lost_on_cpu: set[int],
    within: float,
) -> None:
    """No image that the CPU cannot decode is delivered, none of the others is missing or another one."""
    passed = sorted(name_of(row) for row in images.keys() & lost_on_cpu)
    assert not passed, f"wrong images without a word: {passed}"
    needless = sorted(name_of(row) for row in lost - lost_on_cpu)
    assert not needless, f"lost, though the CPU decodes them: {needless}"
    assert images.keys() == pixels_on_cpu.keys()
    for row, image in images.items():
        worst = (image - pixels_on_cpu[row]).abs().max().item()
        assert worst <= within, f"{name_of(row)}: {worst:.2f} levels from the CPU's"


@pytest.mark.parametrize("device", [CPU], ids=str)
def test_the_files_are_damaged_so_that_it_shows(names, lost_on_cpu, device):
    found = {names[row] for row in lost_on_cpu}
    assert {f"{form}, {damage}" for form in FORMS for damage in DAMAGES} <= found
    assert not any("good" in name for name in found)


@pytest.mark.parametrize(
    ("device", "decoder", "hw_decoder_load"),
    [
        pytest.param(CPU, "cpu", 0.0, id="cpu"),
        pytest.param(DEVICE, "cpu", 0.0, id="gpu, decoded on the cpu"),
        pytest.param(DEVICE, "gpu", 0.0, id="gpu without its engine"),
        pytest.param(DEVICE, "gpu", 1.0, id="gpu, all on its engine"),
        pytest.param(CPU, "split", 0.0, id="split, both on the cpu"),
        pytest.param(DEVICE, "split", 0.0, id="split"),
    ],
)
def test_the_same_images_are_lost_as_on_the_cpu(
    samples, names, lost_on_cpu, pixels_on_cpu, device, decoder, hw_decoder_load
):
    images, lost = delivered(samples, device, decoder=decoder, hw_decoder_load=hw_decoder_load)
    assert images.keys() | lost == set(names)
    destroyed = {row for row, name in names.items() if name.partition(", ")[2] in DESTROYED}
    images = {row: image for row, image in images.items() if row not in destroyed}
    within = 0.0 if device == CPU else DECODERS_DIFFER_BY
    assert_same_as_on_cpu(names.__getitem__, images, lost - destroyed, pixels_on_cpu, lost_on_cpu - destroyed, within)


@pytest.mark.parametrize("device", [CPU], ids=str)
def test_a_cut_image_that_passes_would_be_noticed(samples, lost_on_cpu, pixels_on_cpu, device):
    """As from a decoder that calls an image good before it has decoded it; and a good one that is another."""
    cut, good = min(lost_on_cpu), min(pixels_on_cpu)
    passed = {**pixels_on_cpu, cut: torch.zeros(3, SIDE, SIDE)}
    with pytest.raises(AssertionError, match=f"wrong images without a word: ..row {cut}"):
        assert_same_as_on_cpu(
            "row {}".format, passed, lost_on_cpu - {cut}, pixels_on_cpu, lost_on_cpu, DECODERS_DIFFER_BY
        )
    other = {**pixels_on_cpu, good: pixels_on_cpu[good].flip(2)}
    with pytest.raises(AssertionError, match=f"row {good}: .* levels from the CPU's"):
        assert_same_as_on_cpu("row {}".format, other, lost_on_cpu, pixels_on_cpu, lost_on_cpu, DECODERS_DIFFER_BY)
