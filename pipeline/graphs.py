"""The DALI graph: four operators, the same for training, validation and tests, on a GPU and on a CPU."""

from collections.abc import Callable

import numpy as np
from nvidia.dali import Pipeline, fn, pipeline_def, types
from nvidia.dali.data_node import DataNode

HW_DECODER_LOAD = 0.65
"""DALI's default."""


def image_pipeline(
    source: Callable[[], tuple],
    *,
    from_files: bool,
    batch_size: int,
    crop: int | None,
    device_id: int | None,
    decoder: str,
    half: bool,
    threads: int,
    prefetch: int,
    hw_decoder_load: float = HW_DECODER_LOAD,
    pad_channels: bool = False,
    whole: bool = False,
) -> Pipeline:
    """Build (without starting) the pipeline read → decode the window → resize and flip → subtract the mean.

    source: returns the bytes' source and the inputs() of a plan's Samples, one batch a call. from_files: the bytes' source is
    a path, uint8 [n, W]; else the bytes themselves, each image's followed by whatever fills up its row of uint8 [n, W].
    crop: side of the images that come out; None: they are whole, of the samples' own sizes, and batch_size is the largest.
    device_id: the GPU, or None for the CPU. decoder: "gpu" (needs a device_id) or "cpu". hw_decoder_load: the share of the
    images, in [0, 1], that decoder "gpu" gives to the JPEG engine. half: float16 images instead of float32. pad_channels: add
    a fourth channel of zeros. whole: have the CPU's decoder decode whole images, as the GPU's does, so that the same files
    fail. Outputs: images [batch_size, height, width, 3 or 4] (NHWC) and labels int64 [batch_size], on the device.
    """
    on_gpu = device_id is not None
    device = "gpu" if on_gpu else "cpu"

    @pipeline_def(
        batch_size=batch_size,
        num_threads=threads,
        device_id=device_id,
        prefetch_queue_depth=prefetch,
        exec_dynamic=True,  # outputs can be held by torch without a copy
        enable_conditionals=True,
    )
    def graph():
        encoded, start, shape, roi_start, roi_end, resized, mirrored, size, mean, labels = fn.external_source(
            source,
            num_outputs=10,
            batch=True,
            dtype=[
                types.UINT8,
                types.INT32,
                types.INT32,
                types.FLOAT,
                types.FLOAT,
                types.BOOL,
                types.INT32,
                types.FLOAT,
                types.FLOAT,
                types.INT64,
            ],
        )
        images = decode_windows(
            read_files(encoded) if from_files else encoded,
            start,
            shape,
            decoder=decoder,
            hw_decoder_load=hw_decoder_load,
            whole=whole,
        )
        if on_gpu and decoder == "cpu":
            images = images.gpu()
        if resized:  # per sample: an image that has the right size is only cropped
            images = fn.resize(
                images,
                device=device,
                size=size,
                roi_start=roi_start,  # beyond roi_end in x to flip: on a CPU 2–3 % faster than a mirror afterwards
                roi_end=roi_end,
                subpixel_scale=False,  # within 1–2 grey levels of PIL's and torchvision's; the default is up to 6 off
                antialias=True,
            )
        images = _flip_and_subtract(
            images, mirrored, mean, device=device, crop=crop, half=half, pad_channels=pad_channels
        )
        return images, labels.gpu() if on_gpu else labels

    return graph()


def read_files(paths: DataNode) -> DataNode:
    """The graph's first operator: the bytes of the files at these paths."""
    # Mapped, a file that shrinks meanwhile ends the process by SIGBUS; and plain reading is no slower.
    return fn.io.file.read(paths, dont_use_mmap=True)


def decode_windows(
    encoded: DataNode, start: DataNode, shape: DataNode, *, decoder: str, hw_decoder_load: float, whole: bool = False
) -> DataNode:
    """The graph's second operator: the pixels of a window of each image, uint8 [height, width, 3].

    On a CPU, decoding a window is faster than decoding the image. The GPU's decoders are given whole images, of which the
    window is cut out afterwards: nvImageCodec 0.9 with nvJPEG before 13.2, as nvidia-dali-cuda120 has them, leaves windows of
    subsampled JPEGs to the CPU if chroma is interpolated, and its other windows end some processes (nvImageCodec issue 55).
    """
    on_gpu = decoder == "gpu"
    encoded = _after_its_header(encoded)
    settings = {
        "device": "mixed" if on_gpu else "cpu",
        "hw_decoder_load": hw_decoder_load,  # without a meaning to the CPU's decoder
        "output_type": types.RGB,
        "adjust_orientation": False,  # the decoded size is the header's, as the plan assumes and as PIL has it
        "jpeg_fancy_upsampling": True,  # the GPU decoder's default differs from the CPU's and from PIL's
    }
    if on_gpu or whole:
        return fn.slice(fn.decoders.image(encoded, **settings), start=start, shape=shape, axes=[0, 1])
    return fn.decoders.image_slice(encoded, start=start, shape=shape, axes=[0, 1], **settings)


def _after_its_header(encoded: DataNode) -> DataNode:
    """The same bytes, given on when their header could be read.

    Where DALI 2.4's decoders meet a broken header, they raise while other threads still work in what is theirs: with some forty
    images or more in a batch, the process ends by SIGSEGV. Reading the headers first fails as it should.
    """
    height = fn.peek_image_shape(encoded, adjust_orientation=False, dtype=types.INT64)[:1]
    return fn.reshape(encoded, shape=encoded.shape(dtype=types.INT64) + 0 * height)  # a view: nothing is copied


def _flip_and_subtract(
    images: DataNode,
    mirrored: DataNode,
    mean: DataNode,
    *,
    device: str,
    crop: int | None,
    half: bool,
    pad_channels: bool,
) -> DataNode:
    """The graph's last operator. The mean holds the colour shift too: it costs no pass over the image."""
    dtype = types.FLOAT16 if half else types.FLOAT
    if device == "gpu" or crop is None:
        return fn.crop_mirror_normalize(
            images,
            device=device,
            mirror=mirrored,
            mean=mean,
            std=1.0,
            output_layout="HWC",  # what torch calls channels_last
            dtype=dtype,
            pad_output=pad_channels,  # to a power of two
        )
    # On a CPU, and where the size is known, two operators are faster than the one.
    images = fn.flip(images, horizontal=mirrored)
    # One mean for each value of a row, not for each channel: its inner loop is then long enough for SIMD, 20 instead of
    # 70 µs of a core for 224×224 pixels.
    means = fn.reshape(mean, shape=[1, 3]) + types.Constant(np.zeros((crop, 1), dtype=np.float32))
    rows = fn.reshape(images, shape=[crop, crop * 3], layout="")
    rows = fn.normalize(rows, mean=fn.reshape(means, shape=[1, crop * 3]), stddev=1.0, axes=[0], dtype=dtype)
    images = fn.reshape(rows, shape=[crop, crop, 3], layout="HWC")
    return fn.pad(images, axes=[2], shape=[4]) if pad_channels else images
