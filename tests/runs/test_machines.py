"""The launchers in sweeps/: what they would run, and two machines, which here are two network namespaces."""

import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import TrainingError
from common.ranks import ranks_of_this_run
from tests.support.launch import (
    ROOT,
    SMALL,
    environment,
    free_port,
    kill_all,
    results_of_output,
    signal_before,
    wait_for,
)
from tests.support.used import read_used

NAMES = ("vgg-test-a", "vgg-test-b")
ADDRESSES = ("10.77.0.1", "10.77.0.2")


def with_torchrun(**variables: str) -> dict[str, str]:
    """The tests' environment, with the torchrun that belongs to this Python first."""
    return {**environment(), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **variables}


def test_two_machines_would_run():
    done = subprocess.run(
        ["sweeps/two_machines.sh", "--dry-run", "--arch", "A", "--out", "x y"],
        cwd=ROOT,
        env=with_torchrun(HOST="localhost", RANKS="4", PORT="1234"),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split()[:3] == ["torchrun", "--nnodes=1:2", "--nproc_per_node=4"]
    assert "--rdzv_endpoint=127.0.0.1:1234 " in done.stdout
    assert "--rdzv_conf=is_host=true,last_call_timeout=30 train.py --arch A --out x y\n" in done.stdout


@pytest.mark.parametrize(("host", "message"), [(None, "give HOST"), ("no.such.machine.invalid", "no such machine")])
def test_two_machines_without_a_host(host, message):
    variables = {"HOST": host} if host else {}
    done = subprocess.run(
        ["sweeps/two_machines.sh", "--dry-run"],
        cwd=ROOT,
        env=with_torchrun(**variables),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert message in done.stderr


def fake_slurm(folder: Path, srun: str) -> dict[str, str]:
    """An environment in which SLURM's commands are scripts that write down how they were called."""
    for name, action in {"srun": srun, "scancel": 'kill -TERM "$(cat srun.pid)"', "scontrol": ":"}.items():
        script = folder / name
        script.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >> {folder}/calls\n{action}\n')
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
    path = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**environment(), "PATH": path, "SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(folder), "HOST": "localhost"}


def test_slurm_would_run(tmp_path):
    variables = {**with_torchrun(), "SLURM_NNODES": "3", "SLURM_GPUS_ON_NODE": "2", "SLURM_JOB_ID": "12345"}
    done = subprocess.run(
        ["bash", "sweeps/slurm.sbatch", "--dry-run", "--arch", "A"],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        check=True,
    )
    step, torchrun = done.stdout.splitlines()
    assert step == "srun --kill-on-bad-exit=1 sweeps/two_machines.sh --arch A"
    assert torchrun.startswith("torchrun --nnodes=3 --nproc_per_node=2 ")
    assert ":22345 " in torchrun


@pytest.mark.parametrize(
    ("variables", "gpus", "ranks"),
    [
        ({"RANKS": "3", "SLURM_GPUS_ON_NODE": "2"}, "", "3"),
        ({"SLURM_GPUS_ON_NODE": "2"}, "", "2"),
        ({"SLURM_GPUS_ON_NODE": "0"}, "", "1"),
        ({}, "", "1"),
        ({}, "No devices were found", "1"),
        ({}, "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-0)", "gpu"),
        ({"CUDA_VISIBLE_DEVICES": ""}, "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-0)", "1"),
        ({"RANKS": "gpu"}, "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-0)", "gpu"),
        ({"RANKS": "gpu"}, "", None),
    ],
)
def test_ranks_of_a_job_are_those_given_or_the_nodes_gpus(tmp_path, variables, gpus, ranks):
    """srun stands for SLURM's and runs the job's step; without a GPU, torchrun would end in a traceback."""
    if not gpus and Path("/proc/driver/nvidia/gpus").is_dir():
        pytest.skip("this machine has a GPU")
    environment = fake_slurm(tmp_path, 'shift; exec "$@"')
    for name, action in {"torchrun": ":", "nvidia-smi": f"echo {gpus!r}; [ -n {gpus!r} ]"}.items():
        (tmp_path / name).write_text(f'#!/usr/bin/env bash\necho "{name} $*" >> {tmp_path}/calls\n{action}\n')
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["bash", "sweeps/slurm.sbatch", "--arch", "A"],
        cwd=ROOT,
        env={**environment, "SLURM_SUBMIT_DIR": str(ROOT), **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    (*_, last) = (tmp_path / "calls").read_text().splitlines()
    if ranks is None:
        assert (done.returncode, done.stderr) == (
            2,
            "error: RANKS=gpu: there is no GPU here; give a number of processes\n",
        )
    else:
        assert done.returncode == 0, done.stderr
        assert last.startswith(f"torchrun --nnodes=2 --nproc_per_node={ranks} ")


def test_slurm_requeues_what_it_stopped(tmp_path):
    """USR1 to the script, ahead of the time limit: the steps get SIGTERM, and the script waits for them."""
    saved = 'sleep 0.5; echo "saved, given $TORCH_ELASTIC_SHUTDOWN_TIMEOUT s" >> calls; exit 1'
    srun = f"echo $$ > srun.pid; trap '{saved}' TERM; while :; do sleep 0.1; done"
    variables = fake_slurm(tmp_path, srun)
    job = subprocess.Popen(["bash", str(ROOT / "sweeps/slurm.sbatch"), "--arch", "A"], env=variables)
    while not (tmp_path / "srun.pid").exists() or not (tmp_path / "srun.pid").read_text():
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=20) == 75
    assert (tmp_path / "calls").read_text().splitlines()[-4:] == [
        "srun --kill-on-bad-exit=1 sweeps/two_machines.sh --arch A",
        "scancel --signal=TERM 7",
        "saved, given 100 s",
        "scontrol requeue 7",
    ]


@pytest.mark.parametrize("before", ['srun --kill-on-bad-exit=1 sweeps/two_machines.sh "$@"', "job=$!"])
def test_slurm_keeps_a_signal_that_comes_as_its_step_starts(tmp_path, before):
    variables = fake_slurm(tmp_path, "trap 'exit 1' TERM; echo $$ > srun.pid; while :; do sleep 0.1; done")
    (tmp_path / "scancel").write_text('until [ -s srun.pid ]; do sleep 0.1; done; kill -TERM "$(cat srun.pid)"\n')
    variables |= signal_before(before, "USR1", tmp_path)
    done = subprocess.run(["bash", str(ROOT / "sweeps/slurm.sbatch")], env=variables, timeout=20, check=False)
    assert (tmp_path / "signal_sent").exists()
    assert done.returncode == 75
    assert (tmp_path / "calls").read_text().splitlines()[-1] == "scontrol requeue 7"


@pytest.mark.parametrize("code", [0, 1])
def test_slurm_passes_on_how_it_ended(tmp_path, code):
    variables = fake_slurm(tmp_path, f"exit {code}")
    done = subprocess.run(["bash", str(ROOT / "sweeps/slurm.sbatch")], env=variables, check=False)
    assert done.returncode == code
    assert "requeue" not in (tmp_path / "calls").read_text()


# ---- ports -------------------------------------------------------------------------------------------------------


def listening() -> set[str]:
    """IPv4 addresses on which this process waits for connections: "0.0.0.0" is all of them; "::" where IPv6 may come too."""
    own = {
        os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink() and os.path.lexists(entry)
    }
    addresses = set()
    for family in ("tcp", "tcp6"):
        for line in Path("/proc/self/net", family).read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in own:
                digits = local.partition(":")[0]
                addresses.add(socket.inet_ntoa(bytes.fromhex(digits)[::-1]) if family == "tcp" else "::")
    return addresses


def test_ranks_of_one_machine_meet_where_no_other_machine_comes(monkeypatch):
    """gloo's default is the address that the machine's name has, which others can reach; torchrun's store is its own affair."""
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "none")  # so that the variable is as before when the test is over
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    with ranks_of_this_run("cpu"):
        assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
        assert listening() - {"::", "0.0.0.0"} == {"127.0.0.1"}  # the store, which is torch's
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")  # what is given stays
    said = r"cannot connect to each other \(.*no-such-interface.*\); check GLOO_SOCKET_IFNAME"
    with pytest.raises(TrainingError, match=said), ranks_of_this_run("cpu"):
        pass


# ---- two network namespaces --------------------------------------------------------------------------------------


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def network() -> Iterator[None]:
    """Two namespaces joined by a cable; skips the test where we may not make them."""
    if not shutil.which("ip"):
        pytest.skip("needs ip (iproute2)")
    try:
        ip("netns", "add", NAMES[0])
    except subprocess.CalledProcessError as error:
        pytest.skip(f"needs the right to make network namespaces ({error.stderr.decode().strip()})")
    try:
        ip("netns", "add", NAMES[1])
        ip("link", "add", "veth-a", "netns", NAMES[0], "type", "veth", "peer", "name", "veth-b", "netns", NAMES[1])
        for name, address, link in zip(NAMES, ADDRESSES, ("veth-a", "veth-b"), strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", link)
            ip("-n", name, "link", "set", link, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "delete", name], check=False)


def start_machine(name: str, *flags: str) -> subprocess.Popen:
    return subprocess.Popen(
        ["ip", "netns", "exec", name, "sweeps/two_machines.sh", *flags],
        cwd=ROOT,
        env=with_torchrun(
            HOST=ADDRESSES[0],
            RANKS="1",
            RESTARTS="3",
            LAST_CALL="5",
            PROGRAM="tests/support/programs/recording_worker.py",
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_one_of_two_machines_is_killed_and_restarted(network, tmp_path):
    flags = [*SMALL, "--steps", "250", "--checkpoint-minutes", "0.05", "--out", str(tmp_path)]
    first, second = start_machine(NAMES[0], *flags), start_machine(NAMES[1], *flags)
    try:
        wait_for(first, "CPU, fp32, eager; batch 12 = 2 ranks")
        for _ in range(20):
            wait_for(first, "step ")
        kill_all(second)
        wait_for(first, "going on from")
        wait_for(first, "CPU, fp32, eager; batch 12 = 1 ranks")
        second = start_machine(NAMES[1], *flags)
        wait_for(first, "CPU, fp32, eager; batch 12 = 2 ranks")
        output, error = first.communicate(timeout=200)
        assert first.returncode == 0, error
        second.communicate(timeout=60)
        assert second.returncode == 0
    finally:
        for torchrun in (first, second):
            kill_all(torchrun)
    assert results_of_output(output)["steps"] == 250
    used = read_used(tmp_path, batch_size=12)
    assert used.world_sizes == [2, 1, 2]
    assert not used.differing
    assert set(used.rows(0, 1437).values()) == {1}
    assert set(used.rows(1, 1437).values()) == {1}
