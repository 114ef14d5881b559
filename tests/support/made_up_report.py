"""Reports as profile/throughput.py writes them, of runs that never were: one on a CPU, one on two GPUs."""

import math
import random
from collections.abc import Sequence

import msgspec
import numpy as np

from perf import report as contract
from perf.report import (
    Advice,
    AllReduceAlone,
    Ceiling,
    Costs,
    Device,
    DeviceMemory,
    Figure,
    FloorSeconds,
    Hardware,
    Kernel,
    Layer,
    Links,
    Peaks,
    Prediction,
    Rate,
    Report,
    Roofline,
    Scaled,
    Stages,
    StepParts,
    Summary,
    Telemetry,
    Trace,
    TrainingParts,
    Verdict,
    WarmUp,
)

GIBI = 1 << 30
# (output channels, side) of the convolutions of configuration D at 224 pixels, by their place in `features`; pools between.
_CONVOLUTIONS = {
    0: (64, 224), 2: (64, 224), 5: (128, 112), 7: (128, 112), 10: (256, 56), 12: (256, 56), 14: (256, 56),
    17: (512, 28), 19: (512, 28), 21: (512, 28), 24: (512, 14), 26: (512, 14), 28: (512, 14),
}  # fmt: skip
_POOLS = {4: (64, 112), 9: (128, 56), 16: (256, 28), 23: (512, 14), 30: (512, 7)}
_LINEAR = {0: (25088, 4096), 3: (4096, 4096), 6: (4096, 1000)}


def summary(mean: float, spread: float = 0.02) -> Summary:
    """The median is the mean; p5 and p95 lie `spread` of it below, and one and a half times as much above."""
    p5, p95 = mean * (1 - spread), mean * (1 + 1.5 * spread)
    return Summary(mean=mean, median=mean, p5=p5, p95=p95, min=p5, max=p95)


def summary_of(values: Sequence[float]) -> Summary:
    low, p5, median, p95, high = np.percentile(values, (0, 5, 50, 95, 100)).tolist()
    return Summary(mean=float(np.mean(values)), median=median, p5=p5, p95=p95, min=low, max=high)


def rate(
    images_per_second: float,
    batch: int,
    ranks: int = 1,
    stopped_by: str = "precision",
    spread: float = 0.02,
    *,
    relative_ci: float | None = 0.008,
    stalls: int = 0,
    steps: int = 120,
) -> Rate:
    """Of all ranks together, each as fast as the others. stalls: steps that take six times as long as the others; the rate is
    that of all steps nevertheless."""
    random_numbers = random.Random(round(images_per_second))
    shape = [max(0.2, random_numbers.gauss(1, spread / 2)) for _ in range(steps)]
    for stall in range(stalls):
        shape[(stall * 37 + 19) % steps] *= 6
    mean = batch / images_per_second
    series = [mean * value * steps / sum(shape) for value in shape]
    interval = None
    if relative_ci is not None:
        interval = images_per_second * (1 - relative_ci), images_per_second * (1 + relative_ci)
    return Rate(
        images=batch * steps,
        seconds=mean * steps,
        images_per_second=images_per_second,
        interval=interval,
        images_per_second_per_rank=[images_per_second / ranks] * ranks,
        step_seconds=summary_of(series),
        series_seconds=series,
        steps_a_lap=1,
        stopped_by=stopped_by,
        cpu_seconds_per_step=0.9 * mean,
        cores_of_others=0.02,
    )


