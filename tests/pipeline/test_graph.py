"""The graph's images against independent ways of making them, and the GPU graph's structure without a GPU."""

import numpy as np
import pytest
import torch
from nvidia.dali import fn, pipeline_def, types
from PIL import Image

from pipeline.dali import graph
from pipeline.dali.graph import GraphOptions, first_of, image_pipeline
from pipeline.dali.loader import DaliLoader
from pipeline.dataset.manifest import open_manifest
from pipeline.plan.samples import Samples, rescaled_sizes
from pipeline.plan.training import RandomResized, TrainPlan
from pipeline.plan.validation import ValidationPlan
from tests.support.images import photo_folder

CPU = torch.device("cpu")
CROP = 224


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return open_manifest(photo_folder(tmp_path_factory.mktemp("photos"), train=100, val=10)).train


def run_graph(samples: Samples, crop: int | None = CROP, *, half: bool = False, **options) -> np.ndarray:
    """The loader's images for these samples: float32 or, half, float16 [n, height, width, 3]. crop: None for whole images."""
    loader = DaliLoader(
        lambda skip: iter([samples] * 4),
        GraphOptions(crop=crop, half=half, threads=2, prefetch=1, **options),
        lose=lambda *lost: pytest.fail("lost an image"),
        batch_size=len(samples.labels),
    )
    images, labels = next(loader)
    assert np.array_equal(labels.numpy(), samples.labels)
    return images.permute(0, 2, 3, 1).numpy()


def corners_of(samples: Samples, sizes: np.ndarray, outs: np.ndarray) -> np.ndarray:
    return np.rint((samples.start + np.minimum(samples.roi_start, samples.roi_end)) * outs / sizes).astype(int)


def decode_all(path: str) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def path_of(name: np.ndarray) -> str:
    return bytes(name).decode()


@pytest.fixture(scope="module")
def planned(table):
    """100 random plans over 100 photographs, grey, CMYK and EXIF-rotated ones among them, and what they ask for."""
    plan = TrainPlan(table=table, batch_size=100, crop=CROP, scale=(224, 512), seed=1, mean_rgb=(0.0, 0.0, 0.0))
    samples = plan.samples(np.arange(100))
    _, rows = plan.epochs_and_rows(np.arange(100))
    sizes = table.read(rows).sizes
    ratio = np.abs(samples.roi_end - samples.roi_start).astype(float) / CROP
    outs = np.rint(sizes / ratio).astype(int)
    assert outs.min() >= CROP
    images = run_graph(samples) + samples.mean[:, None, None, :]
    images[samples.flipped] = images[samples.flipped, :, ::-1]
    assert 30 < samples.flipped.sum() < 70
    return samples, sizes, outs, images


def test_crops_equal_decoding_everything_resizing_and_cropping_in_dali(planned):
    samples, sizes, outs, images = planned
    corners = corners_of(samples, sizes, outs)

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def usual():
        name, size, start = fn.external_source(
            lambda info: (
                samples.source[info.idx_in_epoch],
                outs[info.idx_in_epoch].astype(np.float32),
                corners[info.idx_in_epoch].astype(np.int32),
            ),
            num_outputs=3,
            batch=False,
            batch_info=False,
        )
        image = fn.decoders.image(fn.io.file.read(name), output_type=types.RGB, adjust_orientation=False)
        whole = fn.resize(image, size=size, subpixel_scale=False, antialias=True, dtype=types.FLOAT)
        return fn.slice(whole, start=start, shape=[CROP, CROP], axes=[0, 1])

    pipeline = usual(prefetch_queue_depth=1)
    worst = total = 0.0
    for image in images:
        (reference,) = pipeline.run()
        difference = np.abs(np.rint(np.asarray(reference[0])) - np.rint(image))
        worst, total = max(worst, difference.max()), total + difference.mean()
    assert worst <= 1
    assert total / len(images) < 1e-3


def test_crops_equal_torchvisions_antialiased_resize_and_crop(planned):
    from torchvision.transforms.v2.functional import resize

    samples, sizes, outs, images = planned
    corners = corners_of(samples, sizes, outs)
    worst = total = 0.0
    for name, out, (y, x), image in zip(samples.source, outs, corners, images, strict=True):
        whole = torch.from_numpy(decode_all(path_of(name)).copy()).permute(2, 0, 1)
        resized = resize(whole, [int(out[0]), int(out[1])], antialias=True)
        reference = resized[:, y : y + CROP, x : x + CROP].permute(1, 2, 0).numpy()
        difference = np.abs(reference - image)
        worst, total = max(worst, difference.max()), total + difference.mean()
    assert worst <= 3
    assert total / len(images) < 0.3


