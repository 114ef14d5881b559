"""The sampler, through the real nvidia-ml-py, over a stub of the driver's library that knows what it says."""

import json
import math
import os
import pty
import signal
import subprocess
import sys
from typing import Any

import pytest

from tests.support.nvml_stub import ROOT, compile_stub, environment, run_python

SAMPLE = """
with NvmlSampler(interval_seconds=0.02) as sampler:
    sleep({seconds})
print(json.dumps(sampler.report()))
"""
STATISTICS = ("median", "p5", "p95", "min", "max", "mean")
# What the stub says of GPU 0, in the report's units.
CONSTANTS = {
    "power_watts": 300,
    "sm_utilisation_percent": 90,
    "memory_utilisation_percent": 40,
    "memory_used_bytes": 5 * 2**30,
    "sm_clock_mhz": 1700,
    "memory_clock_mhz": 2600,
    "temperature_celsius": 60,
    "pcie_tx_bytes_per_second": 1e9,
    "pcie_rx_bytes_per_second": 2e9,
    "jpeg_engine_utilisation_percent": 20,
    "video_decoder_utilisation_percent": 10,
}
LIMITS = {"max_sm_clock_mhz": 1980, "power_limit_watts": 700, "default_power_limit_watts": 700}
RATES = {"nvlink_tx_bytes_per_second": 3 * 2**30, "nvlink_rx_bytes_per_second": 4 * 2**30}


@pytest.fixture(scope="module")
def stub(tmp_path_factory):
    return compile_stub(tmp_path_factory.mktemp("nvml"))


def sample(stub, seconds=0.3, **settings) -> dict:
    return run_python(SAMPLE.format(seconds=seconds), environment(stub, **settings))


# ---- readings ------------------------------------------------------------------------------------------------------


def test_every_field_arrives(stub):
    report = sample(stub)
    assert (report["available"], report["reason"], report["interval_seconds"]) == (True, None, 0.02)
    assert report["seconds"] == pytest.approx(0.3, abs=0.1)
    assert 5 <= report["samples"] <= report["seconds"] / 0.02 + 2
    (gpu,) = report["devices"]
    assert (gpu["index"], gpu["uuid"], gpu["name"]) == (0, "GPU-1000abcd-0000-0000-0000-000000000000", "Stub GPU")
    assert gpu["missing"] == {}
    assert gpu["is_mig"] is False
    assert {name: gpu[name] for name in LIMITS} == LIMITS
    assert set(gpu["fields"]) == {*CONSTANTS, *RATES}
    for name, value in CONSTANTS.items():
        assert gpu["fields"][name] == dict.fromkeys(STATISTICS, value), name
        assert gpu["series"][name] == [value] * report["samples"], name
    for name, value in RATES.items():
        assert gpu["fields"][name]["median"] == pytest.approx(value, rel=0.01), name
    assert {name: part for name, part in gpu["throttled_fraction"].items() if part} == {"sw_power_cap": 1.0}
    moments = gpu["series"]["seconds"]
    assert moments == sorted(moments)
    assert 0 <= moments[0] <= moments[-1] <= report["seconds"]
    assert {len(curve) for curve in gpu["series"].values()} == {report["samples"]}


