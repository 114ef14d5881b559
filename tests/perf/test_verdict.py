"""The verdict on made-up reports: a run without a bottleneck of its own, into which one is planted; and the ceiling."""

import copy
import shlex
from collections.abc import Callable
from functools import cache

import msgspec
import pytest

from engine.config import parse_args
from perf.advice import SHARED_CORES
from perf.report import Device, Layer, Rate, Report, Stages, TrainingParts
from perf.verdict import NO_VERDICT, ceiling, judge
from tests.support.made_up_report import cpu_report, gpu_report, rate, summary

Plant = Callable[[Report], None]
EXPLAINED, ARITHMETIC = 0.8, 0.5
"""Of the healthy run's forward and backward: what the floor and the arithmetic at the peak rate take."""


def healthy(device: str) -> Report:
    """A run that does nothing but arithmetic: two ranks on GPUs, or one on a CPU."""
    report = gpu_report() if device == "cuda" else cpu_report()
    ranks, batch = report.hardware.ranks, report.config["batch_size"]
    report.config |= {"images_in": "files", "read_threads": None, "read_ahead": 8, "order": "global", "compile": True}
    report.stages = Stages(
        reading=rate(60_000, batch, ranks),
        decoding=rate(24_000, batch, ranks),
        loader=rate(20_000, batch, ranks),
        step=rate(6000, batch, ranks),
        training=rate(5900, batch, ranks),
    )
    step = batch / 6000
    report.step_parts.forward, report.step_parts.backward = summary(0.28 * step), summary(0.62 * step)
    report.step_parts.all_reduce = summary(0.04 * step) if ranks > 1 else None
    report.step_parts.optimizer = summary(0.06 * step)
    assert report.training_parts
    report.training_parts.data_wait, report.training_parts.step = summary(0.01 * step), summary(step)
    report.host_seconds_per_step = 0.1 * step
    report.ceiling.set_by, report.ceiling.training_over_ceiling = "step", 5900 / 6000
    report.roofline.mfu = 0.45
    split(report, arithmetic=ARITHMETIC, explained=EXPLAINED)
    for devices in report.telemetry.stages.values():
        for gpu in devices:
            gpu.throttled_fraction = dict.fromkeys(gpu.throttled_fraction or {}, 0.0)
    return report


def split(report: Report, *, arithmetic: float, explained: float) -> None:
    """What part of forward and backward the arithmetic takes at the peak rate, and what the floor does."""
    passes = report.step_parts.forward.mean + report.step_parts.backward.mean
    for floor in (report.roofline.floor_seconds, report.roofline.floor_seconds_unfused):
        floor.forward, floor.backward = 0.3 * explained * passes, 0.7 * explained * passes
    layers: list[Layer] = report.roofline.layers
    flops = arithmetic * passes * report.roofline.peaks.flops_per_second
    times = flops / sum(layer.flops for layer in layers)
    for layer in layers:
        layer.flops *= times


def gpu_of(report: Report) -> Device:
    return report.telemetry.stages["training"][-1]


def throttle(relative_clock: float, limit: float = 700.0, **shares: float) -> Plant:
    def plant(report: Report) -> None:
        gpu = gpu_of(report)
        gpu.throttled_fraction = shares
        clock = gpu.fields["sm_clock_mhz"]
        assert clock
        clock.median = clock.max = 1980 * relative_clock  # always so: no sample is of the card's full speed
        gpu.max_sm_clock_mhz, gpu.power_limit_watts = 1980.0, limit

    return plant


def set_rates(report: Report, **rates: float) -> None:
    for name, value in rates.items():
        setattr(report.stages, name, rate(value, report.config["batch_size"], report.hardware.ranks))


def slow_disk(report: Report) -> None:
    set_rates(report, reading=3100, loader=3000, training=2950)


def very_slow_disk(report: Report) -> None:
    set_rates(report, reading=1000, loader=950, training=940)


def slow_decoder(report: Report) -> None:
    set_rates(report, decoding=3200, loader=3000, training=2950)


def wait_for_images(share: float) -> Plant:
    def plant(report: Report) -> None:
        parts = report.training_parts
        assert parts
        parts.data_wait = summary(share / (1 - share) * parts.step.mean)

    return plant


def slow_host(report: Report) -> None:
    report.host_seconds_per_step = 0.95 * step_seconds(report)


def slow_part(part: str, share: float) -> Plant:
    def plant(report: Report) -> None:
        step = step_seconds(report)
        setattr(report.step_parts, part, summary(share * step))
        report.step_parts.backward = summary((0.9 - share) * step)
        split(report, arithmetic=ARITHMETIC, explained=EXPLAINED)

    return plant


def passes(arithmetic: float, explained: float) -> Plant:
    def plant(report: Report) -> None:
        split(report, arithmetic=arithmetic, explained=explained)
        report.roofline.mfu = 0.9 * arithmetic

    return plant


def nothing(report: Report) -> None:
    pass


