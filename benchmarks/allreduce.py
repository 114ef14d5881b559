"""python -m benchmarks.allreduce --ranks 2 3: the model of all-reduce (perf/scaling.py) against gloo, over limited links.

Each rank runs on a machine of its own, which is a network namespace whose link to the others, over a switch, tc limits to
--mbits-per-second. The prediction is
a ring's, gloo's algorithm, with that bandwidth less the packets' headers; the latency is that of an all-reduce of 4 bytes.
Needs Linux, iproute2 and root.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from benchmarks import flag_parser, program
from common.errors import TrainingError, UserError
from common.process import end, usable_cores
from perf.report import Links
from perf.scaling import all_reduce_seconds

_FLOAT_BYTES = 4
_PORT = 29400  # any: no one else is in the namespace
_TIMES, _TIMES_SMALL = 5, 20
_PATIENCE_SECONDS = 900
INTERFACE = "uplink"
# Of each 1514 bytes that Ethernet carries: 14 are its own header, 20 IP's, 32 TCP's with time stamps.
PAYLOAD_SHARE = 1448 / 1514
_BURST_BYTES, _BURST_SECONDS = 32 << 10, 1e-3  # what passes at once after a pause: little against the messages


class Machine(NamedTuple):
    namespace: str
    address: str

    def command(self, *words: str) -> list[str]:
        """A command line that runs there."""
        return ["ip", "netns", "exec", self.namespace, *words]


@program
def main(argv: list[str] | None) -> dict:
    parser = flag_parser("allreduce", "Predicted and measured all-reduce over limited links.")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3], help="numbers of ranks to try")
    parser.add_argument("--megabytes", type=float, nargs="+", default=[1, 4, 16], help="sizes of the all-reduce to try")
    parser.add_argument("--mbits-per-second", type=float, default=100, help="rate of each link, in each direction")
    arguments = parser.parse_args(argv)
    if min(arguments.ranks) < 2 or min(arguments.megabytes) <= 0 or arguments.mbits_per_second <= 0:
        raise UserError("give --ranks of 2 or more, and --megabytes and --mbits-per-second above 0")
    print(f"gloo over links of {arguments.mbits_per_second:,g} Mbit/s")
    print(f"{'ranks':>6}{'MB':>8}{'latency, ms':>14}{'predicted, ms':>16}{'measured, ms':>16}{'ratio':>8}")
    rows = [row for ranks in arguments.ranks for row in check(ranks, arguments)]
    largest = max(abs(row["measured_over_predicted"] - 1) for row in rows)
    return {"mbits_per_second": arguments.mbits_per_second, "rows": rows, "largest_error": largest}


def check(ranks: int, arguments: argparse.Namespace) -> list[dict]:
    """Predicted and measured seconds of each size; a line is printed for each."""
    sizes = [int(megabytes * 1e6) // _FLOAT_BYTES * _FLOAT_BYTES for megabytes in arguments.megabytes]
    with limited_machines(ranks, mbits_per_second=arguments.mbits_per_second) as machines:
        code = f"from benchmarks import allreduce; allreduce.rank({[_FLOAT_BYTES, *sizes]})"
        smallest_seconds, *measured = run_ranks(machines, code)
    rate, latency = arguments.mbits_per_second * 1e6 / 8 * PAYLOAD_SHARE, smallest_seconds / (2 * (ranks - 1))
    links = Links(peer_bytes_per_second=rate, network_bytes_per_second=rate, gpus_per_node=1, latency_seconds=latency)
    rows = []
    for size, seconds in zip(sizes, measured, strict=True):
        predicted = all_reduce_seconds(size, ranks=ranks, links=links, algorithm="ring")
        ratio = seconds / predicted
        times = f"{1e3 * latency:14.3f}{1e3 * predicted:16.2f}{1e3 * seconds:16.2f}"
        print(f"{ranks:6}{size / 1e6:8.1f}{times}{ratio:8.3f}", flush=True)
        row = {"ranks": ranks, "bytes": size, "latency_seconds": latency, "predicted_seconds": predicted}
        rows.append({**row, "measured_seconds": seconds, "measured_over_predicted": ratio})
    return rows


def run_ranks(machines: list[Machine], code: str) -> Any:
    """Run Python's code as one rank on each machine, with an equal share of the cores. Returns what rank 0 prints last, as JSON.

    Raises TrainingError: a rank failed, or all of them take too long.
    """
    variables = {**os.environ, "WORLD_SIZE": str(len(machines)), "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    variables |= {"MASTER_ADDR": machines[0].address, "MASTER_PORT": str(_PORT), "GLOO_SOCKET_IFNAME": INTERFACE}
    variables["OMP_NUM_THREADS"] = str(max(1, usable_cores() // len(machines)))
    workers = [
        subprocess.Popen(
            machine.command(sys.executable, "-c", code),
            env={**variables, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, machine in enumerate(machines)
    ]
    try:
        answers = [worker.communicate(timeout=_PATIENCE_SECONDS) for worker in workers]
    except subprocess.TimeoutExpired as error:
        raise TrainingError(f"the ranks were not done after {_PATIENCE_SECONDS} s") from error
    finally:
        for worker in workers:
            worker.kill()
    for worker, (_, complaint) in zip(workers, answers, strict=True):
        if worker.returncode:
            raise TrainingError(f"a rank failed: {complaint.strip().splitlines()[-1:]}")
    return json.loads(answers[0][0].splitlines()[-1])


def rank(sizes: list[int]) -> None:
    """One rank: print the median seconds of each size as JSON. torchrun's variables say which one it is."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    medians = []
    for size in sizes:
        values, seconds = torch.ones(size // _FLOAT_BYTES), []
        for _ in range(1 + (_TIMES_SMALL if values.numel() == 1 else _TIMES)):
            dist.barrier()
            began = perf_counter()
            dist.all_reduce(values)
            seconds.append(perf_counter() - began)
        medians.append(statistics.median(seconds[1:]))  # the first opens the connections
    print(json.dumps(medians))
    dist.destroy_process_group()


# ---- machines that are network namespaces -----------------------------------------------------------------------


@contextmanager
def limited_machines(count: int, *, mbits_per_second: float | None) -> Iterator[list[Machine]]:
    """So many machines, each of which sends at most so much, headers included (None: no limit), by tc's token bucket filter.

    Raises UserError: no right to make namespaces, no ip or tc.
    """
    if missing := [name for name in ("ip", "tc") if not shutil.which(name)]:
        raise UserError(f"needs {' and '.join(missing)}: install iproute2")
    prefix = f"vgg-{os.getpid()}"
    switch = f"{prefix}-switch"
    machines = [Machine(f"{prefix}-{number}", f"10.78.0.{number + 1}") for number in range(count)]
    try:
        _commands(f"""ip netns add {switch}
            ip -n {switch} link add switch type bridge
            ip -n {switch} link set switch up""")
        for number, machine in enumerate(machines):
            name, port = machine.namespace, f"port{number}"
            _commands(f"""ip netns add {name}
                ip -n {name} link add {INTERFACE} type veth peer name {port} netns {switch}
                ip -n {switch} link set {port} master switch up
                ip -n {name} address add {machine.address}/24 dev {INTERFACE}
                ip -n {name} link set {INTERFACE} up
                ip -n {name} link set lo up""")
            if mbits_per_second:
                burst = max(_BURST_BYTES, round(mbits_per_second * 1e6 / 8 * _BURST_SECONDS))
                limit = f"tbf rate {mbits_per_second}mbit burst {burst} latency 50ms"
                _commands(f"ip netns exec {name} tc qdisc add dev {INTERFACE} root {limit}")
        yield machines
    finally:
        for namespace in (switch, *(machine.namespace for machine in machines)):
            subprocess.run(["ip", "netns", "delete", namespace], check=False, capture_output=True)


def _commands(lines: str) -> None:
    for line in lines.splitlines():
        done = subprocess.run(line.split(), check=False, capture_output=True, text=True)
        if done.returncode:
            why = " ".join(done.stderr.split()) or line.strip()
            as_root = "where root may not, in a container, start that with --privileged"
            cure = "run this as root" if os.geteuid() else as_root
            raise UserError(f"cannot make a network namespace ({why}); {cure}")


if __name__ == "__main__":
    end(main)
