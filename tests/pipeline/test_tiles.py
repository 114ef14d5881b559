"""JPEGs in tiles: to others they are like any other, and what is cut out of them has the whole image's pixels."""

import io

import numpy as np
import pytest
from nvidia.dali import fn, pipeline_def, types
from PIL import Image

from pipeline.shards.tiles import cut_to_windows, tiled_jpeg
from tests.support.images import photographs

SIZES = [(1, 1), (16, 16), (17, 15), (256, 341), (341, 256), (256, 368), (300, 1000), (64, 4000)]


def photograph(height: int, width: int) -> np.ndarray:
    return np.asarray(photographs()[0].convert("RGB").resize((width, height)))


def decoded(jpeg: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(jpeg))
    assert (image.format, image.mode) == ("JPEG", "RGB")
    return np.asarray(image)


def rows_of(jpegs: list[bytes]) -> np.ndarray:
    """uint8 [n, W], filled up with what is no image."""
    width = max(map(len, jpegs))
    return np.stack([np.frombuffer(jpeg.ljust(width, b"\xff"), dtype=np.uint8) for jpeg in jpegs])


def windows_of(sizes: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A random window within each image: start and shape."""
    start = (generator.random(sizes.shape) * sizes).astype(np.int32)
    return start, 1 + (generator.random(sizes.shape) * (sizes - start)).astype(np.int32)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_others_read_the_same_pixels_as_from_a_plain_jpeg(height, width):
    image = photograph(height, width)
    plain = io.BytesIO()
    Image.fromarray(image).save(plain, "JPEG", quality=90, subsampling="4:2:0", optimize=True)
    tiled = tiled_jpeg(image, 90)
    assert np.array_equal(decoded(tiled), decoded(plain.getvalue()))
    if height * width > 10_000:
        assert len(tiled) < 1.1 * len(plain.getvalue())


def test_an_image_of_very_many_tiles_is_cut_by_rows_only():
    image = np.zeros((4000, 4016, 3), dtype=np.uint8)  # 251 blocks in a row: a prime number
    tiled = tiled_jpeg(image, 90)
    assert int.from_bytes(tiled[20:22], "big") == 4016
    assert decoded(tiled).shape == image.shape
    cut, origin = cut_to_windows(rows_of([tiled]), np.array([[100, 1000]]), np.array([[40, 50]]))
    assert decoded(cut[0].tobytes()).shape == (48, 4016, 3)
    assert origin.tolist() == [[96, 0]]


def test_a_windows_pixels_are_those_of_the_whole_image_to_the_last_bit():
    generator = np.random.default_rng(0)
    jpegs = [tiled_jpeg(photograph(*size), 90) for size in SIZES]
    images = [decoded(jpeg) for jpeg in jpegs]
    encoded, sizes = rows_of(jpegs), np.array(SIZES)
    smaller = []
    for _ in range(40):
        start, shape = windows_of(sizes, generator)
        cut, origin = cut_to_windows(encoded, start, shape)
        assert cut is not encoded
        ends = [row.tobytes().rstrip(b"\0")[-2:] for row in cut]
        assert ends == [b"\xff\xd9"] * len(images), "zeros behind the end of each image"
        for n, image in enumerate(images):
            pixels = decoded(cut[n].tobytes())
            (y, x), (height, width) = start[n] - origin[n], shape[n]
            expected = image[start[n, 0] :, start[n, 1] :][:height, :width]
            assert np.array_equal(pixels[y : y + height, x : x + width], expected)
            assert np.all(pixels.shape[:2] < shape[n] + 2 * np.array([18, 66])), "a tile on either side at most"
        smaller.append(cut.shape[1] / encoded.shape[1])
    assert np.median(smaller) < 0.7


def test_the_loaders_decoder_sees_no_difference():
    """The window out of the cut image, and out of the whole one, through DALI."""
    generator = np.random.default_rng(1)
    encoded, sizes = rows_of([tiled_jpeg(photograph(*size), 90) for size in SIZES]), np.array(SIZES)
    start, shape = windows_of(sizes, generator)
    cut, origin = cut_to_windows(encoded, start, shape)

    @pipeline_def(batch_size=len(SIZES), num_threads=1, device_id=None)
    def graph(encoded, start):
        return fn.decoders.image_slice(
            fn.external_source([encoded], batch=True, dtype=types.UINT8),
            start=fn.external_source([start], batch=True, dtype=types.INT32),
            shape=fn.external_source([shape], batch=True, dtype=types.INT32),
            axes=[0, 1],
            adjust_orientation=False,
            jpeg_fancy_upsampling=True,
        )

    (from_whole,), (from_cut,) = graph(encoded, start).run(), graph(cut, start - origin).run()
    for n in range(len(SIZES)):
        assert np.array_equal(from_whole.at(n), from_cut.at(n))


def put(at: int, *values: int):
    def damage(jpeg: bytearray) -> None:
        jpeg[at : at + len(values)] = bytes(values)

    return damage


def _zeros_in_the_second_half(jpeg: bytearray) -> None:
    jpeg[len(jpeg) // 2 :] = bytes(len(jpeg) - len(jpeg) // 2)


@pytest.mark.parametrize(
    "damage",
    [
        put(8, 0),
        put(14, 0, 0),
        put(14, 255, 255),
        put(18, 0, 1),
        put(18, 255, 255),
        put(20, 0, 0),
        put(20, 0, 1),
        put(22, 0, 0, 0, 0),
        put(22, 255, 255, 255, 255),
        put(26, 255, 255, 255, 255),
        put(26, 0, 0, 0, 0),
        _zeros_in_the_second_half,
    ],
)
def test_a_damaged_image_is_left_whole_with_its_batch(damage):
    jpegs = [bytearray(tiled_jpeg(photograph(256, 341), 90)) for _ in range(3)]
    damage(jpegs[1])
    encoded = rows_of([bytes(jpeg) for jpeg in jpegs])
    start, shape = np.zeros((3, 2), dtype=np.int32), np.full((3, 2), 250, dtype=np.int32)
    cut, origin = cut_to_windows(encoded, start, shape)
    assert cut is encoded
    assert not origin.any()


def test_other_files_are_left_as_they_are():
    plain = io.BytesIO()
    Image.fromarray(photograph(100, 100)).save(plain, "JPEG")
    one = np.ones((1, 2), dtype=np.int32)
    for content in (plain.getvalue(), b"", b"\xff\xd8", bytes(1000)):
        encoded = rows_of([content])
        assert cut_to_windows(encoded, one, one)[0] is encoded


def test_no_garbage_raises():
    """Bytes overwritten by chance, in what cut_to_windows reads above all, and windows of other images."""
    generator = np.random.default_rng(2)
    jpeg = tiled_jpeg(photograph(100, 130), 90)
    changed = 0
    for _ in range(1500):
        damaged = np.frombuffer(jpeg, dtype=np.uint8).copy()
        places = generator.integers(0, generator.choice([26, 200, len(jpeg)]), size=generator.integers(1, 4))
        damaged[places] = generator.choice([0, 1, 0xD0, 0xFF, int(generator.integers(256))])
        start, shape = windows_of(np.array([[100, 130]]), generator)
        cut, _ = cut_to_windows(damaged[None, : generator.integers(10, len(jpeg) + 1)], start, shape)
        assert cut.shape[1] <= len(jpeg)
        changed += len(cut[0]) != len(jpeg)
    assert changed > 500