def step_seconds(report: Report) -> float:
    return report.stages.step.step_seconds.mean


CLOCK = "median SM clock, of the card's highest"
CASES = [
    ("cuda", throttle(0.6, sw_thermal=0.4), "throttled", {"time with sw_thermal": 40, CLOCK: 60}),
    ("cuda", throttle(0.5, sw_power_cap=0.9), "throttled", {"time with sw_power_cap": 90, CLOCK: 50}),
    ("cuda", throttle(0.8, limit=400, sw_power_cap=0.9), "throttled", {"time with sw_power_cap": 90, CLOCK: 80}),
    ("cuda", throttle(0.5, hw_slowdown=1.0, hw_power_brake=1.0), "throttled", {"time with hw_power_brake": 100}),
    ("cuda", throttle(0.5, hw_slowdown=0.3), "throttled", {"time with hw_slowdown": 30}),
    ("cuda", throttle(0.4, applications_clocks_setting=1.0), "throttled", {CLOCK: 40}),
    ("cuda", throttle(0.85, sw_power_cap=0.9), "compute", {"MFU of the step alone": 45}),
    ("cuda", throttle(0.85, limit=690, sw_power_cap=0.9), "compute", {"MFU of the step alone": 45}),
    ("cuda", throttle(0.95, limit=400, sw_power_cap=0.1), "compute", {"MFU of the step alone": 45}),
    ("cuda", throttle(0.85, hw_power_brake=0.03), "compute", {"MFU of the step alone": 45}),
    ("cuda", slow_disk, "input", {"loader alone": 3000, "step alone": 6000}),
    ("cpu", slow_disk, "input", {"loader alone": 3000, "step alone": 6000}),
    ("cuda", slow_decoder, "input", {"loader alone": 3000, "step alone": 6000}),
    ("cpu", slow_decoder, "input", {"loader alone": 3000, "step alone": 6000}),
    ("cuda", wait_for_images(0.2), "input", {"data wait, of a training step": 20, "loader alone": 20_000}),
    ("cpu", wait_for_images(0.2), "compute", {"MFU of the step alone": 45}),
    ("cuda", slow_host, "launch", {"host, a step": 81.07, "step alone": 85.33}),
    ("cpu", slow_host, "launch", {"host, a step": 5.067, "step alone": 5.333}),
    ("cuda", slow_part("all_reduce", 0.5), "communication", {"all-reduce, exposed": 42.67, "step alone": 85.33}),
    ("cuda", slow_part("all_reduce", 0.2), "compute", {"MFU of the step alone": 45}),
    ("cuda", slow_part("optimizer", 0.4), "optimizer", {"optimizer": 34.13, "step alone": 85.33}),
    ("cpu", slow_part("optimizer", 0.4), "optimizer", {"optimizer": 2.133, "step alone": 5.333}),
    # As H100s are measured: D at 256 compiled, the same with batch norm, uncompiled; and at 3 % of the peak.
    ("cuda", passes(0.44, 0.83), "compute", {"MFU of the step alone": 39.6}),
    ("cuda", passes(0.34, 0.88), "memory", {"memory traffic, of forward and backward": 54, "arithmetic": 34}),
    ("cuda", passes(0.03, 0.05), "kernels", {"MFU of the step alone": 2.7, "floor, of forward and backward": 5}),
    ("cpu", passes(0.03, 0.05), "kernels", {"MFU of the step alone": 2.7, "floor, of forward and backward": 5}),
    ("cuda", passes(0.3, 0.4), "kernels", {"floor, of forward and backward": 40}),
    ("cpu", passes(0.3, 0.4), "compute", {"MFU of the step alone": 27}),
    ("cpu", passes(0.2, 0.6), "memory", {"memory traffic, of forward and backward": 40, "arithmetic": 20}),
    ("cuda", nothing, "compute", {"forward and backward, of the step alone": 90, "MFU of the step alone": 45}),
    ("cpu", nothing, "compute", {"forward and backward, of the step alone": 90, "MFU of the step alone": 45}),
]  # fmt: skip


@pytest.mark.parametrize(("device", "plant", "bound", "figures"), CASES)
def test_the_planted_bottleneck_is_named_with_its_two_figures(device, plant, bound, figures):
    report = healthy(device)
    plant(report)
    before = copy.deepcopy(report)
    verdict = judge(report)
    assert report == before, "judging changes nothing"
    assert verdict.bound == bound
    assert len(verdict.evidence) == 2
    evidence = {figure.name: figure.value for figure in verdict.evidence}
    for name, value in figures.items():
        assert evidence[name] == pytest.approx(value, rel=1e-3)
    assert verdict.sentence.lower().startswith("inefficient kernels" if bound == "kernels" else bound)
    assert verdict.cautions == []
    report.verdict = NO_VERDICT
    assert judge(report) == verdict, "the verdict that is there already does not matter"
    report.verdict = verdict
    msgspec.json.encode(report)


