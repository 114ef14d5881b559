"""report.json: what profile/throughput.py measured, as types; written, read and checked.

None stands for what was not measured, or does not exist in this run. Seconds and bytes are in the names; rates are of all ranks
together unless a name says otherwise.
"""

import math
from pathlib import Path
from typing import Any

import msgspec

from common.errors import UserError

PROGRAM, FORMAT = "throughput", 2
REPORT_JSON = "report.json"
STAGES = ("reading", "decoding", "loader", "step", "training")
_WRITER = "profile/throughput.py"


class Record(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Keyword arguments only; a key of the file that no field names is refused."""


class Summary(Record):
    """Of single values: steps, or laps of several steps."""

    mean: float
    median: float
    p5: float
    p95: float
    count: int


class Rate(Record):
    """What a stage did: images over time, all of it, but for its warm-up."""

    images: int
    """Of all ranks, in the steps that count."""
    seconds: float
    """That those steps took, on the slowest rank."""
    images_per_second: float
    """images / seconds."""
    interval: tuple[float, float] | None
    """Of images_per_second, 95 % confidence, autocorrelation allowed for; None: too few steps to say."""
    images_per_second_per_rank: list[float]
    """Of each rank by itself, in order: its own images over its own seconds."""
    step_seconds: Summary
    """Of the slowest rank."""
    series_seconds: list[float]
    """Of the slowest rank, in order: seconds a step of each lap."""
    steps_a_lap: int
    stopped_by: str
    """precision, time or steps."""
    cpu_seconds_per_step: float
    """Processor time of the rank that needs most, all threads."""
    cores_of_others: float
    """How many of the cores that rank 0's machine gives us other programs kept busy, on average."""

    @property
    def relative_ci(self) -> float | None:
        """Half the interval's width over the rate."""
        if self.interval is None:
            return None
        return (self.interval[1] - self.interval[0]) / 2 / self.images_per_second

    @property
    def slowest_rank(self) -> int:
        return min(range(len(self.images_per_second_per_rank)), key=lambda rank: self.images_per_second_per_rank[rank])

    @property
    def images_per_second_of_slowest(self) -> float:
        """Of all ranks, if each were as slow as the slowest, for which they wait in training."""
        return len(self.images_per_second_per_rank) * min(self.images_per_second_per_rank)


class Stages(Record):
    reading: Rate | None
    decoding: Rate | None
    loader: Rate | None
    step: Rate
    training: Rate | None


class StepParts(Record):
    """Seconds of rank 0 in the step alone; they add up to the step. With several ranks, all_reduce is what the backward pass
    leaves exposed, and backward what that takes without it."""

    forward: Summary
    backward: Summary
    all_reduce: Summary | None
    optimizer: Summary


class TrainingParts(Record):
    """Seconds of rank 0 in a step of training, by its own marks."""

    data_wait: Summary
    """From asking for a batch to having it."""
    forward: Summary
    backward: Summary
    """With what of the all-reduce it does not hide."""
    optimizer: Summary
    step: Summary
    """The whole step less data_wait: the parts, and what lies between them."""


class AllReduceAlone(Record):
    seconds: Summary
    bytes_per_rank: int


class WarmUp(Record):
    """What the figures leave out."""

    steps: int
    seconds: float
    compile_seconds: float | None
    """Of the first pass, compilation included; None where nothing is compiled."""
    first_batch_seconds: float | None


class Hardware(Record):
    device: str
    """cpu or cuda."""
    name: str
    ranks: int
    machines: int
    cpu: str
    cores: int
    """That this machine gives us."""
    memory_gib: float
    torch: str
    dali: str
    driver: str | None


class DeviceMemory(Record):
    """Of the GPU of rank 0, over the whole measurement."""

    peak_bytes: int
    """Reserved by torch at most, plus what other libraries (DALI) had meanwhile, where NVML says it."""
    total_bytes: int


class Kernel(Record):
    """Of the device, in a traced step of training; on a CPU, an operator."""

    name: str
    seconds_per_step: float
    calls_per_step: float


class Gap(Record):
    """Of a traced step: the device did nothing."""

    seconds: float
    before: str
    """The kernel that ended it."""


class Trace(Record):
    """A few steps under torch.profiler, which slows them down."""

    steps: int
    step_seconds: float
    busy_seconds_per_step: float
    """At least one kernel was running."""
    kernels: list[Kernel]
    """The ten costliest, the costliest first."""
    gaps: list[Gap]
    """The ten longest of all steps, the longest first."""


class Ceiling(Record):
    """What training could reach at most, by its parts as they were measured."""

    images_per_second: float
    set_by: str
    training_over_ceiling: float | None
    why_not: str | None


class Peaks(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """What one device does at most in one precision."""

    name: str
    source: str
    """table or measured."""
    flops_per_second: float
    """Matrix products, two FLOP a multiply-add, dense."""
    bytes_per_second: float
    """Memory, reads and writes together."""
    watts: float | None
    """Power limit by the table; None where the peaks were measured, or no document states one."""


class FloorSeconds(Record):
    """The least time of one device for the parts of one step."""

    forward: float
    backward: float
    optimizer: float
    all_reduce: float
    """All of it, also what the backward pass hides. 0 where no links are known."""
    total: float
    """With what of the all-reduce the backward pass cannot hide."""


class Layer(Record):
    """Forward and backward of one step together."""

    name: str
    kind: str
    flops: float
    bytes: float
    """With bias, ReLU and dropout fused into the layer."""
    bytes_unfused: float
    """With each of them reading and writing its values: what an eager step, or one that fuses nothing, moves."""
    floor_seconds: float
    floor_seconds_unfused: float
    measured_seconds: float | None


class Prediction(Record):
    """For so many devices, each with the same batch."""

    ranks: int
    images_per_second: float
    efficiency: float
    """Of ranks times one device."""
    images_per_second_compressed: float
    """With gradients in 16 bits."""
    efficiency_compressed: float
    all_reduce_seconds: float
    exposed_seconds: float
    algorithm: str
    """ring, tree or in-switch."""
    images_per_second_without_overlap: float
    images_per_second_compressed_without_overlap: float
    all_reduce_seconds_compressed: float
    exposed_seconds_compressed: float


class Links(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """What joins the devices, and where we know it from."""

    peer_bytes_per_second: float
    """Of one device to the others of its machine, in each direction."""
    network_bytes_per_second: float
    """Of one machine to the others, in each direction, for all its devices together."""
    gpus_per_node: int
    latency_seconds: float
    """Of one message, however small."""
    in_switch: bool = False
    """Whether the switch within a machine adds up (NVLink SHARP)."""
    source: str = "assumed"
    """Where the rates are from, for people: flags, the table of GPUs, assumed."""

    def filled_by(self, ranks: int) -> bool:
        """Whether so many devices are all on one machine, or all of those on each."""
        return ranks <= self.gpus_per_node or ranks % self.gpus_per_node == 0


class Roofline(Record):
    peaks: Peaks
    floor_seconds: FloorSeconds
    """With bias, ReLU and dropout fused into the layer before them."""
    floor_seconds_unfused: FloorSeconds
    flops_per_image: float
    optimizer_bytes: int
    all_reduce_bytes: int
    mfu: float | None
    images_per_joule: float | None
    """Of this machine's GPUs; None of a part of a GPU (MIG), whose energy nobody knows."""
    layers: list[Layer]
    links: Links | None
    """None: nobody has named them, and the table of GPUs does not know them."""
    scaling_from: str
    """measured or floor."""
    scaling: list[Prediction]
    """Empty where there are no links that we know of."""


class Costs(Record):
    """At the measured rate, validation and checkpoints apart."""

    epoch_seconds: float
    training_seconds: float
    epoch_joules: float | None
    """Of all GPUs."""
    training_joules: float | None
    epoch_price: float | None
    training_price: float | None
    price_basis: str | None
    """The flag and its value, such as --price-per-hour 12; None: no price was given."""


class Quantiles(Record):
    median: float
    p5: float
    p95: float
    min: float
    max: float
    mean: float


class Device(Record):
    """One GPU over a window of time."""

    machine: int
    """0 is rank 0's."""
    index: int
    """NVML's, on its machine."""
    uuid: str
    name: str
    energy_joules: float | None
    energy_source: str | None
    fields: dict[str, Quantiles | None]
    throttled_fraction: dict[str, float] | None
    max_sm_clock_mhz: float | None
    """The highest that the card has."""
    power_limit_watts: float | None
    """That is enforced."""
    default_power_limit_watts: float | None
    is_mig: bool
    missing: dict[str, str]
    series: dict[str, list[float | None]]
    """By reading, and "seconds" since the sampling began; all of one length."""


class Telemetry(Record):
    available: bool
    reason: str | None
    interval_seconds: float
    samples: int
    seconds: float
    devices: list[Device]
    """Over the whole measurement, of all machines."""
    stages: dict[str, list[Device]]
    """By stage, in the order of devices; series is empty."""
    stage_seconds: dict[str, tuple[float, float]]
    """First and last second, of the series' time."""


class Figure(Record):
    name: str
    value: float
    unit: str


class Advice(Record):
    flags: str
    why: str


class Verdict(Record):
    bound: str
    """throttled, input, launch, communication, optimizer, memory, kernels, compute or inconclusive."""
    sentence: str
    evidence: list[Figure]
    tries: list[Advice] = msgspec.field(name="try")
    """Flags of train.py to try next, in order."""
    cautions: list[str]
    """Sentences: why the figures are less sure than they look. Not empty where the verdict is inconclusive."""


class Report(Record):
    program: str
    format: int
    created: str
    """ISO 8601, UTC."""
    git_revision: str | None
    hardware: Hardware
    config: dict[str, Any]
    """The configuration of train.py, each "auto" as it came out; and images_in: shards, files or none."""
    changed: list[str]
    """The keys of config that were given another value than the default."""
    warm_up: WarmUp
    stages: Stages
    step_parts: StepParts
    training_parts: TrainingParts | None
    all_reduce: AllReduceAlone | None
    """By itself, with nothing beside it; None for a single rank."""
    host_seconds_per_step: float | None
    memory: DeviceMemory | None
    trace: Trace | None
    ceiling: Ceiling
    roofline: Roofline
    costs: Costs | None
    """None for noise, of which there is no epoch."""
    telemetry: Telemetry
    verdict: Verdict


def encoded(report: Report) -> bytes:
    """One line of JSON."""
    return msgspec.json.encode(report) + b"\n"


def read_report(path: Path) -> Report:
    """Raises UserError: no such file, not JSON, not a report, one of another format."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    try:
        found = msgspec.json.decode(content)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not JSON; give the report.json that {_WRITER} wrote") from error
    if not isinstance(found, dict) or found.get("program") != PROGRAM:
        raise UserError(f"{path}: not a report; give the report.json that {_WRITER} wrote")
    if found.get("format") != FORMAT:
        raise UserError(
            f"{path}: a report of format {found.get('format')}, and this program reads format {FORMAT}; "
            "show it with the revision that wrote it"
        )
    try:
        report = msgspec.convert(found, Report)
        for device in report.telemetry.devices:
            if len({len(values) for values in device.series.values()}) > 1:
                raise msgspec.ValidationError("Lists of several lengths - at `$.telemetry.devices[...].series`")
    except msgspec.ValidationError as error:
        raise UserError(f"{path}: not a whole report ({error}); measure again with {_WRITER}") from error
    return report


def epoch_costs(
    *,
    images_an_epoch: int,
    epochs: int,
    images_per_second: float,
    images_per_joule: float | None,
    price_per_hour: float | None = None,
    price_per_kwh: float | None = None,
) -> Costs:
    """What an epoch and the whole training take at these rates.

    images_per_second: of all ranks, in training. images_per_joule: of the GPUs alone; None where it was not measured.
    price_per_hour: of all machines together. price_per_kwh: of the GPUs' energy, so the least that the power costs.
    Raises UserError: both prices, or one that is below 0 or not a finite number.
    """
    for flag, price in (("--price-per-hour", price_per_hour), ("--price-per-kwh", price_per_kwh)):
        if price is not None and not 0 <= price < math.inf:
            raise UserError(f"{flag} {price:g}: must be a finite number, 0 or more")
    if price_per_hour is not None and price_per_kwh is not None:
        raise UserError("--price-per-hour and --price-per-kwh: give one; the price of an hour has the power in it")
    seconds = images_an_epoch / images_per_second
    joules = images_an_epoch / images_per_joule if images_per_joule else None
    price = basis = None
    if price_per_hour is not None:
        price, basis = price_per_hour * seconds / 3600, f"--price-per-hour {price_per_hour:g}"
    elif price_per_kwh is not None:
        price, basis = joules and price_per_kwh * joules / 3.6e6, f"--price-per-kwh {price_per_kwh:g}"
    return Costs(
        epoch_seconds=seconds,
        training_seconds=epochs * seconds,
        epoch_joules=joules,
        training_joules=None if joules is None else epochs * joules,
        epoch_price=price,
        training_price=None if price is None else epochs * price,
        price_basis=basis,
    )
