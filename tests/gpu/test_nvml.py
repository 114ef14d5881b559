"""The sampler on a real driver: the right GPU's figures."""

from time import monotonic, perf_counter, sleep

import pytest
import torch

from perf.telemetry import NvmlSampler, uuids_of
from tests.gpu.device import DEVICE

pytestmark = pytest.mark.gpu

SECONDS = 2.0
HELD_BYTES = 1 << 30


def multiply_until(moment: float) -> None:
    one = torch.randn(4096, 4096, device=DEVICE)
    while monotonic() < moment:
        for _ in range(10):
            one @ one
        torch.cuda.synchronize(DEVICE)


@pytest.fixture(scope="module")
def telemetry() -> tuple[dict, dict]:
    """While the GPU is idle, and while it multiplies matrices and a GiB of its memory is held."""
    torch.zeros(1, device=DEVICE)
    with NvmlSampler(uuids_of(DEVICE), interval_seconds=0.05) as sampler:
        began = perf_counter()
        sleep(SECONDS / 2)
        idle = sampler.report(began, perf_counter())
        held = torch.empty(HELD_BYTES, dtype=torch.uint8, device=DEVICE)
        multiply_until(monotonic() + SECONDS)
        began = perf_counter()
        multiply_until(monotonic() + SECONDS)
        busy = sampler.report(began, perf_counter())
        del held
    assert idle["available"], idle["reason"]
    return idle["devices"][0], busy["devices"][0]


def test_it_is_this_gpu(telemetry):
    _, busy = telemetry
    properties = torch.cuda.get_device_properties(DEVICE)
    if not busy["uuid"].startswith("MIG-"):  # of which torch may give the whole GPU's
        assert busy["uuid"].removeprefix("GPU-") == str(properties.uuid)
        assert busy["name"] == properties.name


def test_memory_held_here_is_seen_there(telemetry):
    idle, busy = (device["fields"]["memory_used_bytes"]["median"] for device in telemetry)
    assert busy - idle > 0.9 * HELD_BYTES


def test_power_clocks_and_temperature_are_a_busy_gpus(telemetry):
    _, busy = telemetry
    fields = busy["fields"]
    assert not {"power_watts", "sm_clock_mhz", "memory_clock_mhz", "temperature_celsius"} & set(busy["missing"])
    assert 10 < fields["power_watts"]["median"] < 2000
    assert 200 < fields["sm_clock_mhz"]["median"] < 4000
    assert 200 < fields["memory_clock_mhz"]["median"] < 20_000
    assert 10 < fields["temperature_celsius"]["median"] < 110


def test_limits_are_above_what_was_read(telemetry):
    _, busy = telemetry
    if not {"max_sm_clock_mhz", "power_limit_watts", "default_power_limit_watts"} & set(busy["missing"]):
        assert busy["fields"]["sm_clock_mhz"]["max"] <= busy["max_sm_clock_mhz"] < 4000
        assert busy["fields"]["power_watts"]["median"] < 1.1 * busy["power_limit_watts"] < 3000
        assert 10 < busy["default_power_limit_watts"] < 3000
    assert busy["is_mig"] == busy["uuid"].startswith("MIG-")


def test_energy_is_power_times_time(telemetry):
    _, busy = telemetry
    assert busy["energy_source"] in ("counter", "power")
    assert busy["energy_joules"] == pytest.approx(busy["fields"]["power_watts"]["mean"] * SECONDS, rel=0.2)


def test_utilisation_is_that_of_a_busy_gpu(telemetry):
    _, busy = telemetry
    utilisation = busy["fields"]["sm_utilisation_percent"]
    if utilisation is None:
        pytest.skip(f"cannot be read here: {busy['missing']['sm_utilisation_percent']}")
    assert utilisation["max"] > 50
