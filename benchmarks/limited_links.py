"""Machines that are network namespaces, on a switch, each with a link of limited rate: to measure on one computer."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from common.errors import UserError

INTERFACE = "uplink"
# Of each 1514 bytes that Ethernet carries: 14 are its own header, 20 IP's, 32 TCP's with time stamps.
PAYLOAD_SHARE = 1448 / 1514
_BURST_BYTES = 32 << 10  # what passes at once after a pause: little against the messages
_QUEUE_MILLISECONDS = 50


@dataclass(frozen=True)
class Machine:
    namespace: str
    address: str

    def command(self, *words: str) -> list[str]:
        """A command line that runs there."""
        return ["ip", "netns", "exec", self.namespace, *words]


@contextmanager
def limited_machines(count: int, *, mbits_per_second: float) -> Iterator[list[Machine]]:
    """So many machines, each of which sends at most so much, headers included; tc's token bucket filter limits it.

    Raises UserError: no right to make namespaces, no ip or tc.
    """
    if missing := [name for name in ("ip", "tc") if not shutil.which(name)]:
        raise UserError(f"needs {' and '.join(missing)}: install iproute2")
    prefix = f"vgg-{os.getpid()}"
    switch = f"{prefix}-switch"
    machines = [Machine(f"{prefix}-{number}", f"10.78.0.{number + 1}") for number in range(count)]
    try:
        _run("ip", "netns", "add", switch)
        _run("ip", "-n", switch, "link", "add", "switch", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "switch", "up")
        for number, machine in enumerate(machines):
            _connect(machine, switch, f"port{number}", mbits_per_second)
        yield machines
    finally:
        for namespace in (switch, *(machine.namespace for machine in machines)):
            subprocess.run(["ip", "netns", "delete", namespace], check=False, capture_output=True)


def _connect(machine: Machine, switch: str, port: str, mbits_per_second: float) -> None:
    inside = ("ip", "-n", machine.namespace)
    _run("ip", "netns", "add", machine.namespace)
    _run(*inside, "link", "add", INTERFACE, "type", "veth", "peer", "name", port, "netns", switch)
    _run("ip", "-n", switch, "link", "set", port, "master", "switch", "up")
    _run(*inside, "address", "add", f"{machine.address}/24", "dev", INTERFACE)
    _run(*inside, "link", "set", INTERFACE, "up")
    _run(*inside, "link", "set", "lo", "up")
    limit = ("rate", f"{mbits_per_second}mbit", "burst", str(_BURST_BYTES), "latency", f"{_QUEUE_MILLISECONDS}ms")
    _run(*machine.command("tc", "qdisc", "add", "dev", INTERFACE, "root", "tbf", *limit))


def _run(*words: str) -> None:
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    if done.returncode:
        why = " ".join(done.stderr.split()) or " ".join(words)
        cure = (
            "run this as root" if os.geteuid() else "where root may not, in a container, start that with --privileged"
        )
        raise UserError(f"cannot make a network namespace ({why}); {cure}")