# ---- on either side of each threshold --------------------------------------------------------------------------------


def host(share: float) -> Plant:
    def plant(report: Report) -> None:
        report.host_seconds_per_step = share * step_seconds(report)

    return plant


def both_parts(all_reduce: float, optimizer: float) -> Plant:
    def plant(report: Report) -> None:
        slow_part("all_reduce", all_reduce)(report)
        slow_part("optimizer", optimizer)(report)

    return plant


EDGES: list[tuple[str, Callable[[float], Plant], float, str, str]] = [
    # device, plant, threshold; the verdicts 1 % below it and 1 % above it
    ("cuda", lambda share: throttle(0.9, sw_thermal=share), 0.1, "compute", "throttled"),
    ("cuda", lambda share: throttle(0.9, hw_thermal=share), 0.1, "compute", "throttled"),
    ("cuda", lambda share: throttle(0.9, hw_power_brake=share), 0.1, "compute", "throttled"),
    ("cuda", lambda share: throttle(0.9, hw_slowdown=share), 0.1, "compute", "throttled"),
    ("cuda", lambda share: throttle(0.6, sw_power_cap=share), 0.5, "compute", "throttled"),
    ("cuda", lambda share: throttle(0.9, limit=400, sw_power_cap=share), 0.5, "compute", "throttled"),
    ("cuda", lambda share: throttle(0.6, applications_clocks_setting=share), 0.5, "compute", "throttled"),
    ("cuda", lambda clock: throttle(clock, sw_power_cap=1.0), 0.7, "throttled", "compute"),
    ("cuda", lambda clock: throttle(clock, applications_clocks_setting=1.0), 0.7, "throttled", "compute"),
    ("cuda", lambda share: throttle(0.9, limit=700 * share, sw_power_cap=1.0), 0.95, "throttled", "compute"),
    ("cuda", wait_for_images, 0.05, "compute", "input"),
    ("cuda", host, 0.9, "compute", "launch"),
    ("cpu", host, 0.5, "compute", "launch"),
    ("cuda", lambda share: slow_part("all_reduce", share), 1 / 3, "compute", "communication"),
    ("cuda", lambda share: slow_part("optimizer", share), 1 / 3, "compute", "optimizer"),
    ("cpu", lambda share: slow_part("optimizer", share), 1 / 3, "compute", "optimizer"),
    ("cuda", lambda share: both_parts(share, 0.4), 0.4, "optimizer", "communication"),
    ("cuda", lambda explained: passes(0.3, explained), 0.5, "kernels", "compute"),
    ("cpu", lambda explained: passes(0.2, explained), 0.25, "kernels", "compute"),
    ("cuda", lambda explained: passes(0.4, explained), 0.8, "compute", "memory"),
    ("cpu", lambda explained: passes(0.4, explained), 0.8, "compute", "memory"),
]  # fmt: skip


@pytest.mark.parametrize(("device", "plant", "threshold", "below", "above"), EDGES)
def test_the_verdict_changes_at_the_threshold_that_the_docs_name(device, plant, threshold, below, above):
    for value, bound in ((0.99 * threshold, below), (1.01 * threshold, above)):
        report = healthy(device)
        plant(value)(report)
        assert judge(report).bound == bound, value


@pytest.mark.parametrize(("times", "bound"), [(0.99, "input"), (1.01, "compute")])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_loader_is_slower_than_the_step_by_however_little(device, times, bound):
    assert judge(planted(device, lambda report: set_rates(report, loader=6000 * times))).bound == bound


@pytest.mark.parametrize("stage", ["loader", "step", "training"])
def test_a_rate_is_well_known_to_5_percent(stage):
    for relative_ci, known in ((0.0495, True), (0.0505, False)):
        cautions = judge(planted("cuda", vary(relative_ci, stage))).cautions
        assert any("is known to ±5% only" in caution for caution in cautions) != known, relative_ci


def test_beyond_5_percent_a_close_call_is_no_verdict():
    for relative_ci, bound in ((0.0495, "compute"), (0.0505, "inconclusive")):
        assert judge(planted("cuda", near_tie, vary(relative_ci, "step"), vary(0.04, "loader"))).bound == bound


@pytest.mark.parametrize(("device", "cores"), [("cpu", 2), ("cuda", 26)])
def test_others_are_told_of_from_a_tenth_of_the_cores_on(device, cores):
    def said(**others: float) -> list[str]:
        of_cores = {name: share * cores for name, share in others.items()}
        return [caution for caution in judge(planted(device, busy(**of_cores))).cautions if "programs" in caution]

    assert said(loader=0.099, step=0.099, training=0.099) == []
    (steady,) = said(loader=0.101, step=0.101, training=0.101)
    assert steady.startswith("Other programs")
    (steady,) = said(loader=0.2, step=0.101, training=0.15)
    assert steady.startswith("Other programs")
    (changed,) = said(loader=0.2, step=0.099, training=0.15)
    assert changed.startswith("The machine changed: other programs")


