"""A SLURM of a test's own: Debian's packages, a controller and nodes that are namespaces of this machine.

A node has its own network, processes, host name and /etc/hosts. It can be switched off like a machine, and nothing of it is
left when the test ends. Files are those of this machine, so every folder is shared.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.support.launch import ROOT

PACKAGES = {"munged": "munge", "slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client"}
"""Program → its package in Debian and Ubuntu. Without systemd, nothing of them starts by itself."""
REQUEUED_SECONDS = 10
"""How long a job that was queued again waits at least; SLURM's default is two minutes."""
_FREEZER = Path("/sys/fs/cgroup/freezer")
"""Of cgroup v1. With it SLURM finds every process of a job, as on most clusters; without it, those whose parents it knows."""
_CONTROLLER = "10.79.0.254"
_PATIENCE_SECONDS = 60


class Slurm:
    """What a user and an operator of the cluster do."""

    def __init__(self, folder: Path, nodes: Sequence[str]) -> None:
        self.folder = folder
        self.nodes = {name: f"10.79.0.{number}" for number, name in enumerate(nodes, start=1)}
        self._prefix = f"vgg-{os.getpid()}"
        self._switch = f"{self._prefix}-switch"
        self._running: dict[str, subprocess.Popen] = {}

    def command(self, *words: str, variables: Mapping[str, str] | None = None, check: bool = True) -> str:
        """The stdout of a command of SLURM's, as a user on a login node gives it. variables: besides those of this process."""
        done = subprocess.run(
            [*_network(self._switch), *words],
            cwd=ROOT,
            env={**os.environ, "SLURM_CONF": str(self._conf), **(variables or {})},
            capture_output=True,
            text=True,
            check=False,
        )
        assert not check or done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says of one; {} when it is forgotten."""
        lines = self.command("scontrol", "--oneliner", "show", "job", number, check=False).splitlines()
        words = lines[0].split() if lines else []
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, reached: Callable[[], object], seconds: float, what: str) -> None:
        """AssertionError, with what the daemons noted, if it takes longer."""
        deadline = time.monotonic() + seconds
        while not reached():
            if time.monotonic() > deadline:
                logs = "\n".join(log.read_text()[-3000:] for log in self.folder.glob("*.log"))
                raise AssertionError(f"not after {seconds:.0f} s: {what}\n{self.command('squeue', check=False)}{logs}")
            time.sleep(0.5)

    def wait_until_gone(self, number: str, seconds: float) -> None:
        """Until a job, or an array with all its tasks, has ended."""
        queue = ["squeue", "--noheader", "--jobs", number]
        self.wait(lambda: not self.command(*queue, check=False).strip(), seconds, f"the end of job {number}")

    def wait_for_state(self, number: str, state: str, seconds: float) -> None:
        self.wait(lambda: self.job(number).get("JobState") == state, seconds, f"job {number} {state}")

    def start_node(self, name: str) -> None:
        """It is there when this returns."""
        _run("ip", "-n", self._namespace(name), "link", "set", "uplink", "up")
        inside = [f"hostname {name}", f"mount --bind {self.folder}/hosts /etc/hosts"]
        if _FREEZER.is_dir():
            group = self._group(name)
            group.mkdir(exist_ok=True)
            inside += [f"mount --bind {group} {_FREEZER}"]
        inside += [f"exec slurmd -D -N {name} -f {self._conf}"]
        separate = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._start(name, [*_network(self._namespace(name)), *separate, "bash", "-c", " && ".join(inside)])
        self.wait(lambda: self._is_there(name), _PATIENCE_SECONDS, f"node {name} is idle")

    def switch_off(self, name: str) -> None:
        """As if its power failed: no process of it is left, and no connection is closed."""
        _run("ip", "-n", self._namespace(name), "link", "set", "uplink", "down")
        self._stop(name)

    def _is_there(self, name: str) -> bool:
        states = self.command("sinfo", "--noheader", "--nodes", name, "--format", "%T", check=False)
        return states.split()[:1] == ["idle"]

    @property
    def _conf(self) -> Path:
        return self.folder / "slurm.conf"

    def _namespace(self, node: str) -> str:
        return f"{self._prefix}-{node}"

    def _group(self, node: str) -> Path:
        return _FREEZER / self._namespace(node)

    def start(self) -> None:
        self._write_configuration()
        try:
            self._make_network()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"needs the right to make network namespaces ({error.stderr.decode().strip()})")
        files = [
            f"--{name}={self.folder}/munge.{name}"
            for name in ("key-file", "socket", "pid-file", "log-file", "seed-file")
        ]
        self._start("munged", ["munged", "--foreground", "--force", *files])
        self.wait((self.folder / "munge.socket").exists, _PATIENCE_SECONDS, "munged")
        self._start("slurmctld", [*_network(self._switch), "slurmctld", "-D", "-f", str(self._conf)])
        for name in self.nodes:
            self.start_node(name)

    def stop(self) -> None:
        """Processes first, the newest of them first; never fails, so that all is tried."""
        for name in reversed(list(self._running)):
            self._stop(name)
        for namespace in (self._switch, *map(self._namespace, self.nodes)):
            subprocess.run(["ip", "netns", "delete", namespace], check=False, capture_output=True)
        for group in map(self._group, self.nodes):
            for folder in (*sorted(group.rglob("*/"), reverse=True), group):
                with suppress(OSError):
                    folder.rmdir()

    def _start(self, name: str, command: list[str]) -> None:
        with open(self.folder / f"{name}.out", "ab") as output:
            self._running[name] = subprocess.Popen(
                command, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )

    def _stop(self, name: str) -> None:
        """Of a node the first process is killed, with which the kernel ends all others; the daemons end as they wish."""
        process = self._running.pop(name)
        if name in self.nodes:
            with suppress(OSError):  # it may have ended by itself
                for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
                    os.kill(int(child), signal.SIGKILL)
        else:
            process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _write_configuration(self) -> None:
        (self.folder / "munge.key-file").write_bytes(secrets.token_bytes(128))
        (self.folder / "munge.key-file").chmod(0o600)
        addresses = "".join(f"{address} {name}\n" for name, address in self.nodes.items())
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n{addresses}")
        nodes = "".join(
            f"NodeName={name} NodeAddr={address} CPUs={os.cpu_count()}\n" for name, address in self.nodes.items()
        )
        (self.folder / "cgroup.conf").write_text(f"CgroupPlugin=cgroup/v1\nCgroupMountpoint={_FREEZER.parent}\n")
        self._conf.write_text(
            f"""\