def test_random_resized_crops_equal_torchvisions_resized_crop(table):
    from torchvision.transforms.v2.functional import resized_crop

    plan = TrainPlan(table=table, batch_size=100, crop=CROP, scale=(256, 256), seed=1, random_resized=RandomResized())
    samples = plan.samples(np.arange(100))
    images = run_graph(samples) + samples.mean[:, None, None, :]
    images[samples.flipped] = images[samples.flipped, :, ::-1]
    assert 30 < samples.flipped.sum() < 70
    worst = worst_within = total = 0.0
    for name, (y, x), (height, width), image in zip(
        samples.source, samples.start.tolist(), samples.shape.tolist(), images, strict=True
    ):
        whole = torch.from_numpy(decode_all(path_of(name)).copy()).permute(2, 0, 1)
        reference = resized_crop(whole, y, x, height, width, [CROP, CROP], antialias=True).permute(1, 2, 0).numpy()
        difference = np.abs(reference - image)
        worst, total = max(worst, difference.max()), total + difference.mean()
        worst_within = max(worst_within, difference[2:-2, 2:-2].max())
    assert worst_within <= 2
    # Beyond the border DALI's filter sees the outermost pixel again, torchvision's sees nothing.
    assert worst <= 16
    assert total / len(images) < 0.3


def test_a_random_resized_crop_of_the_right_size_is_not_resized(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        pixels = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / split / "a/x.png")
    crops = RandomResized(area=(1.0, 1.0), aspect=(1.0, 1.0))
    plan = TrainPlan(
        table=open_manifest(tmp_path).train, batch_size=8, crop=64, scale=(64, 64), seed=0, random_resized=crops
    )
    samples = plan.samples(np.arange(8))
    images = run_graph(samples, crop=64) + samples.mean[:, None, None, :]
    assert not samples.resized.any()
    assert 0 < samples.flipped.sum() < 8
    for image, flipped in zip(images, samples.flipped, strict=True):
        assert np.abs(image - (pixels[:, ::-1] if flipped else pixels)).max() < 1e-3


@pytest.mark.parametrize("random_resized", [None, RandomResized()])
def test_whole_images_that_are_cut_equal_windows_that_are_decoded(table, random_resized):
    """Decoding whole images is what the GPU's decoder does."""
    plan = TrainPlan(table=table, batch_size=20, crop=CROP, scale=(256, 256), seed=0, random_resized=random_resized)
    samples = plan.samples(np.arange(20))
    pipelines = [
        image_pipeline(
            lambda: (samples.source, *samples.inputs()),
            GraphOptions(crop=CROP, threads=2, prefetch=1),
            from_files=True,
            batch_size=20,
            whole=whole,
        )
        for whole in (False, True)
    ]
    windows, cut = (np.stack([np.asarray(image) for image in pipeline.run()[0]]) for pipeline in pipelines)
    difference = np.abs(windows - cut)
    assert difference.max() <= 1
    assert difference.mean() < 1e-3


@pytest.mark.parametrize("share", [0, 0.3, 1])
def test_a_batch_that_two_decoders_share_is_in_order_and_each_image_its_decoders(table, share, monkeypatch):
    """Without a GPU both are the CPU's; so that it shows which of them has an image, the second one's pixels are halved."""
    samples = TrainPlan(table=table, batch_size=20, crop=CROP, scale=(256, 256), seed=0).samples(np.arange(20))

    def images(decoder: str, *more: np.ndarray) -> np.ndarray:
        pipeline = image_pipeline(
            lambda: (samples.source, *samples.inputs(), *more),
            GraphOptions(crop=CROP, decoder=decoder, threads=2, prefetch=1),
            from_files=True,
            batch_size=20,
            whole=True,
        )
        made, labels = pipeline.run()
        assert np.array_equal(np.stack([np.asarray(label) for label in labels]), samples.labels)
        return np.stack([np.asarray(image) for image in made]) + samples.mean[:, None, None]

    first = first_of(20, share)
    assert first.sum() == round(share * 20)
    whole = images("cpu")
    assert np.array_equal(images("split", first), whole)
    decode, calls = graph._decode, []

    def decode_or_halve(*args, **settings):
        calls.append(settings)
        pixels = decode(*args, **settings)
        return pixels if len(calls) == 1 else fn.cast(pixels * 0.5, dtype=types.UINT8)

    monkeypatch.setattr(graph, "_decode", decode_or_halve)
    shared = images("split", first)
    assert len(calls) == 2
    assert np.array_equal(shared[first], whole[first])
    assert np.abs(shared - whole / 2)[~first].max(initial=0) < 2
    assert (whole.mean(axis=(1, 2, 3)) > 20).all()