def test_cores_that_others_took_from_a_gpu_s_loader_may_have_made_the_difference():
    loader_is_slower = [lambda report: set_rates(report, loader=5400, decoding=5500)]
    assert judge(planted("cuda", *loader_is_slower)).bound == "input"
    assert judge(planted("cuda", *loader_is_slower, busy(loader=9.0))).bound == "inconclusive"


def test_what_is_not_known_at_all_is_known_to_a_tenth_at_least():
    """Where others took nearly all cores, the rate may have been ten times as high, not a thousand times."""
    report = planted("cpu", near_tie, vary(0.1, "step"), busy(step=1.999))
    low, high = (figure.value for figure in judge(report).evidence)
    assert (low, high) == pytest.approx((0.9 * 6000, 10 * 1.1 * 6000))


@pytest.mark.parametrize(("gap", "named"), [(0.0495, False), (0.0505, True)])
def test_a_rank_is_slow_from_5_percent_on(gap, named):
    report = healthy("cuda")
    report.hardware.ranks = 4
    for stage in ("reading", "decoding", "loader", "step", "training"):
        getattr(report.stages, stage).images_per_second_per_rank = [5000.0] * 4
    report.stages.step.images_per_second_per_rank = [5000.0, 5000.0 * (1 - gap), 5000.0, 5000.0]
    assert ("Rank 1 is 5% slower" in judge(report).sentence) == named


@pytest.mark.parametrize(("excess", "suspicious"), [(1.095, False), (1.105, True)])
def test_a_floor_is_suspicious_from_a_tenth_more_than_was_measured(excess, suspicious):
    assert (
        any("their floor" in caution for caution in judge(planted("cpu", passes(1.0, excess))).cautions) == suspicious
    )


# ---- throttled --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plant", "says", "says_not"),
    [
        (throttle(0.5, hw_slowdown=1.0, hw_power_brake=1.0), "a power brake", "heat"),
        (throttle(0.5, hw_slowdown=1.0, hw_thermal=1.0), "heat", "brake"),
        (throttle(0.5, hw_slowdown=1.0, hw_thermal=0.2), "NVML does not tell", "brake"),
        (throttle(0.8, limit=400, sw_power_cap=0.9), "a constant power cap, 400 W where the card's default is 700 W", "heat"),
        (throttle(0.5, sw_power_cap=0.9), "the card's power limit", "constant"),
    ],
)  # fmt: skip
def test_the_cause_is_called_by_its_name(plant, says, says_not):
    report = healthy("cuda")
    plant(report)
    sentence = judge(report).sentence
    assert says in sentence
    assert says_not not in sentence
    assert "GPU 1 " in sentence


def test_the_machine_of_the_gpu_is_named():
    report = healthy("cuda")
    throttle(0.5, sw_thermal=0.5)(report)
    report.hardware.machines, gpu_of(report).machine = 2, 1
    assert "GPU 1 of machine 1" in judge(report).sentence


def test_a_gpu_that_is_held_down_is_one_however_unsure_the_rates_are():
    report = healthy("cuda")
    throttle(0.5, sw_thermal=0.5)(report)
    report.ceiling.training_over_ceiling = 1.4
    report.stages.step.interval = None
    verdict = judge(report)
    assert verdict.bound == "throttled"
    assert any("few" in caution for caution in verdict.cautions)


# ---- inconclusive -----------------------------------------------------------------------------------------------------


def vary(relative_ci: float | None, *stages: str) -> Plant:
    """Give those stages another interval of the same rate."""

    def plant(report: Report) -> None:
        for name in stages:
            old: Rate = getattr(report.stages, name)
            new = rate(
                old.images_per_second, report.config["batch_size"], report.hardware.ranks, relative_ci=relative_ci
            )
            setattr(report.stages, name, new)

    return plant


def near_tie(report: Report) -> None:
    set_rates(report, loader=6300, reading=20_000, decoding=6500)


def planted(device: str, *plants: Plant) -> Report:
    report = healthy(device)
    for plant in plants:
        plant(report)
    return report


def busy(**cores: float) -> Plant:
    def plant(report: Report) -> None:
        for name, others in cores.items():
            getattr(report.stages, name).cores_of_others = others

    return plant


def above_the_ceiling(report: Report) -> None:
    report.ceiling.training_over_ceiling = 1.08


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("plants", "reason"),
    [
        ([near_tie, vary(0.1, "loader", "step")], "The loader alone is known to ±10% only"),
        ([near_tie, vary(0.1, "step")], "The step alone is known to ±10% only"),
        ([passes(0.3, 0.26), vary(None, "step")], "steps only, too few"),
        ([near_tie, vary(None, "loader")], "steps only, too few"),
        ([above_the_ceiling], "The machine changed"),
    ],
)
def test_what_the_figures_do_not_carry_is_inconclusive(device, plants, reason):
    if device == "cuda" and plants[0] not in (near_tie, above_the_ceiling):
        plants = [passes(0.3, 0.55), *plants[1:]]
    verdict = judge(planted(device, *plants))
    assert verdict.bound == "inconclusive"
    assert verdict.sentence.startswith("Inconclusive: ")
    assert any(reason in caution for caution in verdict.cautions)
    assert not any(caution.rstrip(".") in verdict.sentence for caution in verdict.cautions), "nothing is said twice"
    low, high = (figure.value for figure in verdict.evidence)
    assert low < high or plants[0] is above_the_ceiling
    assert verdict.tries == []


