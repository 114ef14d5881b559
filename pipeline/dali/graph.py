"""The DALI graph: four operators, the same for training, validation and tests, on a GPU and on a CPU."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from nvidia.dali import Pipeline, fn, pipeline_def, types
from nvidia.dali.data_node import DataNode

from pipeline.plan.samples import GRAPH_INPUTS, Samples
from pipeline.shards.raw import Pixels
from pipeline.shards.tiles import cut_to_windows

_DALI_TYPES = {np.bool_: types.BOOL, np.int32: types.INT32, np.int64: types.INT64, np.float32: types.FLOAT}
_BESIDE_PIXELS = {name: dtype for name, dtype in GRAPH_INPUTS.items() if name not in ("start", "shape")}


class DamagedImage(RuntimeError):
    """An image that is kept as pixels is not what its index says: what a decoder's error is for others."""


@dataclass(frozen=True, kw_only=True)
class GraphOptions:
    """How the images of a loader are decoded, and what they look like when they come out: the same in all of its batches."""

    crop: int | None
    """Side of the images that come out; None: they are whole, of the samples' own sizes."""
    device_id: int | None = None
    """The GPU, or None for the CPU."""
    decoder: str = "cpu"
    """"gpu" (needs a device_id), "cpu", or "split": some images of each batch by the CPU's decoder, the others by the GPU's or,
    without a device_id, by the CPU's too. "none" for images that are kept as pixels."""
    hw_decoder_load: float = 0.65
    """The share of the images, in [0, 1], that decoder "gpu" gives to the GPU's JPEG engine. The default is DALI's."""
    std_rgb: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """What R, G, B (0–255) are divided by, after the samples' mean has been subtracted."""
    half: bool = False
    """float16 images instead of float32."""
    pad_channels: bool = False
    """Add a fourth channel of zeros."""
    threads: int = 1
    """DALI's CPU threads."""
    prefetch: int = 2
    """Batches that DALI prepares in advance."""


def image_pipeline(
    source: Callable[[], tuple],
    options: GraphOptions,
    *,
    from_files: bool,
    batch_size: int,
    whole: bool = False,
) -> Pipeline:
    """Build (without starting) the pipeline read → decode the window → resize and flip → subtract the mean, divide by std.

    source: returns the bytes' source and the inputs() of a plan's Samples, one batch a call. from_files: the bytes' source is
    a path, uint8 [n, W]; else the bytes themselves, each image's followed by whatever fills up its row of uint8 [n, W]; or,
    with decoder "none", a list of windows, uint8 [height, width, 3] each, which must stay as they are as long as they exist.
    Where the decoder is "split", what first_of() gives comes last. batch_size: samples in a batch, or at most so many where the
    images are whole. whole: have the CPU's decoder decode whole images, as the GPU's does, so that the same files fail.
    Outputs: images [batch_size, height, width, 3 or 4] (NHWC) and labels int64 [batch_size], on the device.
    """
    on_gpu = options.device_id is not None
    names = _BESIDE_PIXELS if options.decoder == "none" else GRAPH_INPUTS
    input_types = [types.UINT8, *(_DALI_TYPES[dtype] for dtype in names.values())]
    if options.decoder == "split":
        input_types.append(types.BOOL)

    @pipeline_def(
        batch_size=batch_size,
        num_threads=options.threads,
        device_id=options.device_id,
        prefetch_queue_depth=options.prefetch,
        exec_dynamic=True,  # outputs can be held by torch without a copy
        enable_conditionals=True,
    )
    def graph():
        encoded, *inputs = fn.external_source(
            source,
            num_outputs=len(input_types),
            batch=True,
            dtype=input_types,
            # DALI holds the arrays until nobody needs them. For a GPU it copies them into memory that the GPU can read from.
            no_copy=options.decoder == "none" and not on_gpu,
        )
        given = {name: inputs[place] for place, name in enumerate(names)}
        if options.decoder == "none":
            images = fn.reshape(encoded, layout="HWC")  # the windows
        else:
            images = decode_windows(
                read_files(encoded) if from_files else encoded,
                given["start"],
                given["shape"],
                options,
                whole=whole,
                by_cpu=inputs[-1] if options.decoder == "split" else None,
            )
        if on_gpu and options.decoder in ("cpu", "none"):
            images = images.gpu()
        if given["resized"]:  # per sample: an image that has the right size is only cropped
            images = fn.resize(
                images,
                device="gpu" if on_gpu else "cpu",
                size=given["size"],
                roi_start=given[
                    "roi_start"
                ],  # beyond roi_end in x to flip: on a CPU 2–3 % faster than a mirror afterwards
                roi_end=given["roi_end"],
                subpixel_scale=False,  # within 1–2 grey levels of PIL's and torchvision's; the default is up to 6 off
                antialias=True,
            )
        images = _flip_and_normalise(images, given["mirrored"], given["mean"], options)
        return images, given["labels"].gpu() if on_gpu else given["labels"]

    return graph()


