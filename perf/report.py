"""report.json: what profile/throughput.py measured, as types, and how it is read. None: not measured, or not there in a run."""

from pathlib import Path
from typing import Annotated, Any

import msgspec

from common.errors import UserError

PROGRAM, FORMAT, REPORT_JSON = "throughput", 2, "report.json"
STAGES = ("reading", "decoding", "loader", "step", "training")
_WRITER = "profile/throughput.py"


class Record(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Keyword arguments only; a key of the file that no field names is refused."""


class Summary(Record):
    """Of single values: steps or laps of several steps, or a GPU's readings."""

    mean: float
    median: float
    p5: float
    p95: float
    min: float
    max: float


class Rate(Record):
    """What a stage did: images over time, all of it, but for its warm-up. Times are the slowest rank's."""

    images: int  # of all ranks, in the steps that count
    seconds: float
    images_per_second: Annotated[float, msgspec.Meta(gt=0)]
    interval: tuple[float, float] | None  # 95 % confidence, autocorrelation allowed for; None: too few steps to say
    images_per_second_per_rank: Annotated[list[float], msgspec.Meta(min_length=1)]  # in order, by own seconds
    step_seconds: Summary
    series_seconds: list[float]  # in order: seconds a step of each lap
    steps_a_lap: int
    stopped_by: str  # precision, time or steps
    cpu_seconds_per_step: float  # processor time of the rank that needs most, all threads
    cores_of_others: float  # how many of the cores that rank 0's machine gives us other programs kept busy, on average

    @property
    def relative_ci(self) -> float | None:
        """Half the interval's width over the rate."""
        return self.interval and (self.interval[1] - self.interval[0]) / 2 / self.images_per_second

    @property
    def slowest_rank(self) -> int:
        return self.images_per_second_per_rank.index(min(self.images_per_second_per_rank))

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
    """Seconds of rank 0 in the step alone, which they add up to; backward is without the all-reduce, all_reduce what it adds."""

    forward: Summary
    backward: Summary
    all_reduce: Summary | None
    optimizer: Summary


class TrainingParts(Record):
    """Seconds of rank 0 in a step of training, by its own marks."""

    data_wait: Summary  # from asking for a batch to having it
    forward: Summary
    backward: Summary  # with what of the all-reduce it does not hide
    optimizer: Summary
    step: Summary  # the whole step less data_wait: the parts, and what lies between them


class AllReduceAlone(Record):
    seconds: Summary
    bytes_per_rank: int


class WarmUp(Record):
    """What the figures leave out."""

    steps: int
    seconds: float
    compile_seconds: float | None  # of the first pass, compilation included; None where nothing is compiled
    first_batch_seconds: float | None


class Hardware(Record):
    """device: cpu or cuda. cores, memory: what rank 0's machine gives us."""

    device: str
    name: str
    ranks: int
    machines: int
    cpu: str
    cores: int
    memory_gib: float
    torch: str
    dali: str
    driver: str | None


class DeviceMemory(Record):
    """Of the GPU of rank 0, over the whole measurement: at most reserved by torch, or in use by NVML, which sees DALI's too."""

    peak_bytes: int
    total_bytes: Annotated[int, msgspec.Meta(gt=0)]


class Kernel(Record):
    """Of the device, in a traced step of training; on a CPU, an operator."""

    name: str
    seconds_per_step: float
    calls_per_step: float


class Trace(Record):
    """A few steps under torch.profiler, which slows them down; with the ten costliest kernels, and the ten longest gaps."""

    steps: int
    step_seconds: float
    busy_seconds_per_step: float  # at least one kernel was running
    kernels: list[Kernel]
    gaps: list[tuple[float, str]]  # seconds in which the device did nothing, and the kernel that ended them


class Ceiling(Record):
    """What training could reach at most, by its parts as they were measured."""

    images_per_second: float
    set_by: str
    training_over_ceiling: float | None
    why_not: str | None


class Peaks(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """What one device does at most in one precision."""

    name: str
    source: str  # table or measured
    flops_per_second: float  # matrix products, two FLOP a multiply-add, dense
    bytes_per_second: float  # memory, reads and writes together
    watts: float | None  # power limit by the table; None where the peaks were measured, or no document states one


class FloorSeconds(Record):
    """The least time of one device for the parts of one step."""

    forward: float
    backward: float
    optimizer: float
    all_reduce: float  # all of it, also what the backward pass hides. 0 where no links are known
    total: float  # with what of the all-reduce the backward pass cannot hide


class Layer(Record):
    """Forward and backward of one step together. Unfused: bias, ReLU and dropout are kernels of their own, as in eager mode."""

    name: str
    kind: str
    flops: float
    bytes: float
    bytes_unfused: float
    floor_seconds: float
    floor_seconds_unfused: float
    measured_seconds: float | None


class Scaled(Record):
    images_per_second: float
    efficiency: float  # of ranks times one device
    all_reduce_seconds: float
    exposed_seconds: float  # of the all-reduce: what the backward pass does not hide
    images_per_second_without_overlap: float
    sharing: int = 1  # devices that share FC6 and FC7; 1: each has its own


class Prediction(Record):
    """For so many devices, each with the same batch; with gradients in float32 (plain), in 16 bits (compressed), and in float32
    where devices share FC6 and FC7 (hybrid; None where these do not divide among them)."""

    ranks: int
    algorithm: str  # ring, tree or in-switch
    plain: Scaled
    compressed: Scaled
    hybrid: Scaled | None = None


class Links(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """What joins the devices, in each direction, and where we know it from."""

    peer_bytes_per_second: float  # of one device to the others of its machine
    network_bytes_per_second: float  # of one machine to the others, for all its devices together
    gpus_per_node: int
    latency_seconds: float  # of one message, however small
    in_switch: bool = False  # whether the switch within a machine adds up (NVLink SHARP)
    source: str = "assumed"  # where the rates are from, for people: flags, the table of GPUs, assumed


class Roofline(Record):
    peaks: Peaks
    floor_seconds: FloorSeconds
    floor_seconds_unfused: FloorSeconds
    flops_per_image: float
    optimizer_bytes: int
    all_reduce_bytes: int
    mfu: float | None
    images_per_joule: float | None  # of this machine's GPUs; None of a part of a GPU (MIG), whose energy nobody knows
    layers: list[Layer]
    links: Links | None  # None: nobody has named them, and the table of GPUs does not know them
    scaling_from: str  # measured or floor
    scaling: list[Prediction]  # empty where there are no links that we know of


class Costs(Record):
    """Of an epoch at the measured rate, validation and checkpoints apart; the training is so many of them."""

    epochs: int
    seconds: float
    joules: float | None  # of all GPUs
    price: float | None
    price_basis: str | None  # the flag and its value, such as --price-per-hour 12; None: no price was given


class Device(Record):
    """One GPU over a window of time."""

    machine: int  # 0 is rank 0's
    index: int  # NVML's, on its machine
    uuid: str
    name: str
    energy_joules: float | None
    energy_source: str | None
    fields: dict[str, Summary | None]
    throttled_fraction: dict[str, float] | None
    max_sm_clock_mhz: float | None  # the highest that the card has
    power_limit_watts: float | None  # that is enforced
    default_power_limit_watts: float | None
    is_mig: bool
    missing: dict[str, str]
    series: dict[str, list[float | None]]  # by reading, and "seconds" since the sampling began; all of one length

    def __post_init__(self) -> None:
        if len({len(values) for values in self.series.values()}) > 1:
            raise ValueError("Lists of several lengths")


class Telemetry(Record):
    reason: str | None  # why there are no devices, or not all
    devices: list[Device]  # over the whole measurement, of all machines
    stages: dict[str, list[Device]]  # by stage, in the order of devices; series is empty
    stage_seconds: dict[str, tuple[float, float]]  # first and last second, of the series' time


class Figure(Record):
    name: str
    value: float
    unit: str


class Advice(Record):
    flags: str
    why: str


class Verdict(Record):
    bound: str  # throttled, input, launch, communication, optimizer, memory, kernels, compute or inconclusive
    sentence: str
    evidence: list[Figure]
    tries: list[Advice] = msgspec.field(name="try")  # flags of train.py to try next, in order
    cautions: list[str]  # why the figures are less sure than they look; some where the verdict is inconclusive


class Report(Record):
    program: str
    format: int
    created: str  # ISO 8601, UTC
    git_revision: str | None
    hardware: Hardware
    config: dict[str, Any]  # of train.py, each "auto" as it came out; and images_in: shards, files or none
    changed: list[str]  # the keys of config that were given another value than the default
    warm_up: WarmUp
    stages: Stages
    step_parts: StepParts
    training_parts: TrainingParts | None
    all_reduce: AllReduceAlone | None  # by itself, with nothing beside it; None for a single rank
    host_seconds_per_step: float | None
    memory: DeviceMemory | None
    trace: Trace | None
    ceiling: Ceiling
    roofline: Roofline
    costs: Costs | None  # None for noise, of which there is no epoch
    telemetry: Telemetry
    verdict: Verdict


def read_report(path: Path) -> Report:
    """Raises UserError: no such file, not JSON, not a report, one of another format."""
    try:
        found = msgspec.json.decode(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not JSON; give the report.json that {_WRITER} wrote") from error
    if not isinstance(found, dict) or found.get("program") != PROGRAM:
        raise UserError(f"{path}: not a report; give the report.json that {_WRITER} wrote")
    if (number := found.get("format")) != FORMAT:
        raise UserError(f"{path}: of format {number}, not {FORMAT}; show it with the revision that wrote it")
    try:
        report = msgspec.convert(found, Report)
        if type(size := report.config.get("batch_size")) is not int or size < 1:
            raise msgspec.ValidationError("Expected `int` >= 1 - at `$.config.batch_size`")
        return report
    except msgspec.ValidationError as error:
        raise UserError(f"{path}: not a whole report ({error}); measure again with {_WRITER}") from error