def test_cores_that_others_took_may_have_made_the_difference():
    """A loader that is 10 % slower than the step, while others had a third of its cores: without them it might be faster."""
    loader_is_slower = [lambda report: set_rates(report, loader=5400, decoding=5500)]
    assert judge(planted("cpu", *loader_is_slower)).bound == "input"
    verdict = judge(planted("cpu", *loader_is_slower, busy(loader=0.7)))
    assert verdict.bound == "inconclusive"
    assert "compute" in verdict.sentence
    assert "input" in verdict.sentence
    (caution,) = verdict.cautions
    assert caution == (
        "The machine changed: other programs kept so many of the 2 cores busy: 0.7 beside the loader alone, 0.0 beside the step "
        "alone, 0.0 beside training. Measure again on a quiet machine."
    )


@pytest.mark.parametrize(
    ("relative_ci", "others", "helps"),
    [
        (0.1, 0.7, ["on a quiet machine", "more --seconds"]),  # longer would not be quieter
        (0.1, 0.0, ["more --seconds"]),
        (None, 0.7, ["more --seconds", "on a quiet machine"]),  # three steps are three steps, on any machine
    ],
)
def test_the_advice_that_fits_the_cause_comes_first(relative_ci, others, helps):
    cautions = judge(planted("cpu", near_tie, vary(relative_ci, "step"), busy(step=others))).cautions
    assert len(cautions) == len(helps)
    for caution, words in zip(cautions, helps, strict=True):
        assert caution.endswith(f"{words}.")


def test_a_machine_that_was_slower_before_training_is_said_once():
    report = planted("cpu", above_the_ceiling, busy(loader=0.7, step=0.7))
    verdict = judge(report)
    assert verdict.sentence == (
        "Inconclusive: training makes 1.08 times the images that loader and step by themselves allow: the machine was slower "
        "when those were measured."
    )
    assert [caution.endswith("Measure again on a quiet machine.") for caution in verdict.cautions] == [True]


def test_what_is_unsure_and_does_not_matter_is_a_caution():
    """The verdict is the same wherever in its interval each rate is."""
    for plants in (
        [slow_disk, vary(0.2, "loader", "step")],
        [very_slow_disk, vary(None, "loader", "training")],
        [slow_disk, busy(loader=0.5, step=0.5, training=0.5)],
        [passes(0.5, 0.85), vary(0.08, "step")],
    ):
        verdict = judge(planted("cpu", *plants))
        assert verdict.bound == ("input" if plants[0] in (slow_disk, very_slow_disk) else "compute")
        assert verdict.cautions
    assert judge(planted("cpu", slow_disk, busy(loader=0.5, step=0.5, training=0.5))).cautions[0].startswith("Other ")


def test_the_step_of_a_gpu_takes_no_cores():
    """With half of the cores more it would be twice as fast, and its kernels efficient: on a CPU."""
    assert judge(planted("cuda", passes(0.3, 0.45), busy(step=13.0))).bound == "kernels"
    assert judge(planted("cpu", passes(0.5, 0.51), busy(step=1.3))).bound == "compute"
    assert judge(planted("cpu", passes(0.2, 0.24), busy(step=1.3))).bound == "inconclusive"


def test_a_wait_is_hardly_longer_than_it_was_however_much_training_varies():
    for share, bound in ((0.01, "compute"), (0.04, "inconclusive"), (0.2, "input")):
        assert judge(planted("cuda", wait_for_images(share), vary(0.08, "training"))).bound == bound, share


def test_parts_of_the_same_steps_are_as_fast_or_as_slow_as_those():
    assert judge(planted("cpu", slow_part("optimizer", 0.3), vary(None, "step"), busy(step=0.8))).bound == "compute"
    assert judge(planted("cpu", slow_part("optimizer", 0.4), vary(None, "step"), busy(step=0.8))).bound == "optimizer"


def test_the_figures_of_what_is_inconclusive_are_the_ends_of_the_rate_that_is_known_least():
    report = planted("cpu", near_tie, vary(0.1, "step"), busy(step=0.5))
    found = [(figure.name, figure.unit, round(figure.value)) for figure in judge(report).evidence]
    assert found == [("the step alone, at least", "images/s", 5400), ("the step alone, at most", "images/s", 8800)]