def graph_inputs(samples: Samples, encoded: np.ndarray | Pixels, *, from_files: bool) -> tuple:
    """What image_pipeline takes of a batch as it was fetched. Bytes are cut to what the samples' windows need.

    Raises DamagedImage.
    """
    if isinstance(encoded, Pixels):
        if encoded.damaged:
            raise DamagedImage(next(iter(encoded.damaged.values())))
        return encoded.windows, *samples.inputs(_BESIDE_PIXELS)
    if from_files:
        return encoded, *samples.inputs()
    encoded, origin = cut_to_windows(encoded, samples.start, samples.shape)
    return encoded, *samples._replace(start=samples.start - origin).inputs()


def read_files(paths: DataNode) -> DataNode:
    """The graph's first operator: the bytes of the files at these paths."""
    # Mapped, a file that shrinks meanwhile ends the process by SIGBUS; and plain reading is no slower.
    return fn.io.file.read(paths, dont_use_mmap=True)


def first_of(count: int, share: float) -> np.ndarray:
    """Which images of a batch the CPU's decoder gets: bool [count], the first round(share · count) of them."""
    return np.arange(count) < round(share * count)


def decode_windows(
    encoded: DataNode,
    start: DataNode,
    shape: DataNode,
    options: GraphOptions,
    *,
    whole: bool = False,
    by_cpu: DataNode | None = None,
) -> DataNode:
    """The graph's second operator: the pixels of a window of each image, uint8 [height, width, 3].

    by_cpu: of each image, whether the CPU's decoder has it, for decoder "split" alone; then the pixels are on the device.

    On a CPU, decoding a window is faster than decoding the image. The GPU's decoders are given whole images, of which the
    window is cut out afterwards: nvImageCodec 0.9 with nvJPEG before 13.2, as nvidia-dali-cuda120 has them, leaves windows of
    subsampled JPEGs to the CPU if chroma is interpolated, and its other windows end some processes (nvImageCodec issue 55).
    Where both decode, the CPU's is given whole images too: a file that ends early fails or not whichever of them has it, so that
    the images that a run is without do not depend on the share.
    """
    encoded = _after_its_header(encoded)
    if options.decoder == "split":
        on_gpu = options.device_id is not None
        if by_cpu:  # per sample
            images = _decode(encoded, start, shape, options, on_gpu=False, whole=True)
            if on_gpu:
                images = images.gpu()
        else:
            images = _decode(encoded, start, shape, options, on_gpu=on_gpu, whole=True)
        return images
    on_gpu = options.decoder == "gpu"
    return _decode(encoded, start, shape, options, on_gpu=on_gpu, whole=on_gpu or whole)


def _decode(
    encoded: DataNode, start: DataNode, shape: DataNode, options: GraphOptions, *, on_gpu: bool, whole: bool
) -> DataNode:
    settings = {
        "device": "mixed" if on_gpu else "cpu",
        "hw_decoder_load": options.hw_decoder_load,  # without a meaning to the CPU's decoder
        "output_type": types.RGB,
        "adjust_orientation": False,  # the decoded size is the header's, as the plan assumes and as PIL has it
        "jpeg_fancy_upsampling": True,  # the GPU decoder's default differs from the CPU's and from PIL's
    }
    if whole:
        return fn.slice(fn.decoders.image(encoded, **settings), start=start, shape=shape, axes=[0, 1])
    return fn.decoders.image_slice(encoded, start=start, shape=shape, axes=[0, 1], **settings)


def _after_its_header(encoded: DataNode) -> DataNode:
    """The same bytes, given on when their header could be read.

    Where DALI 2.4's decoders meet a broken header, they raise while other threads still work in what is theirs: with some forty
    images or more in a batch, the process ends by SIGSEGV. Reading the headers first fails as it should.
    """
    height = fn.peek_image_shape(encoded, adjust_orientation=False, dtype=types.INT64)[:1]
    return fn.reshape(encoded, shape=encoded.shape(dtype=types.INT64) + 0 * height)  # a view: nothing is copied


def _flip_and_normalise(images: DataNode, mirrored: DataNode, mean: DataNode, options: GraphOptions) -> DataNode:
    """The graph's last operator. The mean holds the colour shift too: it costs no pass over the image."""
    crop, on_gpu = options.crop, options.device_id is not None
    dtype = types.FLOAT16 if options.half else types.FLOAT
    if on_gpu or crop is None:
        return fn.crop_mirror_normalize(
            images,
            device="gpu" if on_gpu else "cpu",
            mirror=mirrored,
            mean=mean,
            std=list(options.std_rgb),
            output_layout="HWC",  # what torch calls channels_last
            dtype=dtype,
            pad_output=options.pad_channels,  # to a power of two
        )
    # On a CPU, and where the size is known, two operators are faster than the one.
    images = fn.flip(images, horizontal=mirrored)
    # One mean for each value of a row, not for each channel: its inner loop is then long enough for SIMD, 20 instead of
    # 70 µs of a core for 224×224 pixels.
    means = fn.reshape(mean, shape=[1, 3]) + types.Constant(np.zeros((crop, 1), dtype=np.float32))
    rows = fn.reshape(images, shape=[crop, crop * 3], layout="")
    std = types.Constant(np.tile(np.array(options.std_rgb, dtype=np.float32), crop)[None])
    rows = fn.normalize(rows, mean=fn.reshape(means, shape=[1, crop * 3]), stddev=std, axes=[0], dtype=dtype)
    images = fn.reshape(rows, shape=[crop, crop, 3], layout="HWC")
    return fn.pad(images, axes=[2], shape=[4]) if options.pad_channels else images
