"""The configuration of a training run: one frozen dataclass, its field docstrings are the text of --help.

Values come from, each overriding those before: the defaults below, the data set's defaults, the recipe, the flags.
Nothing here imports torch, so that --help and a mistyped flag answer at once.
"""

import dataclasses
import math
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import yaml

from common.errors import UserError
from common.files import replacing
from common.flags import FlagParser, expand_switch, parse_dataclass
from common.flat_yaml import read_flat_yaml
from common.process import MOST_THREADS
from common.progress import printable
from pipeline.dataset.digits import DIGITS

SYNTHETIC = "synthetic"
_MOST_BATCHES_AHEAD = 1024  # DALI takes memory for all of them at the start
_PROG = "train.py"
_FROZEN_BLOCKS = {"none": 0, "block1": 1, "block2": 2, "block3": 3, "block4": 4, "features": 5}


def default_data() -> str:
    """What --data means where it is not given."""
    if folder := os.environ.get("VGG_DATA"):
        return folder
    return "data/imagenet" if Path("data/imagenet").is_dir() else DIGITS


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFlags:
    """Which run this is."""

    out: Path = Path("runs")
    """Folder of the run: checkpoints, logs, configuration. Default: runs/<arch>-<data>."""
    resume: str = "auto"
    """`auto`: continue from the newest good checkpoint in OUT, if there is one. `never`: start a new run, and move an earlier
    run in OUT aside. Or the path of a checkpoint to continue from; if it is not in OUT, an earlier run in OUT is moved aside
    too."""
    recipe: Path | None = None
    """YAML file with defaults for these flags; unknown keys are refused. Every run writes such a file, OUT/config.yaml."""
    seed: int = 0
    """Seed of the initial weights, the order of the images, their augmentation, and dropout."""
    epochs: int = 74
    """Passes over the training images. (digits: 14)"""
    steps: int | None = None
    """Stop after this many steps, counted from the start of the training."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkFlags:
    """The network, and what it starts from."""

    arch: Literal["A", "A-LRN", "B", "C", "D", "E"] = "D"
    """Configuration of the paper's Table 1; D is VGG-16, E is VGG-19."""
    batch_norm: bool = False
    """Batch normalisation after each convolution, as in torchvision's vgg*_bn; the paper has none. Its statistics come
    from the images of one pass of one rank."""
    dropout: float = 0.5
    """Probability of dropping an activation of the first two fully-connected layers."""
    init: Literal["xavier", "normal", "kaiming"] = "xavier"
    """Initial weights: Glorot uniform, the paper's normal of variance 0.01, or He normal."""
    init_from: str | None = None
    """Start with the first four convolutions and the three fully-connected layers of configuration A from this checkpoint
    (section 3.1 of the paper), or from torchvision:PATH; the other layers are new."""
    weights: str | None = None
    """Start a new training with all layers of this checkpoint, or, with torchvision:PATH, of a state dict of torchvision's or
    timm's (.pth or .safetensors). If the classes are others, the last layer is new. A run that is resumed continues with its
    own weights."""
    freeze: Literal["none", "block1", "block2", "block3", "block4", "features"] = "none"
    """With --weights: the convolutions that keep their weights, and the statistics of their batch normalisation, all the time.
    block3: those of the first three blocks, counted from the image. features: all of them."""
    head_epochs: float = 0.0
    """With --weights: epochs at the start in which the last layer alone is trained."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageFlags:
    """The images, and what the network sees of them."""

    data: str = dataclasses.field(default_factory=default_data)
    """A folder with train/<class>/* and val/<class>/*; a folder or s3:// URL with prepared data (pipeline.prepare);
    `digits` (built in); or `synthetic` (one batch of noise on the device, to measure the step alone). Default: $VGG_DATA,
    else data/imagenet where it exists, else digits."""
    train_scale: str = "256"
    """Shorter side S of the rescaled training image in pixels: one number, or a range such as 256-512,
    from which one is drawn for each image. (digits: 36)"""
    crop: int = 224
    """Side of the network's input in pixels, a multiple of 32. (digits: 32)"""
    crop_mode: Literal["paper", "random-resized"] = "paper"
    """What of a training image the network sees. paper: a crop at a random place of the image rescaled to TRAIN_SCALE.
    random-resized: a rectangle of random area, shape and place, resized to the crop, as with torchvision's
    RandomResizedCrop."""
    crop_area: str = "0.08-1"
    """With --crop-mode random-resized: the rectangle's share of the image's area, as a range."""
    crop_aspect: str = "3/4-4/3"
    """With --crop-mode random-resized: the rectangle's width divided by its height, as a range."""
    validation_scale: int | None = None
    """Shorter side Q of the rescaled validation image in pixels, of which the network sees the centre crop. Default: the training
    scale, or the middle of its range; with --crop-mode random-resized 256/224 of the crop."""
    std: str = "1,1,1"
    """What red, green and blue (0–255) are divided by after the mean is subtracted. 58.395,57.12,57.375 is what torchvision's
    networks are trained with. Weights from a network with another std are rescaled, so that they give the same results."""
    order: Literal["global", "window"] = "global"
    """Order of the training images in an epoch. global: a random permutation of all images. window: shards in random order,
    and within each group of WINDOW_SHARDS shards all images in random order; only for prepared data, on storage that is
    fast only when read sequentially."""
    window_shards: int = 16
    """With --order window: number of shards whose images are shuffled, and held in memory, together."""
    max_bad_images: int | None = None
    """How many images may turn out not to be decodable; if there are more, the run ends. Default: 0.1 % of the images."""
    allow_changed_data: bool = False
    """Resume even if the data set is not the one that the checkpoint was trained on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingFlags:
    """How the weights are learned."""

    batch_size: int = 256
    """Images in one step, over all ranks together; must be divisible by the number of ranks. (digits: 32)"""
    micro_batch: int | None = None
    """Largest number of images in one pass of one rank. If this is less than the rank's share of the batch, gradients are
    accumulated over several passes, of the largest size that divides the share. Default: the share, halved on a GPU until its
    memory suffices; when a run is resumed, what it had before."""
    lr: float = 0.01
    """Learning rate at the start. (synthetic: 0.0001)"""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 5e-4
    """L2 penalty on the weights."""
    weight_decay_on: Literal["all", "weights"] = "all"
    """all: the penalty is on biases and on batch normalisation's scales too. weights: only on what convolutions and
    fully-connected layers multiply by."""
    head_lr_factor: float = 1.0
    """The last layer's learning rate is LR times this, all through the schedule; 10 is usual where that layer is new."""
    label_smoothing: float = 0.0
    """Share of the target that is spread evenly over all classes, in [0, 1). Validation does not use it."""
    mixup: float = 0.0
    """Mix each training image with another of its pass, and their targets alike: α of Beta(α, α), of which the shares are drawn,
    in [0, 100]; 0.2 is usual. 0: none. The logged loss is that of the mixed targets. --inspect shows images before they are
    mixed."""
    cutmix: float = 0.0
    """Put a rectangle of another training image of its pass into each, and mix their targets by area: α as that of --mixup; 1 is
    usual. With --mixup as well, each pass has one of the two, with probability 1/2."""
    ema: float = 0.0
    """Decay of a moving average of the weights, in [0, 1), for example 0.9999; it is smaller in the first steps. 0: no average is
    kept. Validation uses the average, and so do the programs that read a checkpoint."""
    schedule: Literal["plateau", "step", "cosine"] = "plateau"
    """plateau: as in the paper, the learning rate is divided by 10 when validation top-1 stops improving; after three times,
    the training ends at the next plateau. step: it is divided by 10 every STEP_EPOCHS. cosine: linear warm-up, then half a
    cosine down to 0. (digits: cosine)"""
    plateau_epochs: int = 5
    """Epochs without a better top-1 after which plateau takes effect."""
    step_epochs: int = 30
    """Epochs between two drops of the step schedule. (digits: 3)"""
    warmup_epochs: float = 5.0
    """Epochs of warm-up of the cosine schedule. (digits: 1)"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputingFlags:
    """The device, the precision, and the speed of a step."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where the network runs. auto: on the GPU if there is one."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Precision of autocast. auto: on GPUs bf16, or fp16 if one of them does not support bf16; on a CPU fp32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Whether to use torch.compile; --compile and --no-compile are short for on and off. auto: on for CUDA."""
    compile_mode: Literal["default", "max-autotune-no-cudagraphs"] = "default"
    """Mode of torch.compile."""
    fuse: Literal["none", "pool", "conv"] = "none"
    """Passes over memory that a step saves; weights and, but for rounding, results stay as they are. none: the usual network.
    pool: the bias of each convolution in front of a pooling is added behind it, to a quarter of the values. conv: this, and the
    other convolutions are one kernel of cuDNN's with their bias and ReLU. What it gains on a GPU is not measured yet."""
    parallel: Literal["auto", "data", "hybrid"] = "auto"
    """How ranks divide the work. data: each has all weights, and sends all gradients. hybrid: ranks share FC6 and FC7, each
    having a part of their weights, and send activations instead; it computes the same. auto: hybrid where the model of
    docs/performance.md predicts a step that is shorter by a tenth or more; data on CPUs and on GPUs that it does not know."""
    fc_ranks: int | None = None
    """With --parallel hybrid, how many ranks share FC6 and FC7; it must divide the number of ranks and 4096, else each rank has
    its own. Default: the ranks of one machine, or all where each machine has one."""
    collective_minutes: float = 15.0
    """How long a rank waits for the others in one operation before it gives the run up. Another one may be saving."""
    lost_seconds: float = 60.0
    """After how long without any answer another machine is taken to be lost, which ends the run; a busy one answers."""
    grad_compression: Literal["none", "bf16", "fp16"] = "none"
    """Precision in which gradients are sent between ranks."""
    pad_channels: bool = False
    """Give the network images with a fourth channel of zeros, which makes the first convolution faster on some GPUs. The
    weights keep their shapes."""
    deterministic: bool = False
    """Use deterministic kernels only. This is slower, but every run gives the same result to the last bit."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadingFlags:
    """How images get to the device."""

    decoder: Literal["auto", "cpu", "gpu", "split"] = "auto"
    """Where JPEGs are decoded. auto: where the network runs. split: in training, the CPU decodes a share of each batch, and the
    GPU the rest; which share is found in some 100 steps, and then stays. Whether it is faster is not measured yet.
    Data prepared with --format raw has nothing to decode."""
    hw_decoder_load: float = 0.65
    """Share of the images that --decoder gpu gives to the GPU's JPEG engine, where it has one (A100, H100 …), in [0, 1].
    The best value depends on THREADS. Validation, and runs with --deterministic, give it all images or none."""
    threads: int | None = None
    """DALI's CPU threads in each rank. Default: one more than the rank's share of the cores; with --decoder gpu 8 at most."""
    prefetch: int = 2
    """Batches that DALI prepares in advance."""
    read_threads: int | None = None
    """Threads in each rank that read prepared data. Default: 8 for a folder, 64 for S3."""
    read_ahead: int = 8
    """Least number of batches of prepared data that are read in advance."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordingFlags:
    """What is written, and when."""

    checkpoint_minutes: float = 30.0
    """Minutes between checkpoints within an epoch; 0: after every step. One is written after every epoch in any case."""
    keep: int = 2
    """How many checkpoints to keep besides the best one: OUT/step-*.pt. The newest of them is also OUT/last.pt."""
    log_every: int = 20
    """Steps between two log lines. For each line, the host waits for the device to read the loss."""
    wandb: bool = False
    """Send every figure to Weights & Biases too. Needs `pip install wandb`. WANDB_PROJECT names the project."""
    profile_memory: bool = False
    """Write OUT/memory.pickle after the first three steps: torch's record of what was allocated on rank 0's GPU, when, and by
    which line of the code. https://pytorch.org/memory_viz shows it."""
    inspect: int | None = None
    """Do not train. Instead draw this many training samples of a new run, and as many validation images, into OUT/inspect.png."""
    dry_run: bool = False
    """Do not train, and write nothing to OUT. Instead print what would be run: network, data, batch, schedule, estimated time and
    memory, checkpoints."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunFlags, NetworkFlags, ImageFlags, TrainingFlags, ComputingFlags, LoadingFlags, RecordingFlags):
    """Train a VGG network from image files.

    The last line on stdout is one line of JSON with the results.
    """

    @property
    def scale(self) -> tuple[int, int]:
        """Lowest and highest training scale S in pixels."""
        return parse_scale(self.train_scale)

    @property
    def area(self) -> tuple[float, float]:
        """Lowest and highest share of the image's area that a random-resized crop has."""
        return parse_range(self.crop_area)

    @property
    def aspect(self) -> tuple[float, float]:
        """Lowest and highest width / height of a random-resized crop."""
        return parse_range(self.crop_aspect)

    @property
    def std_rgb(self) -> tuple[float, float, float]:
        """What the pixels (0–255) are divided by. Raises ValueError unless these are three numbers."""
        red, green, blue = map(float, self.std.split(","))
        return red, green, blue

    @property
    def test_scale(self) -> int:
        """The validation scale Q in pixels: by default the paper's for one test scale (section 4.1), S or the middle of its
        range."""
        if self.validation_scale is not None:
            return self.validation_scale
        return usual_test_scale(self.crop) if self.crop_mode == "random-resized" else middle(self.scale)

    @property
    def crops(self) -> str:
        """How the training crops are taken, for people."""
        if self.crop_mode == "paper":
            return f"scale {self.train_scale}"
        return f"random-resized from {self.crop_area} of the area, aspect {self.crop_aspect}"

    @property
    def mixes(self) -> bool:
        """Whether training images are mixed with others of their pass."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def frozen_blocks(self) -> int:
        """How many blocks of convolutions --freeze means."""
        return _FROZEN_BLOCKS[self.freeze]


_DEFAULTS_BY_DATA: dict[str, dict] = {
    DIGITS: {
        "train_scale": "36",
        "crop": 32,
        "batch_size": 32,
        "epochs": 14,
        "schedule": "cosine",
        "step_epochs": 3,
        "warmup_epochs": 1.0,
    },
    # One batch of noise, learned by heart at full speed, would end in a loss that is not finite.
    SYNTHETIC: {"lr": 1e-4},
}


def parse_scale(text: str) -> tuple[int, int]:
    """The lowest and the highest number of "256" or "256-512". Raises ValueError."""
    lowest, _, highest = text.partition("-")
    return int(lowest), int(highest or lowest)


def parse_range(text: str) -> tuple[float, float]:
    """The lowest and the highest number of "0.08-1", "3/4-4/3" or "1". Raises ValueError."""

    def number(text: str) -> float:
        numerator, _, denominator = text.partition("/")
        return float(numerator) / (float(denominator or 1) or math.nan)

    lowest, _, highest = text.partition("-")
    return number(lowest), number(highest or lowest)


def middle(scale: tuple[int, int]) -> int:
    """The paper's one test scale Q for training scales S from the lowest to the highest (section 4.1): S, or their middle."""
    return sum(scale) // 2


def usual_test_scale(crop: int) -> int:
    """Q in pixels for a network that was trained at no scale S: torchvision tests its own so, at 256 for 224 pixels."""
    return 256 * crop // 224


def parse_args(argv: list[str] | None = None) -> Config:
    """The configuration that a command line asks for. Raises UserError; --help prints and exits."""
    flags = expand_switch(sys.argv[1:] if argv is None else argv, "compile")
    recipe, _, _ = _decisive(flags)
    if recipe:
        flags = [*read_recipe(Path(recipe)), *flags]  # of a flag that is given twice, the later value holds
    _, data, arch = _decisive(flags)
    out = Path("runs") / f"{arch}-{Path(data).resolve().name}"
    base = Config(**{**_DEFAULTS_BY_DATA.get(data, {}), "out": out})
    if {"-h", "--help"} & set(flags):
        base = Config()  # whose texts say what another data set changes
    config = parse_dataclass(Config, flags, base, _PROG)
    check(config)
    return config


def _decisive(flags: list[str]) -> tuple[str | None, str, str]:
    """--recipe, --data and --arch, which decide the defaults of others; their own where they are given wrongly: the parser of
    all flags says so.

    A parser of three flags, since one of all of them takes a hundred times as long.
    """
    parser = FlagParser(add_help=False, allow_abbrev=False)
    for name, default in (("recipe", None), ("data", default_data()), ("arch", Config.arch)):
        parser.add_argument(f"--{name}", default=default)
    try:
        found, _ = parser.parse_known_args(flags)
    except UserError:
        found = parser.parse_args([])
    return found.recipe, found.data, found.arch


def read_recipe(path: Path) -> list[str]:
    """A YAML recipe as flags, each value as it would stand on the command line. Raises UserError: no such file, not a table of
    flags, an unknown key.
    """
    try:
        entries = read_flat_yaml(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--recipe {path}: cannot be read ({getattr(error, 'strerror', None) or 'not text'})"
        ) from error
    except yaml.YAMLError as error:
        raise UserError(f"--recipe {path}: not YAML ({' '.join(str(error).split())})") from error
    except ValueError as error:
        raise UserError(
            f"--recipe {path}: must be lines of the form `flag: value` ({printable(str(error))})"
        ) from error
    known = {field.name: field for field in dataclasses.fields(Config) if field.name != "recipe"}
    flags: list[str] = []
    seen: set[str] = set()
    for key, (text, value) in entries.items():
        name = key.replace("-", "_")
        if name not in known:
            raise UserError(f"--recipe {path}: unknown key {printable(key)}; train.py --help lists the flags")
        flag = name.replace("_", "-")
        if name in seen:
            raise UserError(f"--recipe {path}: must be lines of the form `flag: value` ({flag} is given twice)")
        seen.add(name)
        if value is None:
            continue
        if known[name].type is bool:
            if not isinstance(value, bool):
                raise UserError(f"--recipe {path}: {flag} must be true or false")
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif name == "compile" and isinstance(value, bool):  # true is short for on
            flags.append(f"--compile={'on' if value else 'off'}")
        else:
            flags.append(f"--{flag}={text}")  # one word: a value that begins with a dash is none of the flags
    return flags


def save_config(config: Config, path: Path) -> None:
    """Write the configuration as a recipe. Raises OSError."""
    with replacing(path) as file:
        file.write(yaml.safe_dump(to_dict(config), sort_keys=False).encode())


def to_dict(config: Config) -> dict[str, str | int | float | bool | None]:
    """The configuration as plain values, for checkpoints and logs."""
    entries = dataclasses.asdict(config)
    del entries["recipe"]  # its values are among the others
    return {key: str(value) if isinstance(value, Path) else value for key, value in entries.items()}


def _is_installed(package: str) -> bool:
    spec = find_spec(package)
    return spec is not None and spec.origin is not None  # a folder of that name, as wandb leaves them, is no package


def check(config: Config) -> None:
    """Raise UserError for values that no world size and no machine could make good."""
    check_numbers(config)
    try:
        lowest, highest = config.scale
    except ValueError:
        raise UserError(
            f"--train-scale {config.train_scale}: give one number of pixels, as 256, or a range, as 256-512"
        ) from None
    try:
        area, aspect = config.area, config.aspect
    except ValueError:
        raise UserError(
            f"--crop-area {config.crop_area}, --crop-aspect {config.crop_aspect}: give ranges, as 0.08-1 and 3/4-4/3"
        ) from None
    try:
        std_rgb = config.std_rgb
    except ValueError:
        raise UserError(
            f"--std {config.std}: give a number for each of red, green and blue, with commas, as 58.395,57.12,57.375"
        ) from None
    is_resized = config.crop_mode == "random-resized"
    # The default counts as not given: config.yaml, which has all flags, is a recipe too.
    default_scale = _DEFAULTS_BY_DATA.get(config.data, {}).get("train_scale", Config.train_scale)
    checks = {
        f"--train-scale {config.train_scale}: --crop-mode random-resized has no scale; leave one of the two out": (
            not is_resized or config.train_scale == default_scale
        ),
        f"--crop-area {config.crop_area}: needs --crop-mode random-resized": (
            is_resized or config.crop_area == Config.crop_area
        ),
        f"--crop-aspect {config.crop_aspect}: needs --crop-mode random-resized": (
            is_resized or config.crop_aspect == Config.crop_aspect
        ),
        f"--crop-area {config.crop_area}: must be in (0, 1]": 0 < area[0] <= 1 and 0 < area[1] <= 1,
        f"--crop-area {config.crop_area}: the first number must not exceed the second": area[0] <= area[1],
        f"--crop-aspect {config.crop_aspect}: must be in [0.01, 100]": all(0.01 <= value <= 100 for value in aspect),
        f"--crop-aspect {config.crop_aspect}: the first number must not exceed the second": aspect[0] <= aspect[1],
        f"--crop {config.crop}: must be a multiple of 32, as 224, since VGG halves its input five times": (
            config.crop >= 32 and config.crop % 32 == 0
        ),
        f"--train-scale {config.train_scale}: the first number must not exceed the second": lowest <= highest,
        f"--train-scale {config.train_scale}: must be at least the crop, {config.crop}": (
            is_resized or lowest >= config.crop
        ),
        f"--validation-scale {config.validation_scale}: must be at least the crop, {config.crop}": (
            config.validation_scale is None or config.validation_scale >= config.crop
        ),
        # Less than a grey level would be of pixels in 0–1.
        f"--std {config.std}: must be in [1, 255], as pixels are in 0–255": all(1 <= std <= 255 for std in std_rgb),
        f"--batch-size {config.batch_size}: must be at least 1": config.batch_size >= 1,
        f"--micro-batch {config.micro_batch}: must be at least 1": config.micro_batch is None
        or config.micro_batch >= 1,
        f"--epochs {config.epochs}: must be at least 1": config.epochs >= 1,
        f"--steps {config.steps}: must be at least 1": config.steps is None or config.steps >= 1,
        f"--lr {config.lr}: must be above 0": config.lr > 0,
        f"--momentum {config.momentum}: must be in [0, 1)": 0 <= config.momentum < 1,
        f"--weight-decay {config.weight_decay}: must not be negative": config.weight_decay >= 0,
        f"--head-lr-factor {config.head_lr_factor}: must be above 0": config.head_lr_factor > 0,
        f"--head-epochs {config.head_epochs}: must not be negative": config.head_epochs >= 0,
        f"--dropout {config.dropout}: must be in [0, 1)": 0 <= config.dropout < 1,
        f"--label-smoothing {config.label_smoothing}: must be in [0, 1)": 0 <= config.label_smoothing < 1,
        # From 100 on, the two shares are as good as equal.
        f"--mixup {config.mixup}: must be in [0, 100]": 0 <= config.mixup <= 100,
        f"--cutmix {config.cutmix}: must be in [0, 100]": 0 <= config.cutmix <= 100,
        f"--ema {config.ema}: must be in [0, 1)": 0 <= config.ema < 1,
        f"--fuse {config.fuse}: has nothing to join with --batch-norm, whose normalisation stands between; leave one out": (
            config.fuse == "none" or not config.batch_norm
        ),
        f"--fc-ranks {config.fc_ranks}: must be at least 1": config.fc_ranks is None or config.fc_ranks >= 1,
        f"--collective-minutes {config.collective_minutes}: must be in (0, 100000]": (
            0 < config.collective_minutes <= 1e5
        ),
        f"--lost-seconds {config.lost_seconds}: must be in [1, 100000]": 1 <= config.lost_seconds <= 1e5,
        "--weights and --init-from: give one of them": not (config.weights and config.init_from),
        "--freeze and --head-epochs keep layers as a run starts with them; say with --weights what it starts with": (
            config.weights is not None or not (config.frozen_blocks or config.head_epochs)
        ),
        f"--plateau-epochs {config.plateau_epochs}: must be at least 1": config.plateau_epochs >= 1,
        f"--step-epochs {config.step_epochs}: must be at least 1": config.step_epochs >= 1,
        f"--warmup-epochs {config.warmup_epochs}: must not be negative": config.warmup_epochs >= 0,
        f"--seed {config.seed}: must be in [0, 2^63)": 0 <= config.seed < 2**63,
        f"--window-shards {config.window_shards}: must be at least 1": config.window_shards >= 1,
        f"--checkpoint-minutes {config.checkpoint_minutes}: must not be negative": config.checkpoint_minutes >= 0,
        f"--keep {config.keep}: must be at least 1": config.keep >= 1,
        f"--log-every {config.log_every}: must be at least 1": config.log_every >= 1,
        "--wandb: wandb is not installed here; pip install wandb": not config.wandb or _is_installed("wandb"),
        "--inspect and --dry-run: give one of them": not (config.inspect and config.dry_run),
        f"--inspect {config.inspect}: must be in [1, 400]": config.inspect is None or 1 <= config.inspect <= 400,
    }
    for message, holds in checks.items():
        if not holds:
            raise UserError(message)
    check_loading(config, config.max_bad_images)


def check_numbers(flags: object) -> None:
    """Raise UserError where one of a dataclass of flags is too large for 64 bits, which most of them become, or not finite.

    --seed says so itself; --checkpoint-minutes may be inf: none within an epoch.
    """
    for name, value in vars(flags).items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, int) and abs(value) >= 2**63 and name != "seed":
            raise UserError(f"{flag}: must be in (-2^63, 2^63)")
        if isinstance(value, float) and not math.isfinite(value) and (name, value) != ("checkpoint_minutes", math.inf):
            raise UserError(f"{flag} {value}: must be a finite number")


def check_loading(loading: LoadingFlags, max_bad_images: int | None) -> None:
    """Raise UserError for values that no machine could make good."""
    threads, read_threads = loading.threads, loading.read_threads
    checks = {
        f"--threads {threads}: must be in [1, {MOST_THREADS}]": threads is None or 1 <= threads <= MOST_THREADS,
        f"--prefetch {loading.prefetch}: must be in [1, {_MOST_BATCHES_AHEAD}]": (
            1 <= loading.prefetch <= _MOST_BATCHES_AHEAD
        ),
        f"--hw-decoder-load {loading.hw_decoder_load}: must be in [0, 1]": 0 <= loading.hw_decoder_load <= 1,
        f"--read-threads {read_threads}: must be in [1, {MOST_THREADS}]": (
            read_threads is None or 1 <= read_threads <= MOST_THREADS
        ),
        f"--read-ahead {loading.read_ahead}: must be at least 1": loading.read_ahead >= 1,
        f"--max-bad-images {max_bad_images}: must not be negative": max_bad_images is None or max_bad_images >= 0,
    }
    for message, holds in checks.items():
        if not holds:
            raise UserError(message)