def test_a_close_call_with_narrow_intervals_is_a_verdict_that_says_so():
    report = planted("cuda", lambda report: set_rates(report, loader=6010), vary(0.01, "loader", "step"))
    verdict = judge(report)
    assert verdict.bound == "compute"
    assert verdict.cautions == ["A close call: within the intervals of the rates, the limit may be compute or input."]


def test_training_is_above_its_ceiling_only_beyond_what_the_intervals_allow():
    for ratio, relative_ci, bound in (
        (1.02, 0.005, "compute"), (1.045, 0.005, "inconclusive"), (1.045, 0.02, "compute"), (2.7, None, "inconclusive"),
    ):  # fmt: skip
        report = planted("cuda", vary(relative_ci, "step", "training"))
        report.ceiling.training_over_ceiling = ratio
        assert judge(report).bound == bound, (ratio, relative_ci)


def test_few_steps_beyond_the_ceiling_carry_no_verdict():
    """Three steps each, half of a step in the all-reduce, and training at 1.49 times its ceiling."""
    report = planted("cuda", slow_part("all_reduce", 0.5), vary(None, "step", "training"))
    assert judge(report).bound == "communication"
    report.ceiling.training_over_ceiling = 1.49
    verdict = judge(report)
    assert verdict.bound == "inconclusive"
    assert "too few steps were measured to say whether by chance" in verdict.sentence


def test_a_step_that_is_faster_than_its_floor_is_suspicious():
    (caution,) = judge(planted("cpu", passes(1.1, 1.3))).cautions
    assert "less than their floor" in caution


# ---- what to try, and who is slow -------------------------------------------------------------------------------------


@cache
def parsed(flags: str) -> tuple[str, object]:
    """The name of the one setting that flags of train.py are for, and its value."""
    words = shlex.split(flags)
    (name,) = [word[2:].removeprefix("no-").replace("-", "_") for word in words if word.startswith("--")]
    return name, vars(parse_args(words))[name]


def flags_of(report: Report) -> list[str]:
    return [each.flags for each in judge(report).tries]


@pytest.mark.parametrize(
    ("images_in", "compiled", "precision"),
    [("files", False, "fp32"), ("shards", True, "fp32"), ("files", True, "bf16")],
)
@pytest.mark.parametrize(("device", "plant", "bound", "figures"), CASES)
def test_flags_are_train_pys_and_change_something(device, plant, bound, figures, images_in, compiled, precision):
    report = healthy(device)
    report.config |= {
        "images_in": images_in, "compile": compiled, "precision": precision, "threads": 1, "decoder": "cpu", "micro_batch": 8,
        "deterministic": True,
    }  # fmt: skip
    plant(report)
    current = {**report.config, "compile": "on" if compiled else "off"}
    tries = flags_of(report)
    assert tries or bound == "throttled"
    assert len(set(tries)) == len(tries)
    for flags in tries:
        name, value = parsed(flags)
        assert value != current[name], flags


def test_what_to_try_fits_the_cause():
    report = planted("cuda", slow_disk)
    assert flags_of(report)[0] == "--threads 28", "twice the 14 that read"
    assert flags_of(report)[-1] == "--data PREPARED"
    report.config |= {"images_in": "shards", "read_threads": 8}
    assert flags_of(report) == ["--read-threads 16", "--read-ahead 16", "--order window"]
    report.config["decoder"] = "none"
    report.stages.decoding = None
    assert flags_of(report)[-1] == "--data PREPARED"
    assert "without --format raw" in judge(report).tries[-1].why

    report = planted("cuda", slow_decoder)
    report.config["decoder"] = "cpu"
    assert flags_of(report)[0] == "--decoder gpu"
    report = planted("cpu", slow_decoder)
    report.config["threads"] = 1
    assert flags_of(report)[0] == "--threads 3", "one more than the cores"
    report.config["images_in"] = "shards"
    assert "prepare --format raw" in judge(report).tries[-1].why

    report = planted("cuda", slow_part("all_reduce", 0.5))
    assert flags_of(report) == ["--grad-compression bf16", "--batch-size 1024"]
    report.config["grad_compression"] = "bf16"
    assert flags_of(report) == ["--batch-size 1024"]

    report = healthy("cuda")
    report.config |= {"precision": "fp32", "compile": False}
    assert flags_of(report)[:2] == ["--precision bf16", "--compile"]
    report = healthy("cpu")
    report.config["precision"] = "bf16"
    assert flags_of(report)[0] == "--precision fp32"
    report = planted("cuda", passes(0.03, 0.05))
    report.config |= {"deterministic": True, "micro_batch": 64}
    assert flags_of(report) == [
        "--no-deterministic", "--compile-mode max-autotune-no-cudagraphs", "--micro-batch 128", "--batch-size 1024",
    ]  # fmt: skip


