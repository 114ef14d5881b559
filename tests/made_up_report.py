"""Reports as profile/throughput.py writes them, of runs that never were: one on a CPU, one on two GPUs."""

import math
import random

MEBI = 1 << 20
# (output channels, side) of the convolutions of configuration D at 224 pixels, by their place in `features`; pools between.
_CONVOLUTIONS = {
    0: (64, 224), 2: (64, 224), 5: (128, 112), 7: (128, 112), 10: (256, 56), 12: (256, 56), 14: (256, 56),
    17: (512, 28), 19: (512, 28), 21: (512, 28), 24: (512, 14), 26: (512, 14), 28: (512, 14),
}  # fmt: skip
_POOLS = {4: (64, 112), 9: (128, 56), 16: (256, 28), 23: (512, 14), 30: (512, 7)}
_LINEAR = {0: (25088, 4096), 3: (4096, 4096), 6: (4096, 1000)}


def summary(median: float, spread: float = 0.02, count: int = 120, relative_ci: float | None = 0.004) -> dict:
    """p5 and p95 lie `spread` of the median below it, and one and a half times as much above."""
    return {
        "median": median,
        "p5": median * (1 - spread),
        "p95": median * (1 + 1.5 * spread),
        "count": count,
        "relative_ci": relative_ci,
    }


def rate(
    images_per_second: float, batch: int, ranks: int = 1, stopped_by: str = "precision", spread: float = 0.02
) -> dict:
    return {
        "images_per_second": summary(images_per_second, spread),
        "images_per_second_per_rank": images_per_second / ranks,
        "seconds_per_step": summary(batch / images_per_second, spread),
        "stopped_by": stopped_by,
    }


def layers_of_d(batch: int, bytes_per_value: int, flops_per_second: float, bytes_per_second: float) -> list[dict]:
    """Forward and backward costs of configuration D's layers, roughly: every pass reads and writes each tensor once."""
    layers: list[dict] = []
    channels = 3
    for place in sorted({*_CONVOLUTIONS, *_POOLS}):
        if place in _POOLS:
            channels, side = _POOLS[place]
            values = batch * channels * side * side
            layers.append(
                {"name": f"features.{place}", "kind": "pool", "flops": 0, "bytes": 10 * values * bytes_per_value}
            )
            continue
        outputs, side = _CONVOLUTIONS[place]
        values = batch * outputs * side * side
        moved = 3 * (values + batch * channels * side * side + 9 * channels * outputs) * bytes_per_value
        layers.append({"name": f"features.{place}", "kind": "conv", "flops": 6 * 9 * channels * values, "bytes": moved})
        layers.append(
            {
                "name": f"features.{place + 1}",
                "kind": "relu",
                "flops": 2 * values,
                "bytes": 5 * values * bytes_per_value,
            }
        )
        channels = outputs
    for place, (inputs, outputs) in _LINEAR.items():
        moved = 3 * (inputs * outputs + batch * (inputs + outputs)) * bytes_per_value
        layers.append(
            {"name": f"classifier.{place}", "kind": "linear", "flops": 6 * batch * inputs * outputs, "bytes": moved}
        )
    for layer in layers:
        layer["floor_seconds"] = max(layer["flops"] / flops_per_second, layer["bytes"] / bytes_per_second)
    return layers