ClusterName=vgg
SlurmctldHost={socket.gethostname()}({_CONTROLLER})
AuthType=auth/munge
AuthInfo=socket={self.folder}/munge.socket,cred_expire={REQUEUED_SECONDS}
SlurmUser=root
StateSaveLocation={self.folder}/state
SlurmdSpoolDir={self.folder}/%n.spool
SlurmctldPidFile={self.folder}/slurmctld.pid
SlurmdPidFile={self.folder}/%n.pid
SlurmctldLogFile={self.folder}/slurmctld.log
SlurmdLogFile={self.folder}/%n.log
ProctrackType={"proctrack/cgroup" if _FREEZER.is_dir() else "proctrack/linuxproc"}
TaskPlugin=task/none
MailProg=/bin/true
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout=15
OverTimeLimit=0
{nodes}\
PartitionName=usual Nodes=ALL Default=YES PriorityTier=1
PartitionName=urgent Nodes=ALL PriorityTier=2
"""
        )

    def _make_network(self) -> None:
        """A switch, to which the controller belongs, and a cable from each node to it."""
        inside = ["ip", "-n", self._switch]
        _run("ip", "netns", "add", self._switch)
        _run(*inside, "link", "add", "switch", "type", "bridge")
        _run(*inside, "address", "add", f"{_CONTROLLER}/24", "dev", "switch")
        for link in ("lo", "switch"):
            _run(*inside, "link", "set", link, "up")
        for number, (name, address) in enumerate(self.nodes.items()):
            node, port = self._namespace(name), f"port{number}"
            _run("ip", "netns", "add", node)
            _run("ip", "-n", node, "link", "add", "uplink", "type", "veth", "peer", "name", port, "netns", self._switch)
            _run("ip", "-n", node, "address", "add", f"{address}/24", "dev", "uplink")
            _run("ip", "-n", node, "link", "set", "lo", "up")
            _run(*inside, "link", "set", port, "master", "switch", "up")


@contextmanager
def cluster(*nodes: str) -> Iterator[Slurm]:
    """SLURM with these nodes; skips the test where it cannot be had."""
    _install()
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o711)  # munge wants its socket within everybody's reach
    slurm = Slurm(folder, nodes)
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _install() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, for the daemons of SLURM and the namespaces of its nodes")
    missing = sorted(package for program, package in PACKAGES.items() if not shutil.which(program))
    if missing and not shutil.which("apt-get"):
        pytest.skip(f"needs {', '.join(missing)}, and there is no apt-get to install them")
    if missing:
        options = ["-o", "DPkg::Lock::Timeout=300", "--no-install-recommends", "--yes"]
        variables = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        command = ["apt-get", "install", *options, *missing]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"needs {', '.join(missing)}, which apt-get cannot install ({done.stderr.strip()})")
    if absent := [name for name in ("ip", "nsenter", "unshare") if not shutil.which(name)]:
        pytest.skip(f"needs {', '.join(absent)}")


def _network(namespace: str) -> list[str]:
    """ip netns exec would mount a /sys of its own, in which slurmd finds no cgroup."""
    return ["nsenter", f"--net=/run/netns/{namespace}"]


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
