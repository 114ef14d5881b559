"""profile/nvml_sampler.py: runs a command, and samples the GPUs meanwhile."""

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import UserError
from common.files import replacing
from common.flags import FlagParser
from common.process import run_program
from common.progress import say
from perf.telemetry import NvmlSampler
from perf.words import number, reading

_PASSED_ON = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}
_WAITED_FOR = _PASSED_ON | {signal.SIGCHLD}
_COLUMNS = ("median", "p5", "p95", "min", "max")


def main(argv: list[str] | None = None) -> int:
    return run_program(lambda: _run(argv))


def _run(argv: list[str] | None) -> int:
    options, command = parse_args(sys.argv[1:] if argv is None else argv)
    with held_signals() as mask:
        with NvmlSampler(interval_seconds=options.interval_ms / 1e3) as sampler:
            exit_code = run_command(command, mask)
        telemetry = sampler.report()
        for line in table(telemetry):
            say(line)
        report = {"program": "nvml_sampler", "command": command, "exit_code": exit_code, **telemetry}
        _write(json.dumps(report), options.out)
    return exit_code


def _write(report: str, out: Path | None) -> None:
    if out is None:
        print(report, flush=True)
        return
    try:
        with replacing(out) as file:
            file.write(report.encode() + b"\n")
    except OSError as error:  # after what may have been a long run
        say(f"{out} cannot be written ({error.strerror}). The report: {report}")


def add_interval_flag(parser: FlagParser) -> None:
    parser.add_argument("--interval-ms", type=float, default=100.0, help="milliseconds between two samples of a GPU")


def check_interval(interval_ms: float) -> None:
    """Raises UserError."""
    if not 1 <= interval_ms <= 3_600_000:
        raise UserError(f"--interval-ms is {interval_ms:g}: give it at least 1 and at most an hour")


def parse_args(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the command behind "--". Raises UserError."""
    parser = FlagParser(
        prog="python profile/nvml_sampler.py",
        usage="%(prog)s [--interval-ms MS] [--out FILE.json] -- COMMAND…",
        description="Sample the GPUs while a command runs.",
    )
    add_interval_flag(parser)
    parser.add_argument("--out", type=Path, help="file for the report, instead of the last line of stdout")
    split = argv.index("--") if "--" in argv else len(argv)
    options, command = parser.parse_args(argv[:split]), argv[split + 1 :]
    if not command:
        raise UserError("there is no command: give it behind --, as in -- python train.py")
    check_interval(options.interval_ms)
    if options.out is not None and (options.out.is_dir() or not options.out.absolute().parent.is_dir()):
        raise UserError(f"--out {options.out} cannot be written: give a file in a folder that is there")
    return options, command


# ---- the command ------------------------------------------------------------------------------------------------------


@contextmanager
def held_signals() -> Iterator[set]:
    """Signals wait until run_command takes them, and threads started inside take none. Yields the mask from before.

    Only before there are other threads. Waiting tells who sent a signal, as handling it in Python does not.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _WAITED_FOR)
    try:
        yield mask
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def run_command(command: list[str], mask: set) -> int:
    """Run it, inside held_signals() which gave the mask, and wait for its end.

    Returns its exit code, or 128 + the signal that ended it, as shells do. Raises UserError: it cannot be run.
    """
    try:
        # setsigdef: these two Python ignores, and the command would inherit that.
        process = os.posix_spawnp(
            command[0], command, os.environ, setsigmask=mask, setsigdef=[signal.SIGPIPE, signal.SIGXFSZ]
        )
    except OSError as error:
        raise UserError(f"cannot run {command[0]}: {error.strerror}") from error
    while True:
        received = signal.sigwaitinfo(_WAITED_FOR)
        if received.si_signo == signal.SIGCHLD:
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code
        elif received.si_code <= 0:  # from a process; a terminal's own (Ctrl-C) has reached the command already
            os.kill(process, received.si_signo)


# ---- the table --------------------------------------------------------------------------------------------------------


def table(telemetry: dict) -> list[str]:
    """Lines: each GPU's readings, energy, what lowered its clocks, and what could not be read."""
    lines = [] if telemetry["reason"] is None else [f"GPU telemetry: {telemetry['reason']}"]
    for gpu in telemetry["devices"]:
        joules = gpu["energy_joules"]
        energy = "energy unknown" if joules is None else f"{joules:,.1f} J by {gpu['energy_source']}"
        lines.append(
            f"GPU {gpu['index']}, {gpu['name']}, {gpu['uuid']}: "
            f"{telemetry['samples']} samples in {telemetry['seconds']:.1f} s, {energy}"
        )
        lines.append(f"  {'':34}" + "".join(f"{column:>11}" for column in _COLUMNS))
        for field, spread in gpu["fields"].items():
            if spread is not None:
                name, factor = reading(field)
                lines.append(f"  {name:34}" + "".join(f"{number(factor * spread[column]):>11}" for column in _COLUMNS))
        lines += _limits(gpu)
        lines += [
            f"  clock lowered by {reason} in {fraction:.1%} of the samples"
            for reason, fraction in (gpu["throttled_fraction"] or {}).items()
            if fraction > 0
        ]
        lines += [f"  {name}: {reason}" for name, reason in gpu["missing"].items()]
    return lines


def _limits(gpu: dict) -> list[str]:
    """What the card is held to, on one line."""
    watts, default, clock = (gpu[key] for key in ("power_limit_watts", "default_power_limit_watts", "max_sm_clock_mhz"))
    parts = []
    if watts is not None:
        parts.append(f"power limit {watts:g} W{f' (by default {default:g} W)' if default not in (None, watts) else ''}")
    if clock is not None:
        parts.append(f"highest SM clock {clock:g} MHz")
    return [f"  {', '.join(parts)}{'; of the whole GPU' if gpu['is_mig'] else ''}"] if parts else []
