"""Whether the hardware's JPEG engine decodes what it is given: whole images, and windows."""

import functools
import io
import json
import subprocess
import sys
from time import monotonic

import numpy as np
import pytest
import torch
from nvidia.dali import fn, pipeline_def, types

from perf.telemetry import NvmlSampler, uuids_of
from pipeline.dali import graph
from tests.gpu.device import DECODERS_DIFFER_BY, DEVICE
from tests.support.images import photographs
from tests.support.launch import ROOT, environment

pytestmark = pytest.mark.gpu

BATCH = 64
SECONDS = 3.0
START, SHAPE = [100, 51], [224, 301]
ENGINES = {(8, 0), (9, 0), (10, 0), (10, 3)}
"""Compute capabilities of GPUs that all have one: A100, H100 and H200, B200, B300."""


def jpegs() -> list[np.ndarray]:
    encoded = []
    for photograph in photographs():
        file = io.BytesIO()
        photograph.save(file, "JPEG", quality=90)  # baseline, 4:2:0, as most of ImageNet
        encoded.append(np.frombuffer(file.getvalue(), dtype=np.uint8))
    return encoded * (BATCH // 2)


def pipeline_of(decode, device_id: int | None):
    """A pipeline that only decodes: decode(encoded) → images."""
    batch = jpegs()

    @pipeline_def(batch_size=BATCH, num_threads=4, device_id=device_id, prefetch_queue_depth=2, exec_dynamic=True)
    def graph():
        return decode(fn.external_source(lambda: batch, batch=True, dtype=types.UINT8))

    return graph()


def engine_percent(pipeline) -> float | str:
    """The engine's highest utilisation while the pipeline runs; why, where that cannot be read."""
    pipeline.run()
    with NvmlSampler(uuids_of(DEVICE), interval_seconds=0.05) as sampler:
        until = monotonic() + SECONDS
        while monotonic() < until:
            pipeline.run()
    report = sampler.report()
    if not report["available"]:
        return str(report["reason"])
    (device,) = report["devices"]
    figures = device["fields"]["jpeg_engine_utilisation_percent"]
    return figures["max"] if figures else str(device["missing"]["jpeg_engine_utilisation_percent"])


def skip_without_engine(percent: float | str) -> None:
    if isinstance(percent, str):
        pytest.skip(f"the engine's utilisation cannot be read: {percent}")
    if not percent and torch.cuda.get_device_capability(DEVICE) not in ENGINES:
        pytest.skip(f"{torch.cuda.get_device_name(DEVICE)} has no JPEG engine, or DALI does not use it")


def windows(encoded, decoder):
    options = graph.GraphOptions(crop=None, decoder=decoder, hw_decoder_load=1.0)
    return graph.decode_windows(encoded, START, SHAPE, options)


def test_the_engine_decodes_for_the_graph():
    """All it can be given; the pixels are the CPU's."""
    pipeline = pipeline_of(functools.partial(windows, decoder="gpu"), DEVICE.index)
    (expected,) = pipeline_of(functools.partial(windows, decoder="cpu"), None).run()
    (decoded,) = pipeline.run()
    decoded = decoded.as_cpu()
    for number in range(2):
        one, other = (np.asarray(images[number]).astype(int) for images in (decoded, expected))
        assert one.shape == (*SHAPE, 3)
        assert np.abs(one - other).max() < DECODERS_DIFFER_BY
    percent = engine_percent(pipeline)
    skip_without_engine(percent)
    assert isinstance(percent, float)
    assert percent > 0, "this GPU has a JPEG engine, but it did not work"


def test_the_engine_decodes_windows():
    """What graph.decode_windows avoids, so that it shows when it need not any more; in a process of its own, which may crash."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.test_jpeg_engine"],
        cwd=ROOT,
        env={**environment(), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if done.returncode != 0:
        pytest.xfail(f"exit code {done.returncode}: {done.stderr[-300:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    if isinstance(result["percent"], str):
        pytest.skip(f"the engine's utilisation cannot be read: {result['percent']}")
    if not result["percent"]:
        pytest.xfail(f"the engine did not work; the pixels are up to {result['worst']} levels from the CPU's")
    assert result["worst"] < DECODERS_DIFFER_BY


def _measure_windows() -> dict:
    def decode(encoded, **settings):
        return fn.decoders.image_slice(
            encoded, start=START, shape=SHAPE, axes=[0, 1], jpeg_fancy_upsampling=True, **settings
        )

    pipeline = pipeline_of(functools.partial(decode, device="mixed", hw_decoder_load=1.0), DEVICE.index)
    (expected,), (decoded,) = pipeline_of(functools.partial(decode, device="cpu"), None).run(), pipeline.run()
    decoded = decoded.as_cpu()
    worst = max(int(np.abs(np.asarray(decoded[n]).astype(int) - np.asarray(expected[n])).max()) for n in range(2))
    return {"worst": worst, "percent": engine_percent(pipeline)}


if __name__ == "__main__":
    print(json.dumps(_measure_windows()))