def cpu_report() -> dict:
    """One rank on a CPU, digits, no NVML: the loader and the step share the cores."""
    peaks = {"name": "AMD EPYC, 2 cores", "source": "measured", "flops_per_second": 1.8e11, "bytes_per_second": 2.4e10}
    return {
        "program": "throughput",
        "format": 1,
        "created": "2026-11-24T13:00:00+00:00",
        "git_revision": "dde727a",
        "hardware": {
            "device": "cpu",
            "name": "AMD EPYC",
            "ranks": 1,
            "cpu": "AMD EPYC",
            "cores": 2,
            "memory_gib": 24.0,
            "torch": "2.14.1",
            "dali": "2.4.0",
            "driver": None,
        },
        "config": {
            "arch": "A",
            "data": "digits",
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
        "warm_up": {"steps": 5, "seconds": 2.31, "compile_seconds": None, "first_batch_seconds": 0.182},
        "stages": {
            "reading": rate(41_250.0, 32, spread=0.08),
            "decoding": rate(9_870.0, 32, spread=0.05),
            "loader": rate(6_120.0, 32, spread=0.04),
            "step": rate(118.4, 32, stopped_by="time", spread=0.06),
            "training": rate(109.7, 32, stopped_by="time", spread=0.07),
        },
        "step_parts": {
            "forward": summary(0.0716, 0.05),
            "backward": summary(0.1648, 0.05),
            "all_reduce": None,
            "optimizer": summary(0.0321, 0.1),
        },
        "training_parts": {"data_wait": summary(0.00072, 0.4), "step": summary(0.2895, 0.07)},
        "ceiling": {
            "images_per_second": 116.2,
            "set_by": "cores shared by both",
            "training_over_ceiling": 109.7 / 116.2,
            "why_not": "the loader's threads take cores from the step",
        },
        "roofline": {
            "peaks": peaks,
            "floor_seconds": {
                "forward": 0.0402,
                "backward": 0.0811,
                "optimizer": 0.0194,
                "all_reduce": None,
                "total": 0.1407,
            },
            "flops_per_image": 9.2e8,
            "mfu": 0.605,
            "images_per_joule": None,
            "layers": layers_of_d(32, 4, 1.8e11, 2.4e10),
            "scaling": [],
        },
        "telemetry": {
            "available": False,
            "reason": "libnvidia-ml.so.1 was not found: there is no NVIDIA driver here",
            "interval_seconds": 0.1,
            "samples": 0,
            "seconds": 0.0,
            "devices": [],
            "stages": {},
        },
        "verdict": {
            "bound": "compute",
            "sentence": "The step itself limits the run: training waits for data 0.2 % of the time.",
            "evidence": [
                {"name": "data wait, of a training step", "value": 0.25, "unit": "%"},
                {"name": "floor over measured step", "value": 52.1, "unit": "%"},
            ],
            "try": [
                {"flags": "--compile", "why": "fuses ReLU and bias into the convolutions"},
                {"flags": "--threads 1", "why": "leaves the cores to the step"},
            ],
        },
    }


_STAGE_SECONDS = {
    "reading": (2.0, 7.0),
    "decoding": (8.0, 13.0),
    "loader": (14.0, 22.0),
    "step": (24.0, 39.0),
    "training": (41.0, 60.0),
}


def gpu_report() -> dict:
    """Two ranks with an all-reduce and NVML; GPU 1 has no readings of the JPEG engine and none of the temperature."""
    report = cpu_report()
    compute, bandwidth = 9.89e14, 3.35e12
    report["hardware"] |= {
        "device": "cuda",
        "name": "NVIDIA H100 80GB HBM3",
        "ranks": 2,
        "cores": 26,
        "driver": "580.65",
        "memory_gib": 225.0,
    }
    report["config"] |= {
        "arch": "D",
        "data": "/data/imagenet",
        "crop": 224,
        "train_scale": "256",
        "batch_size": 512,
        "micro_batch": 256,
        "precision": "bf16",
        "compile": True,
        "decoder": "gpu",
        "threads": 14,
    }
    report["warm_up"] |= {"compile_seconds": 41.3, "seconds": 44.0}
    report["stages"] = {
        "reading": rate(61_000.0, 512, 2),
        "decoding": rate(9_400.0, 512, 2),
        "loader": rate(5_350.0, 512, 2, spread=0.05),
        "step": rate(6_020.0, 512, 2, spread=0.01),
        "training": rate(5_180.0, 512, 2, stopped_by="time", spread=0.04),
    }
    report["step_parts"] = {
        "forward": summary(0.0262, 0.01),
        "backward": summary(0.0537, 0.01),
        "all_reduce": summary(0.0031, 0.2),
        "optimizer": summary(0.00204, 0.03),
    }
    report["training_parts"] = {"data_wait": summary(0.0112, 0.5), "step": summary(0.0871, 0.02)}
    report["ceiling"] = {
        "images_per_second": 5_350.0,
        "set_by": "loader",
        "training_over_ceiling": 5_180 / 5_350,
        "why_not": None,
    }
    report["roofline"] = {
        "peaks": {
            "name": "H100 SXM",
            "source": "table",
            "flops_per_second": compute,
            "bytes_per_second": bandwidth,
        },
        "floor_seconds": {
            "forward": 0.0121,
            "backward": 0.0243,
            "optimizer": 0.00083,
            "all_reduce": 0.0052,
            "total": 0.03843,
        },
        "flops_per_image": 9.28e10,
        "mfu": 0.283,
        "images_per_joule": 4.31,
        "layers": layers_of_d(256, 2, compute, bandwidth),
        "scaling": [
            {
                "ranks": ranks,
                "images_per_second": 3_010.0 * ranks * 0.98,
                "images_per_second_compressed": 3_010.0 * ranks * 0.99,
                "efficiency": 0.98,
                "efficiency_compressed": 0.99,
            }
            for ranks in (1, 2, 4, 8, 64, 512)
        ],
    }
    devices = [_device(0, 1.0), _device(1, 0.94)]
    for missing in ("temperature_celsius", "jpeg_engine_utilisation_percent"):
        devices[1]["fields"][missing] = None
        devices[1]["series"][missing] = [None] * len(devices[1]["series"]["seconds"])
        devices[1]["missing"][missing] = "Not Supported"
    report["telemetry"] = {
        "available": True,
        "reason": None,
        "interval_seconds": 0.1,
        "samples": 600,
        "seconds": 60.0,
        "devices": devices,
        "stages": {stage: [_part(device, *span) for device in devices] for stage, span in _STAGE_SECONDS.items()},
        "stage_seconds": {stage: list(span) for stage, span in _STAGE_SECONDS.items()},
    }
    report["verdict"] = {
        "bound": "input",
        "sentence": "Input limits the run: the GPUs wait for images 11.4 % of each training step.",
        "evidence": [
            {"name": "data wait, of a training step", "value": 11.4, "unit": "%"},
            {"name": "loader alone, of the step alone", "value": 0.889, "unit": ""},
        ],
        "try": [
            {"flags": "--threads 24", "why": "cores are idle while the loader is behind"},
            {"flags": "python -m pipeline.prepare", "why": "smaller files decode faster"},
        ],
    }
    return report


def _device(index: int, scale: float) -> dict:
    """Samples every 0.1 s over 60 s; power and clocks follow the stages."""
    random_numbers = random.Random(index)
    seconds = [round(0.1 * number, 3) for number in range(600)]
    busy = [_load(second) * scale for second in seconds]
    series: dict[str, list] = {
        "power_watts": [120 + 570 * load + random_numbers.gauss(0, 6) for load in busy],
        "sm_utilisation_percent": [min(100.0, max(0.0, 99 * load + random_numbers.gauss(0, 2))) for load in busy],
        "memory_utilisation_percent": [min(100.0, max(0.0, 55 * load + random_numbers.gauss(0, 2))) for load in busy],
        "jpeg_engine_utilisation_percent": [78.0 if second > 41 or 8 < second < 22 else 0.0 for second in seconds],
        "sm_clock_mhz": [1980 - 180 * (load > 0.9) for load in busy],
        "memory_clock_mhz": [2619 for _ in busy],
        "memory_used_bytes": [(2 if second < 23 else 61) * 1024 * MEBI for second in seconds],
        "temperature_celsius": [34 + 30 * (1 - math.exp(-second / 25)) * scale for second in seconds],
    }
    return {
        "index": index,
        "uuid": f"GPU-{index}",
        "name": "NVIDIA H100 80GB HBM3",
        "energy_joules": 0.1 * sum(series["power_watts"]),
        "energy_source": "counter",
        "fields": {name: _field(values) for name, values in series.items()},
        "throttled_fraction": {"sw_power_cap": 0.31 if index == 0 else 0.0, "hw_thermal": 0.0},
        "missing": {},
        "series": {"seconds": seconds, **series},
    }


def _load(second: float) -> float:
    for stage, (start, end) in _STAGE_SECONDS.items():
        if start <= second <= end:
            return {"reading": 0.0, "decoding": 0.12, "loader": 0.18, "step": 1.0, "training": 0.88}[stage]
    return 0.0


def _field(values: list[float]) -> dict:
    ordered = sorted(values)
    at = {
        key: ordered[round(share * (len(ordered) - 1))] for key, share in (("p5", 0.05), ("median", 0.5), ("p95", 0.95))
    }
    return {**at, "min": ordered[0], "max": ordered[-1], "mean": sum(values) / len(values)}


def _part(device: dict, start: float, end: float) -> dict:
    """A device within a span of time, whose seconds count from its start."""
    inside = [place for place, second in enumerate(device["series"]["seconds"]) if start <= second <= end]
    series = {name: [values[place] for place in inside] for name, values in device["series"].items()}
    series["seconds"] = [round(second - start, 3) for second in series["seconds"]]
    measured = {name: values for name, values in series.items() if name != "seconds" and None not in values}
    return {
        **device,
        "energy_joules": 0.1 * sum(series["power_watts"]),
        "fields": {name: _field(series[name]) if name in measured else None for name in device["fields"]},
        "series": series,
    }