def test_the_share_of_a_loader_holds_from_the_next_batch_that_is_prepared(table, monkeypatch):
    samples = TrainPlan(table=table, batch_size=10, crop=32, scale=(36, 36), seed=0).samples(np.arange(10))
    shares: list[float] = []

    def noted(count: int, share: float) -> np.ndarray:
        shares.append(share)
        return first_of(count, share)

    monkeypatch.setattr("pipeline.dali.loader.first_of", noted)
    loader = DaliLoader(
        lambda skip: iter([samples] * 12),
        GraphOptions(crop=32, decoder="split", prefetch=3),
        lose=lambda *lost: pytest.fail("lost an image"),
        batch_size=10,
    )
    loader.share = 0.7
    next(loader)
    ahead = len(loader._in_flight)
    assert ahead <= 3, "as many as are prefetched"
    loader.share = 0.2
    next(loader)
    assert shares == [0.7] * (1 + ahead) + [0.2]


def test_validation_equals_pil_resize_and_centre_crop(table):
    samples = next(
        ValidationPlan(table=table, crop=CROP, scale=256).batches(rank=0, world_size=1, batch_size=len(table))
    )
    images = run_graph(samples) + samples.mean[:, None, None, :]
    sizes = table.read(np.arange(len(table))).sizes
    outs = rescaled_sizes(sizes, np.full(len(table), 256))
    for name, (height, width), image in zip(samples.source, outs, images, strict=True):
        resized = Image.open(path_of(name)).convert("RGB").resize((int(width), int(height)), Image.Resampling.BILINEAR)
        y, x = round((height - CROP) / 2), round((width - CROP) / 2)
        difference = np.abs(np.asarray(resized)[y : y + CROP, x : x + CROP] - image)
        assert difference.max() <= 3
        assert difference.mean() < 0.5


def test_mean_is_subtracted_and_the_image_flipped_as_asked(table):
    plan = TrainPlan(table=table, batch_size=8, crop=CROP, scale=(256, 256), seed=0)
    samples = plan.samples(np.arange(8))
    assert samples.resized.all()
    first, last = np.minimum(samples.roi_start, samples.roi_end), np.maximum(samples.roi_start, samples.roi_end)
    plain = samples._replace(roi_start=first, roi_end=last, mean=np.zeros_like(samples.mean))
    flipped = samples._replace(
        roi_start=np.stack((first[:, 0], last[:, 1]), axis=1), roi_end=np.stack((last[:, 0], first[:, 1]), axis=1)
    )
    difference = np.abs(run_graph(flipped) - (run_graph(plain)[:, :, ::-1] - samples.mean[:, None, None, :]))
    assert difference.max() < 1 + 1e-4, "one level, where the sum of a pixel's weights rounds the other way"
    assert difference.mean() < 1e-3


@pytest.mark.parametrize("crop", [CROP, None])
def test_each_colour_is_divided_by_its_std_after_the_mean_is_subtracted(table, crop):
    """Crops and whole images go different ways."""
    samples = TrainPlan(table=table, batch_size=8, crop=CROP, scale=(256, 256), seed=0).samples(np.arange(8))
    plain = run_graph(samples, crop=crop)
    divided = run_graph(samples, crop=crop, std_rgb=(58.395, 2.0, 127.5))
    assert np.allclose(divided, plain / np.array([58.395, 2.0, 127.5], dtype=np.float32), rtol=1e-6, atol=1e-6)
    assert np.abs(plain).max() > 50


def test_half_images_are_the_others_in_float16(table):
    """Where they are whole: for crops on a CPU, DALI has no float16."""
    samples = TrainPlan(table=table, batch_size=8, crop=CROP, scale=(256, 256), seed=0).samples(np.arange(8))
    images, halves = run_graph(samples, crop=None), run_graph(samples, crop=None, half=True)
    assert (images.dtype, halves.dtype) == (np.float32, np.float16)
    assert np.allclose(images.astype(np.float16), halves, atol=0.13), "the last place of numbers up to 256"
    assert np.abs(images - run_graph(samples)).max() < 1e-3, "whole images and crops go different ways"


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (3, 2), (2000, 17)])
def test_images_of_odd_shapes_go_through(tmp_path, size):
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.new("RGB", size, (200, 100, 50)).save(tmp_path / split / "a/x.png")
    table = open_manifest(tmp_path).train
    samples = TrainPlan(
        table=table, batch_size=4, crop=64, scale=(64, 96), seed=0, mean_rgb=(200.0, 100.0, 50.0)
    ).samples(np.arange(4))
    images = run_graph(samples._replace(mean=np.tile(np.array([200, 100, 50], dtype=np.float32), (4, 1))), crop=64)
    assert images.shape == (4, 64, 64, 3)
    assert np.abs(images).max() < 1e-3