def layers_of_d(batch: int, crop: int, bytes_per_value: int, peaks: Peaks) -> list[Layer]:
    """Forward and backward costs of configuration D's layers, roughly; measured, they take about a fifth longer than unfused."""
    layers: list[Layer] = []

    def add(name: str, kind: str, flops: float, moved: float, unfused: float) -> None:
        floors = [max(flops / peaks.flops_per_second, size / peaks.bytes_per_second) for size in (moved, unfused)]
        if kind in ("conv", "linear"):  # the separate passes cannot hide behind the arithmetic
            floors[1] = floors[0] + (unfused - moved) / peaks.bytes_per_second
        layers.append(
            Layer(
                name=name,
                kind=kind,
                flops=flops,
                bytes=moved,
                bytes_unfused=unfused,
                floor_seconds=floors[0],
                floor_seconds_unfused=floors[1],
                measured_seconds=(1.2 + 0.3 * math.sin(len(layers))) * floors[1],
            )
        )

    channels = 3
    for place in sorted({*_CONVOLUTIONS, *_POOLS}):
        if place in _POOLS:
            channels, side = _POOLS[place][0], _POOLS[place][1] * crop // 224
            size = 10 * batch * channels * side * side * bytes_per_value
            add(f"features.{place}", "pool", 0, size, size)
            continue
        outputs, side = _CONVOLUTIONS[place][0], _CONVOLUTIONS[place][1] * crop // 224
        values = batch * outputs * side * side
        moved = 3 * (values + batch * channels * side * side + 9 * channels * outputs) * bytes_per_value
        add(
            f"features.{place}",
            "conv",
            6 * 9 * channels * values,
            moved,
            moved + 5 * values * bytes_per_value,
        )
        channels = outputs
    for place, (inputs, outputs) in _LINEAR.items():
        moved = 3 * (inputs * outputs + batch * (inputs + outputs)) * bytes_per_value
        add(
            f"classifier.{place}",
            "linear",
            6 * batch * inputs * outputs,
            moved,
            moved + 5 * batch * outputs * bytes_per_value,
        )
    return layers


def _floor(layers: Sequence[Layer], *, unfused: bool, optimizer: float, all_reduce: float, exposed: float):
    passes = sum(layer.floor_seconds_unfused if unfused else layer.floor_seconds for layer in layers)
    return FloorSeconds(
        forward=passes / 3,
        backward=2 * passes / 3,
        optimizer=optimizer,
        all_reduce=all_reduce,
        total=passes + optimizer + exposed,
    )


def cpu_report() -> Report:
    """One rank on a CPU, digits, no NVML: the loader and the step share the cores."""
    peaks = Peaks(
        name="AMD EPYC, 2 cores", source="measured", flops_per_second=1.8e11, bytes_per_second=2.4e10, watts=None
    )
    layers = layers_of_d(12, 32, 4, peaks)
    flops = sum(layer.flops for layer in layers)
    return Report(
        program="throughput",
        format=contract.FORMAT,
        created="2026-11-24T13:00:00+00:00",
        git_revision="dde727a",
        hardware=Hardware(
            device="cpu",
            name="AMD EPYC",
            ranks=1,
            machines=1,
            cpu="AMD EPYC",
            cores=2,
            memory_gib=24.0,
            torch="2.14.1",
            dali="2.4.0",
            driver=None,
        ),
        config={
            "arch": "A",
            "data": "digits",
            "images_in": "files",
            "crop": 32,
            "train_scale": "36",
            "batch_size": 32,
            "micro_batch": 32,
            "precision": "fp32",
            "compile": False,
            "compile_mode": "default",
            "grad_compression": "none",
            "decoder": "cpu",
            "threads": 3,
            "prefetch": 2,
        },
        changed=["arch", "batch_size"],
        warm_up=WarmUp(steps=5, seconds=2.31, compile_seconds=None, first_batch_seconds=0.182),
        stages=Stages(
            reading=rate(41_250.0, 32, spread=0.08),
            decoding=rate(9_870.0, 32, spread=0.05),
            loader=rate(6_120.0, 32, spread=0.04),
            step=rate(118.4, 32, stopped_by="time", spread=0.06, relative_ci=0.011, steps=44),
            training=rate(109.7, 32, stopped_by="time", spread=0.07, relative_ci=0.013, steps=41),
        ),
        step_parts=StepParts(
            forward=summary(0.0716, 0.05),
            backward=summary(0.1648, 0.05),
            all_reduce=None,
            optimizer=summary(0.0321, 0.1),
        ),
        training_parts=TrainingParts(
            data_wait=summary(0.00072, 0.4),
            forward=summary(0.0764, 0.05),
            backward=summary(0.1784, 0.05),
            optimizer=summary(0.0339, 0.1),
            step=summary(32 / 109.7 - 0.00072, 0.07),
        ),
        all_reduce=None,
        host_seconds_per_step=0.0042,
        memory=None,
        trace=None,
        ceiling=Ceiling(
            images_per_second=116.2,
            set_by="cores shared by both",
            training_over_ceiling=109.7 / 116.2,
            why_not="the loader's threads take cores from the step",
        ),
        roofline=Roofline(
            peaks=peaks,
            floor_seconds=_floor(layers, unfused=False, optimizer=0.0194, all_reduce=0.0, exposed=0.0),
            floor_seconds_unfused=_floor(layers, unfused=True, optimizer=0.0194, all_reduce=0.0, exposed=0.0),
            flops_per_image=flops / 32,
            mfu=flops / (32 / 118.4 * peaks.flops_per_second),
            images_per_joule=None,
            optimizer_bytes=465_000_000,
            all_reduce_bytes=93_000_000,
            layers=layers,
            links=Links(
                peer_bytes_per_second=5e10, network_bytes_per_second=5e10, gpus_per_node=1, latency_seconds=1e-5
            ),
            scaling_from="measured",
            scaling=[],
        ),
        costs=Costs(epochs=14, seconds=16.4, joules=None, price=None, price_basis=None),
        telemetry=Telemetry(
            reason="libnvidia-ml.so.1 was not found: there is no NVIDIA driver here",
            devices=[],
            stages={},
            stage_seconds={},
        ),
        verdict=Verdict(
            bound="compute",
            sentence="The step itself limits the run: training waits for data 0.2 % of the time.",
            evidence=[
                Figure(name="data wait, of a training step", value=0.25, unit="%"),
                Figure(name="floor over measured step", value=52.1, unit="%"),
            ],
            tries=[
                Advice(flags="--compile", why="fuses ReLU and bias into the convolutions"),
                Advice(flags="--threads 1", why="leaves the cores to the step"),
            ],
            cautions=[
                "Other programs kept up to 0.4 of the 2 cores busy meanwhile: measure again on a quiet machine.",
            ],
        ),
    )