def test_statistics_are_those_of_the_series(stub):
    (gpu,) = sample(stub, seconds=0.8, SWING="100")["devices"]
    watts, spread = sorted(gpu["series"]["power_watts"]), gpu["fields"]["power_watts"]
    assert (spread["min"], spread["max"]) == (watts[0], watts[-1])
    assert spread["mean"] == pytest.approx(sum(watts) / len(watts), abs=0.01)
    assert spread["median"] == pytest.approx((watts[(len(watts) - 1) // 2] + watts[len(watts) // 2]) / 2, abs=0.01)
    for name, share in (("p5", 0.05), ("p95", 0.95)):
        place = share * (len(watts) - 1)
        assert watts[math.floor(place)] - 0.01 <= spread[name] <= watts[math.ceil(place)] + 0.01
    assert spread["max"] - spread["min"] > 150  # more than one period of the swing


def test_a_power_cap_and_a_power_brake(stub):
    (gpu,) = sample(stub, LIMIT_WATTS="400", SM_MHZ="1100")["devices"]
    assert (gpu["power_limit_watts"], gpu["default_power_limit_watts"]) == (400, 700)
    assert gpu["fields"]["sm_clock_mhz"]["median"] / gpu["max_sm_clock_mhz"] == pytest.approx(1100 / 1980)
    assert {name: part for name, part in gpu["throttled_fraction"].items() if part} == {"sw_power_cap": 1.0}
    (gpu,) = sample(stub, REASONS=str(0x88))["devices"]
    braked = {"hw_slowdown": 1.0, "hw_power_brake": 1.0}
    assert {name: part for name, part in gpu["throttled_fraction"].items() if part} == braked


# ---- energy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["counter", "power"])
def test_energy_of_a_known_power(stub, source):
    """A window that fits neither the samples nor the swing's period; a second one, asked for while sampling goes on."""
    code = """
with NvmlSampler(interval_seconds=0.02) as sampler:
    sleep(0.1)
    first = [now()]
    sleep(0.23)
    first.append(now())
    inside = sampler.report(*first)
    sleep(0.6)
later = [first[0], first[0] + 0.5]
print(json.dumps([(first, inside), (first, sampler.report(*first)), (later, sampler.report(*later))]))
"""
    faults = {"FAULTS": "nvmlDeviceGetTotalEnergyConsumption=3"} if source == "power" else {}
    windows = run_python(code, environment(stub, SWING="250", **faults))
    omega = 2 * math.pi / 0.7
    for (start, end), report in windows:  # perf_counter() is the stub's CLOCK_MONOTONIC
        expected = 300 * (end - start) + 250 * (math.cos(omega * start) - math.cos(omega * end)) / omega
        (gpu,) = report["devices"]
        assert gpu["energy_source"] == source
        assert gpu["energy_joules"] == pytest.approx(expected, rel=0.01)
        assert report["seconds"] == pytest.approx(end - start, abs=1e-3)
    assert ("energy_counter_joules" in windows[0][1]["devices"][0]["missing"]) == (source == "power")


def test_a_window_without_samples(stub):
    code = """
with NvmlSampler(interval_seconds=10) as sampler:
    start = now()
    sleep(0.2)
    end = now()
    sleep(0.1)
print(json.dumps(sampler.report(start, end)))
"""
    report = run_python(code, environment(stub))
    (gpu,) = report["devices"]
    assert report["samples"] == 0
    assert set(gpu["fields"].values()) == {None}
    assert gpu["throttled_fraction"] is None
    assert gpu["missing"]["power_watts"] == "no sample in this window"
    assert gpu["energy_joules"] == pytest.approx(300 * 0.2, rel=0.05)  # between the samples of entering and leaving


# ---- faults --------------------------------------------------------------------------------------------------------


def test_functions_that_an_older_driver_lacks(tmp_path):
    """The older names are asked then; what has none is missing."""
    without = ("TemperatureV", "CurrentClocksEventReasons", "JpgUtilization", "TotalEnergyConsumption", "FieldValues")
    older = compile_stub(tmp_path, without=tuple(f"nvmlDeviceGet{name}" for name in without))
    (gpu,) = sample(older)["devices"]
    assert gpu["fields"]["temperature_celsius"]["median"] == 50
    assert {name: part for name, part in gpu["throttled_fraction"].items() if part} == {"hw_thermal": 1.0}
    assert gpu["energy_source"] == "power"
    gone = ["energy_counter_joules", "jpeg_engine_utilisation_percent", *RATES]
    assert gpu["missing"] == dict.fromkeys(gone, "Function Not Found")
    assert all(gpu["fields"][name] is None for name in gone[1:])
    assert gpu["fields"]["power_watts"]["median"] == 300


def test_limits_that_cannot_be_read(tmp_path):
    names = ("nvmlDeviceGetMaxClockInfo", "nvmlDeviceGetEnforcedPowerLimit", "nvmlDeviceGetPowerManagementDefaultLimit")
    (gpu,) = sample(compile_stub(tmp_path, without=names))["devices"]
    assert {name: gpu[name] for name in LIMITS} == dict.fromkeys(LIMITS)
    assert gpu["missing"] == dict.fromkeys(LIMITS, "Function Not Found")
    assert gpu["fields"]["power_watts"]["median"] == 300


LATER = {
    "nvmlDeviceGetJpgUtilization": "jpeg_engine_utilisation_percent",
    "nvmlDeviceGetTotalEnergyConsumption": "energy_counter_joules",
    "nvmlDeviceGetCurrentClocksEventReasons": None,  # the older name is asked
    "nvmlDeviceGetTemperatureV": None,
    "NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX": "nvlink_tx_bytes_per_second",
    "NVML_CLOCK_MEM": "memory_clock_mhz",
    "NVML_ERROR_DEPRECATED": None,
    "NVML_ERROR_ARGUMENT_VERSION_MISMATCH": None,
    "nvmlDeviceGetMaxClockInfo": "max_sm_clock_mhz",
    "nvmlDeviceGetEnforcedPowerLimit": "power_limit_watts",
    "nvmlDeviceGetPowerManagementDefaultLimit": "default_power_limit_watts",
    "nvmlDeviceGetMigMode": None,
}


def test_what_an_older_binding_lacks_is_one_reading_each(stub):
    """A constant, a function: whatever is missing, all the others are there."""
    code = SAMPLE.format(seconds=0.2)
    (gpu,) = run_python(code, environment(stub), binding_without=tuple(LATER))["devices"]
    lost = {reading: f"nvidia-ml-py is too old: it has no {name}" for name, reading in LATER.items() if reading}
    assert gpu["missing"] == lost
    there = ({*CONSTANTS, *RATES} | {*LIMITS}) - {*lost}
    assert {name for name in (*gpu["fields"], *LIMITS) if gpu.get(name, gpu["fields"].get(name)) is not None} == there
    assert gpu["fields"]["temperature_celsius"]["median"] == 50
    assert gpu["throttled_fraction"]["hw_thermal"] == 1
    assert gpu["energy_source"] == "power"


def test_what_cannot_work_is_tried_once_and_what_may_is_tried_again(stub):
    """Every fault ends after a while; a reading that had failed for good is not asked again, and so is never there."""
    faults = {
        "nvmlDeviceGetUtilizationRates": (3, "Not Supported"),
        "nvmlDeviceGetMemoryInfo": (2, "Invalid Argument"),
        "nvmlDeviceGetDecoderUtilization": (4, "Insufficient Permissions"),
        "nvmlDeviceGetJpgUtilization": (999, "Unknown Error"),
        "nvmlDeviceGetPowerUsage": (10, "Timeout"),
    }
    settings = {"FAULTS": ",".join(f"{name}={code}" for name, (code, _) in faults.items()), "FAULTS_UNTIL": "0.3"}
    (gpu,) = sample(stub, seconds=0.8, **settings)["devices"]
    for name in ("sm_utilisation_percent", "memory_utilisation_percent"):
        assert gpu["missing"][name] == "Not Supported"
    assert gpu["missing"]["memory_used_bytes"] == "Invalid Argument"
    assert gpu["missing"]["video_decoder_utilisation_percent"] == "Insufficient Permissions"
    assert gpu["fields"]["memory_used_bytes"] is None
    for name, value, reason in (
        ("jpeg_engine_utilisation_percent", 20, "Unknown Error"),
        ("power_watts", 300, "Timeout"),
    ):
        assert gpu["fields"][name]["median"] == value
        assert gpu["missing"][name].endswith(f"readings failed: {reason}")
        assert {None, value} == set(gpu["series"][name])
    assert gpu["fields"]["sm_clock_mhz"]["median"] == 1700


def test_a_gpu_lost_midway(stub):
    """Its samples until then stay, with their energy; the other GPU is sampled to the end."""
    code = """
with NvmlSampler(interval_seconds=0.02) as sampler:
    sleep(1.0)
end = now()
print(json.dumps([sampler.report(), sampler.report(end - 0.2, end)]))
"""
    report, afterwards = run_python(code, environment(stub, GPUS="2", FAULTS="gpu0=15", FAULTS_FROM="0.6"))
    lost, other = report["devices"]
    moments = lost["series"]["seconds"]
    assert 3 <= len(moments) < report["samples"]
    assert moments[-1] < 0.6
    assert lost["fields"]["power_watts"]["median"] == 300
    assert lost["energy_joules"] == pytest.approx(300 * moments[-1], rel=0.2)
    assert lost["energy_joules"] < other["energy_joules"] / 2
    assert set(lost["missing"]) == {*CONSTANTS, *RATES, "energy_counter_joules", "throttle_reasons"}
    assert all(reason.startswith("GPU is lost, 0.") for reason in lost["missing"].values())
    assert other["missing"] == {}
    assert other["energy_joules"] == pytest.approx(600 * report["seconds"], rel=0.01)
    lost_before, _ = afterwards["devices"]
    assert (lost_before["energy_joules"], lost_before["energy_source"]) == (None, None)
    assert set(lost_before["fields"].values()) == {None}
    assert set(lost_before["missing"].values()) == {"GPU is lost, 0.0 s after the start: nothing was read from then on"}


def test_a_driver_that_hangs_does_not_hold_up_the_program(stub):
    """Eight GPUs with a PCIe reading of 2 s: entering, leaving and reporting take only their patience."""
    code = """
from perf import samples, telemetry  # what takes time to import
telemetry._PATIENCE_SECONDS = 0.2
began = now()
with NvmlSampler(interval_seconds=0.02) as sampler:
    pass
report = sampler.report()
print(json.dumps({"seconds": now() - began, "samples": report["samples"]}))
"""
    result = run_python(code, environment(stub, PCIE_MS="999", GPUS="8"))
    assert result["seconds"] < 0.9
    assert result["samples"] == 0


def test_nvml_does_not_start(stub):
    report = sample(stub, FAULTS="nvmlInitWithFlags=9")
    assert (report["available"], report["devices"], report["samples"]) == (False, [], 0)
    assert "Driver Not Loaded" in report["reason"]
    assert report["seconds"] == pytest.approx(0.3, abs=0.1)


def test_no_library(tmp_path):
    (tmp_path / "libnvidia-ml.so.1").write_text("not a library")  # hides the driver's, where there is one
    report = sample(tmp_path)
    assert (report["available"], report["devices"]) == (False, [])
    assert "Shared Library Not Found" in report["reason"]


def test_no_binding(stub):
    report = run_python("sys.modules['pynvml'] = None" + SAMPLE.format(seconds=0), environment(stub))
    assert report["available"] is False
    assert report["reason"].startswith("nvidia-ml-py is not installed")


# ---- which GPUs ----------------------------------------------------------------------------------------------------

NAMES = """
def names(uuids=None):
    with NvmlSampler(uuids) as sampler:
        pass
    return [gpu["uuid"][:8] for gpu in sampler.report()["devices"]], sampler.report()["reason"]
def visible(wanted):
    os.environ["CUDA_VISIBLE_DEVICES"] = wanted
    return names()
"""


def test_cuda_visible_devices(stub):
    """By the CUDA C++ Programming Guide: 2,1 shows GPU 2, then 1; 0,2,-1,1 shows 0 and 2; UUIDs may be cut short."""
    expected = {
        "2,1": ["GPU-3000", "GPU-2000"],
        "0,2,-1,1": ["GPU-1000", "GPU-3000"],
        "1": ["GPU-2000"],
        " 1 , 0": ["GPU-2000", "GPU-1000"],
        "1,7,0": ["GPU-2000"],
        "0,x,1": ["GPU-1000"],
        "": [],
        "-1": [],
        "none": [],
        "1,1": [],
        "GPU-2000abcd-0000-0000-0000-000000000000": ["GPU-2000"],
        "GPU-3,GPU-1000": ["GPU-3000", "GPU-1000"],
        "GPU-": [],  # of several
        "GPU-9,GPU-1000": [],
        "MIG-1000": [],
        "GPU-1,1": ["GPU-1000"],  # numbers and UUIDs do not mix
        "0,GPU-2": ["GPU-1000"],
    }
    code = NAMES + f"all = names()\nprint(json.dumps([all, {{w: visible(w) for w in {list(expected)}}}]))"
    unset, found = run_python(code, environment(stub, GPUS="3"))
    assert unset == [["GPU-1000", "GPU-2000", "GPU-3000"], None]
    assert {wanted: names for wanted, (names, _) in found.items()} == expected
    reasons = {wanted: reason for wanted, (_, reason) in found.items()}
    assert reasons["0,2,-1,1"] is None
    assert reasons[""] == "no GPU is left to sample"
    assert "'7' means no GPU here" in reasons["1,7,0"]
    assert "twice" in reasons["1,1"]


def test_numbers_of_unlike_gpus(stub):
    """CUDA puts the fastest first, unless it is told to go by PCI address as NVML does; a UUID is a UUID."""
    code = NAMES + (
        "by_speed, by_uuid = visible('1'), visible('GPU-2')\n"
        "os.environ['CUDA_DEVICE_ORDER'] = 'PCI_BUS_ID'\n"
        "print(json.dumps([by_speed, by_uuid, visible('1')]))"
    )
    by_speed, *sure = run_python(code, environment(stub, GPUS="2", UNLIKE="1"))
    assert by_speed[0] == ["GPU-2000"]
    assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in by_speed[1]
    assert sure == [[["GPU-2000"], None]] * 2


def test_the_right_gpu_is_sampled(stub):
    env = environment(stub, GPUS="2") | {"CUDA_VISIBLE_DEVICES": "1"}
    (gpu,) = run_python(SAMPLE.format(seconds=0.1), env)["devices"]
    assert gpu["index"] == 1
    for name in ("sm_utilisation_percent", "sm_clock_mhz", "temperature_celsius", "jpeg_engine_utilisation_percent"):
        assert gpu["fields"][name]["median"] == CONSTANTS[name] + 1
    assert gpu["fields"]["power_watts"]["median"] == 600


def test_gpus_of_other_jobs_are_not_counted(stub):
    env = environment(stub, GPUS="3", FAULTS="gpu0=4")
    assert run_python(NAMES + "print(json.dumps([visible('0'), visible('1')]))", env) == [
        [["GPU-2000"], None],
        [["GPU-3000"], None],
    ]


def test_by_uuid(stub):
    """With the prefix, or without, as torch gives it; whatever CUDA_VISIBLE_DEVICES says."""
    bare = "2000abcd-0000-0000-0000-000000000000"
    code = NAMES + f"print(json.dumps([names(uuids) for uuids in (['{bare}'], ['GPU-{bare}'], ['5'], [])]))"
    bare_found, found, unknown, none = run_python(code, environment(stub, GPUS="2") | {"CUDA_VISIBLE_DEVICES": "0"})
    assert bare_found == found == [["GPU-2000"], None]
    assert unknown == [[], "no GPU is left to sample; no GPU here has the UUID 5"]
    assert none == [[], "no GPU is left to sample"]


def test_uuids_of_a_torch_device():
    code = """
import torch
from types import SimpleNamespace
from perf.telemetry import uuids_of
torch.cuda.get_device_properties = lambda device: SimpleNamespace(uuid=f"uuid of {device}")
print(json.dumps([uuids_of(torch.device("cpu")), uuids_of(torch.device("cuda", 1))]))
"""
    assert run_python(code, environment(ROOT)) == [None, ["uuid of cuda:1"]]


def test_mig(stub):
    """Its own memory and engines; power, energy and clocks of the whole GPU; NVML has no utilisation of it."""
    env = environment(stub, MIG="2", GPUS="2") | {"CUDA_VISIBLE_DEVICES": "MIG-1902abcd-0000-0000-0000-000000000000"}
    report = run_python(SAMPLE.format(seconds=0.2), env)
    (gpu,) = report["devices"]
    assert (gpu["index"], gpu["uuid"][:8], gpu["name"]) == (0, "MIG-1902", "Stub GPU MIG 1g.10gb")
    assert gpu["is_mig"] is True
    assert {name: gpu[name] for name in LIMITS} == LIMITS, "of the whole GPU"
    own = {
        "memory_used_bytes": 17 * 2**30,
        "jpeg_engine_utilisation_percent": 32,
        "video_decoder_utilisation_percent": 22,
    }
    for name, value in {**CONSTANTS, **own}.items():
        if name in ("sm_utilisation_percent", "memory_utilisation_percent"):
            assert gpu["missing"].pop(name) == "Not Supported"
        else:
            assert gpu["fields"][name]["median"] == value, name
    assert gpu["missing"] == {}
    assert gpu["energy_joules"] == pytest.approx(300 * report["seconds"], rel=0.01)


def test_which_mig_device(stub):
    whole = "GPU-1000abcd-0000-0000-0000-000000000000"
    expected = {
        "0": ["MIG-1900"],  # CUDA takes the first
        "1,0": ["GPU-2000", "MIG-1900"],
        whole: ["MIG-1900"],
        "MIG-1902": ["MIG-1902"],
        f"MIG-{whole}/9/0": ["MIG-1902"],  # by GPU and compute instance, as before driver 470
        f"MIG-{whole}/8/0": [],
    }
    code = NAMES + (
        f"found = {{w: visible(w)[0] for w in {list(expected)}}}\n"
        f"visible('MIG-1902')\n"
        f"uuids = '{whole}', '{whole[4:]}', 'MIG-1900abcd-0000-0000-0000-000000000000'\n"
        f"print(json.dumps([found, [names([uuid])[0] for uuid in uuids]]))"
    )
    found, by_uuid = run_python(code, environment(stub, MIG="2", GPUS="2"))
    assert found == expected
    # By the whole GPU's UUID, it is the one of its MIG devices that is visible; by its own, itself.
    assert by_uuid == [["MIG-1902"], ["MIG-1902"], ["MIG-1900"]]


# ---- the command line ----------------------------------------------------------------------------------------------


def wrap(stub, *arguments, **settings) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "profile/nvml_sampler.py", *arguments],
        cwd=ROOT,
        env=environment(stub, **settings),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_wrapping_a_command(stub):
    program = "import sys, time; print('its own'); print(sys.argv[1:]); time.sleep(0.4); sys.exit(5)"
    done = wrap(stub, "--interval-ms", "20", "--", sys.executable, "-c", program, "--out", "--", "x")
    assert done.returncode == 5
    *own, last = done.stdout.splitlines()
    assert own == ["its own", "['--out', '--', 'x']"]
    report = json.loads(last)
    assert (report["program"], report["exit_code"], report["available"]) == ("nvml_sampler", 5, True)
    assert report["command"][0] == sys.executable
    (gpu,) = report["devices"]
    assert gpu["energy_joules"] == pytest.approx(300 * report["seconds"], rel=0.01)
    assert report["seconds"] >= 0.4
    assert "Stub GPU" in done.stderr
    assert "memory used, GiB" in done.stderr


def test_wrapping_without_a_driver(tmp_path):
    """The report goes to the file, and stdout is the command's alone."""
    (tmp_path / "libnvidia-ml.so.1").write_text("not a library")
    done = wrap(tmp_path, "--out", str(tmp_path / "report.json"), "--", "echo", "its own")
    assert (done.returncode, done.stdout) == (0, "its own\n")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["available"] is False
    assert report["reason"] in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_the_command(stub, number):
    """Once each, and its own way of ending is what we end with; a command that they kill ends with 128 + the signal."""
    program = f"""
import signal, sys, time
counted = []
signal.signal({int(number)}, lambda *_: counted.append(1))
print("ready", flush=True)
end = time.monotonic() + 20
while not counted and time.monotonic() < end: time.sleep(0.01)
time.sleep(0.2)
sys.exit(40 + len(counted))
"""
    obeys = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_DFL); print('ready', flush=True); time.sleep(20)"
    )
    for code, expected in ((program, 41), (obeys, 128 + number)):
        process = subprocess.Popen(
            [sys.executable, "profile/nvml_sampler.py", "--", sys.executable, "-c", code],
            cwd=ROOT,
            env=environment(stub),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        out, _ = process.communicate(timeout=30)
        assert process.returncode == expected
        assert json.loads(out)["exit_code"] == expected


def test_ctrl_c_reaches_the_command_once(stub):
    """A terminal sends it to the command and to us, who do not pass it on. We are held up, lest two signals become one."""
    program = """
import signal, sys, time
counted = []
signal.signal(signal.SIGINT, lambda *_: (counted.append(1), print("got it", flush=True)))
print("ready", flush=True)
end = time.monotonic() + 20
while not counted and time.monotonic() < end: time.sleep(0.01)
time.sleep(0.7)
sys.exit(40 + len(counted))
"""
    us, terminal = pty.fork()
    if us == 0:
        os.chdir(ROOT)
        command = [sys.executable, "profile/nvml_sampler.py", "--", sys.executable, "-c", program]
        os.execve(sys.executable, command, environment(stub))
    try:
        read_until(terminal, b"ready")
        os.kill(us, signal.SIGSTOP)
        os.write(terminal, b"\x03")
        read_until(terminal, b"got it")
    finally:
        os.kill(us, signal.SIGCONT)
    read_until(terminal, b'"exit_code": 41')
    _, status = os.waitpid(us, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 41


def read_until(terminal: int, text: bytes) -> None:
    """Read what is written on the terminal until the text is there; fails if the program ends without it."""
    seen = b""
    while text not in seen:
        try:
            seen += os.read(terminal, 4096)
        except OSError:  # nobody holds its other end any more
            pytest.fail(f"{text!r} is not in {seen!r}")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "there is no command"),
        (["--"], "there is no command"),
        (["sleep", "1"], "unrecognized arguments: sleep 1"),
        (["--interval-ms", "0", "--", "true"], "--interval-ms is 0"),
        (["--interval-ms", "nan", "--", "true"], "--interval-ms is nan"),
        (["--interval-ms", "fast", "--", "true"], "invalid float value"),
        (["--out", "/nowhere/at/all.json", "--", "true"], "--out /nowhere/at/all.json cannot be written"),
        (["--", "/no/such/command"], "cannot run /no/such/command: No such file or directory"),
        (["--", "/"], "cannot run /: Permission denied"),
    ],
)
def test_bad_usage(stub, arguments, says):
    done = wrap(stub, *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ")
    assert says in done.stderr


# ---- one reading, in this process ------------------------------------------------------------------------------------


def test_a_counter_that_falls_has_no_rate_and_counts_from_there(monkeypatch):
    """As after a driver's reset: the growth would be negative."""
    from common.nvml import readings
    from common.nvml.readings import Reader, Reading

    counts, moments = iter([100.0, 300.0, 50.0, 90.0, math.nan, 200.0]), iter([0.0, 2.0, 3.0, 7.0, 8.0])
    monkeypatch.setattr(readings, "perf_counter", lambda: next(moments))
    gpu: Any = None
    reader = Reader(gpu, [Reading("sent", (lambda _: next(counts),), is_counter=True)])
    found = [reader.read()["sent"] for _ in range(6)]
    assert found == pytest.approx([math.nan, 100, math.nan, 10, math.nan, 110], nan_ok=True)