HEADER = ("PeekImageShape", "_TensorSubscript", "_Shape", "_ArithmeticGenericOp", "Reshape")
"""What sees to it that a header can be read before the decoder has it."""


def gpu_graph(decoder: str):
    """Without a GPU it can be built, if not run."""
    pipeline = image_pipeline(
        lambda: (),
        GraphOptions(crop=CROP, device_id=0, decoder=decoder, half=True, hw_decoder_load=0.25),
        from_files=True,
        batch_size=2,
    )
    pipeline._build_graph()
    return pipeline


def inspect_gpu_graph(decoder: str):
    """The GPU graph: its operators with their devices, the devices of their inputs, and of the outputs."""
    pipeline = gpu_graph(decoder)
    named = [(type(op._op).__name__, op) for op in pipeline._ops]
    operators = {name: op for name, op in named if name not in ("ExternalSource", "Split", "Merge", *HEADER)}
    assert all(op._op._device == "cpu" for name, op in named if name in HEADER)
    assert [op._op._device for name, op in named if name == "Merge"] == ["gpu"], "of those resized with those not"
    assert sorted(op._op._device for name, op in named if name == "Split") == ["cpu"] * 3 + ["gpu"], (
        "images, their ROIs and sizes"
    )
    (decoding,) = (op for name, op in operators.items() if name.startswith("Image"))
    settings = {name: decoding._op._init_args[name] for name in ("hw_decoder_load", "jpeg_fancy_upsampling")}
    assert settings == {"hw_decoder_load": 0.25, "jpeg_fancy_upsampling": True}
    devices = {name: op._op._device for name, op in operators.items()}
    image_inputs = {name: op.inputs[0].device for name, op in operators.items()}
    return devices, image_inputs, [output.device for output in pipeline._graph_outputs]


def test_gpu_graph_decodes_whole_images_on_the_gpu_and_copies_nothing_back():
    devices, image_inputs, outputs = inspect_gpu_graph("gpu")
    on_gpu = {"Slice": "gpu", "Resize": "gpu", "CropMirrorNormalize": "gpu"}
    assert devices == {"Read": "cpu", "Image": "mixed", **on_gpu}
    assert image_inputs == {"Read": "cpu", "Image": "cpu", **on_gpu}
    assert outputs == ["gpu", "gpu"]


def test_gpu_graph_with_the_cpu_decoder_differs_in_the_decoder_only():
    devices, image_inputs, outputs = inspect_gpu_graph("cpu")
    assert devices == {"Read": "cpu", "ImageSlice": "cpu", "Resize": "gpu", "CropMirrorNormalize": "gpu"}
    assert image_inputs == {"Read": "cpu", "ImageSlice": "cpu", "Resize": "gpu", "CropMirrorNormalize": "gpu"}
    assert outputs == ["gpu", "gpu"]


def test_gpu_graph_that_shares_batches_has_both_decoders_and_nothing_else_twice_but_the_cut():
    pipeline = gpu_graph("split")
    operators = [(type(op._op).__name__, op._op._device, op) for op in pipeline._ops]
    plain = [(name, device) for name, device, _ in operators if name not in ("ExternalSource", *HEADER)]
    once = [("Read", "cpu"), ("Image", "cpu"), ("Slice", "cpu"), ("Image", "mixed"), ("Slice", "gpu")]
    once += [("Resize", "gpu"), ("CropMirrorNormalize", "gpu")]
    assert sorted(one for one in plain if one[0] not in ("Split", "Merge", "Copy")) == sorted(once)
    merges = [op for name, device, op in operators if (name, device) == ("Merge", "gpu")]
    assert len(merges) == 2, "of both decoders, and of those resized with those not"
    decoders = {device: op for name, device, op in operators if name == "Image"}
    for device, op in decoders.items():
        assert op.inputs[0].device == "cpu", device
        assert op._op._init_args["jpeg_fancy_upsampling"]
    assert decoders["mixed"]._op._init_args["hw_decoder_load"] == 0.25
    assert [output.device for output in pipeline._graph_outputs] == ["gpu", "gpu"]