_STAGE_SECONDS = {
    "reading": (2.0, 7.0),
    "decoding": (8.0, 13.0),
    "loader": (14.0, 22.0),
    "step": (24.0, 39.0),
    "training": (41.0, 60.0),
}


def gpu_report() -> Report:
    """Two ranks with an all-reduce and NVML; GPU 1 has no readings of the JPEG engine and none of the temperature."""
    report = cpu_report()
    peaks = Peaks(name="H100 SXM", source="table", flops_per_second=9.89e14, bytes_per_second=3.35e12, watts=700.0)
    layers = layers_of_d(256, 224, 2, peaks)
    flops = sum(layer.flops for layer in layers)
    hardware = report.hardware
    hardware.device, hardware.name, hardware.driver = "cuda", "NVIDIA H100 80GB HBM3", "580.65"
    hardware.ranks, hardware.cores, hardware.memory_gib = 2, 26, 225.0
    report.config |= {
        "arch": "D", "data": "/data/imagenet", "crop": 224, "train_scale": "256", "batch_size": 512, "micro_batch": 256,
        "precision": "bf16", "compile": True, "decoder": "gpu", "threads": 14,
    }  # fmt: skip
    report.changed = ["arch", "data", "batch_size"]
    report.warm_up = WarmUp(steps=10, seconds=44.0, compile_seconds=41.3, first_batch_seconds=1.82)
    report.stages = Stages(
        reading=rate(61_000.0, 512, 2, steps=400),
        decoding=rate(9_400.0, 512, 2),
        loader=rate(5_350.0, 512, 2, spread=0.05, stalls=3),
        step=rate(6_020.0, 512, 2, spread=0.01, relative_ci=0.003),
        training=rate(5_180.0, 512, 2, stopped_by="time", spread=0.04, relative_ci=0.014, stalls=4, steps=230),
    )
    report.step_parts = StepParts(
        forward=summary(0.0262, 0.01),
        backward=summary(0.0537, 0.01),
        all_reduce=summary(0.0031, 0.2),
        optimizer=summary(0.00204, 0.03),
    )
    report.training_parts = TrainingParts(
        data_wait=summary(0.0112, 0.5),
        forward=summary(0.0264, 0.02),
        backward=summary(0.0576, 0.02),
        optimizer=summary(0.0021, 0.03),
        step=summary(512 / 5180 - 0.0112, 0.02),
    )
    report.all_reduce = AllReduceAlone(seconds=summary(0.0061, 0.1), bytes_per_rank=553_430_176)
    report.host_seconds_per_step = 0.0094
    report.memory = DeviceMemory(peak_bytes=61 * GIBI, total_bytes=80 * GIBI)
    report.trace = Trace(
        steps=3,
        step_seconds=0.1021,
        busy_seconds_per_step=0.0861,
        kernels=[
            Kernel(name=name, seconds_per_step=seconds, calls_per_step=calls)
            for name, seconds, calls in (
                ("sm90_xmma_wgrad_implicit_gemm_indexed_bf16f32_nhwckrsc_nhwc_tilesize128x128x64_warpgroupsize1x1x1", 0.0221, 13),
                ("sm90_xmma_dgrad_implicit_gemm_indexed_bf16f32_nhwckrsc_nhwc", 0.0203, 12),
                ("sm90_xmma_fprop_implicit_gemm_indexed_bf16f32_nhwckrsc_nhwc", 0.0184, 13),
                ("triton_poi_fused_convolution_relu_threshold_backward_3", 0.0064, 13),
                ("triton_poi_fused_convolution_relu_1", 0.0052, 13),
                ("triton_poi_fused_max_pool2d_with_indices_backward_7", 0.0031, 5),
                ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 0.0058, 6),
                ("void multi_tensor_apply_kernel<FusedSgdMathFunctor>", 0.0020, 2),
                ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTT", 0.0019, 9),
                ("Memcpy HtoD (Pinned -> Device)", 0.0004, 2),
            )
        ],
        gaps=[
            (0.0119, "sm90_xmma_fprop_implicit_gemm_indexed_bf16f32_nhwckrsc_nhwc"),
            (0.0104, "sm90_xmma_fprop_implicit_gemm_indexed_bf16f32_nhwckrsc_nhwc"),
            (0.00031, "void multi_tensor_apply_kernel<FusedSgdMathFunctor>"),
        ],
    )  # fmt: skip
    report.ceiling = Ceiling(
        images_per_second=5_350.0, set_by="loader", training_over_ceiling=5_180 / 5_350, why_not=None
    )
    links = Links(
        peer_bytes_per_second=4.5e11,
        network_bytes_per_second=5e10,
        gpus_per_node=8,
        latency_seconds=1e-5,
        in_switch=True,
        source="H100's NVLink, from the table; network 400 Gbit/s assumed",
    )
    report.roofline = Roofline(
        peaks=peaks,
        floor_seconds=_floor(layers, unfused=False, optimizer=0.00083, all_reduce=0.0052, exposed=0.0012),
        floor_seconds_unfused=_floor(layers, unfused=True, optimizer=0.00083, all_reduce=0.0052, exposed=0.0012),
        flops_per_image=flops / 256,
        mfu=flops / (512 / 6020 * peaks.flops_per_second),
        images_per_joule=4.31,
        optimizer_bytes=2_767_000_000,
        all_reduce_bytes=553_430_176,
        layers=layers,
        links=links,
        scaling_from="measured",
        scaling=[_prediction(ranks) for ranks in (1, 2, 4, 8, 64, 512)],
    )
    images = 1_281_167
    report.costs = Costs(
        epochs=74,
        seconds=images / 5180,
        joules=images / 4.31,
        price=12 * images / 5180 / 3600,
        price_basis="--price-per-hour 12",
    )
    devices = [_device(0, 1.0), _device(1, 0.94)]
    for missing in ("temperature_celsius", "jpeg_engine_utilisation_percent"):
        devices[1].fields[missing] = None
        devices[1].series[missing] = [None] * len(devices[1].series["seconds"])
        devices[1].missing[missing] = "Not Supported"
    report.telemetry = Telemetry(
        reason=None,
        devices=devices,
        stages={stage: [_part(device, *span) for device in devices] for stage, span in _STAGE_SECONDS.items()},
        stage_seconds=dict(_STAGE_SECONDS),
    )
    report.verdict = Verdict(
        bound="input",
        sentence="Input limits the run: the GPUs wait for images 11.4 % of each training step.",
        evidence=[
            Figure(name="data wait, of a training step", value=11.4, unit="%"),
            Figure(name="loader alone, of the step alone", value=0.889, unit=""),
        ],
        tries=[
            Advice(flags="--threads 24", why="cores are idle while the loader is behind"),
            Advice(flags="python -m pipeline.prepare", why="smaller files decode faster"),
        ],
        cautions=[],
    )
    return report