def test_a_decoder_that_shares_the_gpu_with_the_step_is_told_of():
    report = planted("cuda", wait_for_images(0.2))
    report.config["decoder"] = "gpu"
    found = judge(report)
    assert "shares the GPU" in found.sentence
    assert [one.flags for one in found.tries] == ["--decoder cpu", "--data PREPARED"]
    assert f"{report.hardware.cores} cores" in found.tries[0].why

    report.config["decoder"] = "cpu"
    found = judge(report)
    assert "slower part is decoding" in found.sentence
    assert found.tries[0].flags == "--decoder gpu"


def test_torch_compile_takes_a_third_of_the_traffic_that_fusing_everything_would():
    """Arithmetic 0.4, all traffic 0.15 fused and 0.45 unfused: compiled it is 0.35, less than the arithmetic."""
    report = planted("cuda", passes(0.4, 0.55))
    floor, measured = report.roofline.floor_seconds_unfused, 0.9 * step_seconds(report)
    floor.forward, floor.backward = 0.3 * 0.85 * measured, 0.7 * 0.85 * measured
    assert judge(report).bound == "compute"
    assert "memory traffic 35% at its own" in judge(report).sentence
    report.config["compile"] = False
    assert judge(report).bound == "memory"
    assert judge(report).evidence[0].value == pytest.approx(45)


def test_inefficient_kernels_name_the_layer_that_loses_most():
    report = planted("cuda", passes(0.03, 0.05))
    for layer in report.roofline.layers:
        layer.measured_seconds = layer.floor_seconds_unfused + 1e-4
    loser = report.roofline.layers[3]
    loser.measured_seconds = loser.floor_seconds_unfused + 2e-3
    assert f" {loser.name} loses most" in judge(report).sentence
    for layer in report.roofline.layers:
        layer.measured_seconds = None
    assert "loses most" not in judge(report).sentence


def test_the_first_cause_wins():
    """A hot GPU makes everything slow, and a starved one is bound by nothing of its own."""
    report = planted("cuda", slow_host, slow_part("optimizer", 0.5))
    assert judge(report).bound == "launch"
    slow_disk(report)
    assert judge(report).bound == "input"
    throttle(0.5, sw_thermal=0.5)(report)
    assert judge(report).bound == "throttled"


def test_what_was_not_measured_does_not_matter():
    report = healthy("cuda")
    report.stages = Stages(reading=None, decoding=None, loader=None, step=report.stages.step, training=None)
    report.training_parts = report.host_seconds_per_step = report.step_parts.all_reduce = None
    report.ceiling.training_over_ceiling = None
    report.telemetry.devices, report.telemetry.stages = [], {}
    assert judge(report).bound == "compute"
    report = healthy("cuda")
    for gpu in report.telemetry.stages["training"]:
        gpu.throttled_fraction = None
        gpu.fields = dict.fromkeys(gpu.fields)
        gpu.max_sm_clock_mhz = gpu.power_limit_watts = gpu.default_power_limit_watts = None
    assert judge(report).bound == "compute"
    gpu_of(report).throttled_fraction = {"sw_thermal": 0.5, "sw_power_cap": 1.0}
    assert [figure.name for figure in judge(report).evidence] == ["time with sw_thermal"]


def test_the_slowest_rank_is_named_and_is_what_the_loader_makes():
    report = healthy("cuda")
    report.hardware.ranks, report.hardware.machines = 4, 2
    for stage in ("reading", "decoding", "loader", "step", "training"):
        getattr(report.stages, stage).images_per_second_per_rank = [5000.0] * 4
    loader = report.stages.loader
    assert loader
    loader.images_per_second_per_rank = [5000.0, 5000.0, 1400.0, 5000.0]
    verdict = judge(report)
    assert verdict.bound == "input"
    assert verdict.evidence[0].value == 4 * 1400
    assert verdict.sentence.endswith(
        "Rank 2 (machine 1) is 72% slower than the median rank in loader: in training, all wait for it."
    )
    loader.images_per_second_per_rank = [5000.0, 5000.0, 4800.0, 5000.0]
    assert "Rank" not in judge(report).sentence
    for relative_ci, gap, named in ((0.44, 0.23, False), (0.44, 0.5, True), (None, 0.4, False), (None, 0.6, True)):
        loader.interval = (
            None
            if relative_ci is None
            else ((1 - relative_ci) * loader.images_per_second, (1 + relative_ci) * loader.images_per_second)
        )
        loader.images_per_second_per_rank = [5000.0, 5000.0, (1 - gap) * 5000.0, 5000.0]
        assert ("Rank 2" in judge(report).sentence) == named, (relative_ci, gap)


# ---- the ceiling ------------------------------------------------------------------------------------------------------


def stage(images_per_second: float, cpu_seconds: float = 0.0, *, others: float = 0.0, ranks: int = 1) -> Rate:
    made = rate(images_per_second, 100, ranks)
    made.cpu_seconds_per_step, made.cores_of_others = cpu_seconds, others
    return made


def parts(wait: float, work: float) -> TrainingParts:
    some = summary(0.1)
    return TrainingParts(data_wait=summary(wait), forward=some, backward=some, optimizer=some, step=summary(work))