def _prediction(ranks: int) -> Prediction:
    efficiency, compressed = (1.0, 1.0) if ranks == 1 else (0.98, 0.99)
    return Prediction(
        ranks=ranks,
        algorithm="ring" if ranks <= 8 else "tree",
        plain=_scaled(ranks, efficiency, 0.0052, 2_850.0),
        compressed=_scaled(ranks, compressed, 0.0026, 2_930.0),
    )


def _scaled(ranks: int, efficiency: float, all_reduce_seconds: float, without_overlap: float) -> Scaled:
    several = ranks > 1
    return Scaled(
        images_per_second=3_010.0 * ranks * efficiency,
        efficiency=efficiency,
        all_reduce_seconds=several * all_reduce_seconds,
        exposed_seconds=several * 0.23 * all_reduce_seconds,
        images_per_second_without_overlap=without_overlap * ranks,
    )


def _device(index: int, scale: float) -> Device:
    """Samples every 0.1 s over 60 s; power and clocks follow the stages."""
    random_numbers = random.Random(index)
    seconds = [round(0.1 * number, 3) for number in range(600)]
    busy = [_load(second) * scale for second in seconds]
    series: dict[str, list[float | None]] = {
        "power_watts": [120 + 570 * load + random_numbers.gauss(0, 6) for load in busy],
        "sm_utilisation_percent": [min(100.0, max(0.0, 99 * load + random_numbers.gauss(0, 2))) for load in busy],
        "memory_utilisation_percent": [min(100.0, max(0.0, 55 * load + random_numbers.gauss(0, 2))) for load in busy],
        "jpeg_engine_utilisation_percent": [78.0 if second > 41 or 8 < second < 22 else 0.0 for second in seconds],
        "sm_clock_mhz": [1980.0 - 180 * (load > 0.9) for load in busy],
        "memory_clock_mhz": [2619.0 for _ in busy],
        "memory_used_bytes": [float((2 if second < 23 else 61) * GIBI) for second in seconds],
        "temperature_celsius": [34 + 30 * (1 - math.exp(-second / 25)) * scale for second in seconds],
    }
    return Device(
        machine=0,
        index=index,
        uuid=f"GPU-{index}",
        name="NVIDIA H100 80GB HBM3",
        energy_joules=_joules(series),
        energy_source="counter",
        fields={name: _field(values) for name, values in series.items()},
        throttled_fraction={"sw_power_cap": 0.31 if index == 0 else 0.0, "hw_thermal": 0.0},
        max_sm_clock_mhz=1980.0,
        power_limit_watts=700.0,
        default_power_limit_watts=700.0,
        is_mig=False,
        missing={},
        series={"seconds": list(seconds), **series},
    )


def _load(second: float) -> float:
    for stage, (start, end) in _STAGE_SECONDS.items():
        if start <= second <= end:
            return {"reading": 0.0, "decoding": 0.12, "loader": 0.18, "step": 1.0, "training": 0.88}[stage]
    return 0.0


def _joules(series: dict[str, list[float | None]]) -> float:
    return 0.1 * sum(watts for watts in series["power_watts"] if watts is not None)


def _field(values: list[float | None]) -> Summary | None:
    known = [value for value in values if value is not None]
    return summary_of(known) if known else None


def _part(device: Device, start: float, end: float) -> Device:
    """A device within a span of time."""
    inside = [place for place, second in enumerate(device.series["seconds"]) if second and start <= second <= end]
    series = {name: [values[place] for place in inside] for name, values in device.series.items()}
    fields = {name: _field(series[name]) for name in device.fields}
    return msgspec.structs.replace(device, energy_joules=_joules(series), fields=fields, series={})