def ceiling_of(loader, step, training, training_parts=None, *, ranks=1, cores=2.0):
    stages = Stages(reading=None, decoding=None, loader=loader, step=step, training=training)
    return ceiling(stages, training_parts, batch_size=100, ranks=ranks, cores_per_rank=cores)


@pytest.mark.parametrize(("loader", "step", "expected"), [(300, 200, 120), (200, 300, 120), (1000, 10, 1000 / 101)])
def test_on_shared_cores_the_rates_add_up_as_resistances_do(loader, step, expected):
    """Each keeps both cores busy all the time: 1 / (1/loader + 1/step)."""
    found = ceiling_of(stage(loader, 2 * 100 / loader), stage(step, 2 * 100 / step), stage(0.99 * expected))
    assert found.images_per_second == pytest.approx(expected)
    assert (found.set_by, found.why_not) == (SHARED_CORES, None)
    assert found.training_over_ceiling == pytest.approx(0.99)


@pytest.mark.parametrize(("loader", "step", "set_by"), [(300, 200, "step"), (150, 200, "loader")])
def test_a_loader_that_only_waits_takes_no_core_from_the_step(loader, step, set_by):
    found = ceiling_of(stage(loader, 0.001), stage(step, 2 * 100 / step * 0.9), stage(min(loader, step)))
    assert (found.images_per_second, found.set_by) == (min(loader, step), set_by)


def test_the_slowest_rank_counts():
    """100 images a step: 50 each. One rank's loader makes 60 images/s, the other's 100."""
    loader = stage(160, ranks=2)
    loader.images_per_second_per_rank = [100.0, 60.0]
    found = ceiling_of(loader, stage(400, ranks=2), stage(119, ranks=2), ranks=2)
    assert (found.images_per_second, found.set_by) == (120, "loader")


def test_why_training_is_slower_is_said_in_figures():
    found = ceiling_of(stage(1000, 0.2), stage(250, 0.8), stage(100 / 0.7), parts(0.1, 0.6))
    assert found.set_by == SHARED_CORES
    assert found.images_per_second == pytest.approx(100 / 0.5)
    assert found.why_not == (
        "a step of training takes 700 ms where the ceiling has 500 ms; 100 ms of it it waits for images; its own work takes "
        "600 ms instead of 400 ms alone, beside the loader's threads on the same cores"
    )


def test_other_programs_are_a_reason():
    found = ceiling_of(stage(1000), stage(250, others=0.04), stage(200, others=1.26), parts(0.0, 0.5))
    assert found.why_not is not None
    assert found.why_not.endswith("other programs kept 1.3 cores busy meanwhile, 0.0 before")


def test_more_than_the_ceiling_is_no_success():
    found = ceiling_of(stage(1000), stage(250, others=1.26), stage(300, others=0.04), parts(0.0, 1 / 3))
    assert found.training_over_ceiling == pytest.approx(1.2)
    assert found.why_not is not None
    assert found.why_not.startswith("the ceiling is too low")
    assert found.why_not.endswith("kept 1.3 cores busy beside the step alone, 0.0 in training")


def test_without_images_there_is_only_the_step():
    found = ceiling_of(None, stage(200, 0.9), None)
    assert (found.images_per_second, found.set_by) == (200, "step")
    assert found.training_over_ceiling is found.why_not is None


def test_the_slowest_rank_of_the_step_counts():
    step = stage(400, ranks=2)
    step.images_per_second_per_rank = [250.0, 150.0]
    assert ceiling_of(None, step, None, ranks=2).images_per_second == 300
    assert ceiling_of(stage(1000, ranks=2), step, stage(290, ranks=2), ranks=2).set_by == "step"


@pytest.mark.parametrize(
    ("ratio", "says"), [(0.969, "a step of training"), (0.971, None), (1.029, None), (1.031, "too low")]
)
def test_near_enough_to_its_ceiling(ratio, says):
    found = ceiling_of(stage(1000), stage(100), stage(100 * ratio), parts(0.0, 1.0))
    assert found.training_over_ceiling == pytest.approx(ratio)
    assert says in found.why_not if says and found.why_not else found.why_not is says


def test_reasons_are_told_from_a_hundredth_of_the_step_on():
    def why(wait: float, work: float, others: float = 0.0) -> str:
        found = ceiling_of(stage(1000), stage(100), stage(90, others=others), parts(wait, work))
        assert found.why_not
        return found.why_not

    assert "waits for images" not in why(0.0099, 1.0)
    assert "waits for images" in why(0.0101, 1.0)
    assert "its own work" not in why(0.0, 1.009)
    assert "its own work" in why(0.0, 1.011)
    assert "beside the loader's threads" not in why(0.0, 1.1), "the step sets the ceiling, not the cores"
    assert "other programs" not in why(0.0, 1.0, others=0.099)
    assert "other programs" in why(0.0, 1.0, others=0.101)
