"""python -m benchmarks.gpu_report [--data DIR] [--dry-run]: everything that waits for a GPU to be measured, in one go.

Runs, each in a process of its own: the tests in tests/gpu; profile/throughput.py for A, D and E in bf16 and fp16, on noise and
on images; benchmarks.inputs for D, on all cores and on fewer; benchmarks.loaders with the GPU's decoder; benchmarks.steps
against torchvision's and timm's networks. A run that fails is told of by name, and the others go on. Writes
docs/gpu/<card>.json, and the table of all cards in docs/performance.md.

Without --data, the images are pieces of scikit-learn's photographs. Nothing is downloaded.
"""

import importlib.util
import itertools
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import torch

from benchmarks import flag_parser
from benchmarks.photographs import photograph_folder
from benchmarks.turns import RATE, table
from common.errors import UserError
from common.files import replacing, writing_to
from common.process import end, run_program, usable_cores
from common.progress import say
from common.ranks import ranks_of_this_run
from engine.config import SYNTHETIC
from perf.machine import ROOT, git_revision, hardware
from perf.report import REPORT_JSON, Report

FORMAT = 2
"""Of docs/gpu/<card>.json. 1, which is shown too, has the median of laps as a stage's rate, and no intervals."""
BEGIN, END = "<!-- gpu-report: made by make gpu-report -->", "<!-- end of gpu-report -->"
_ARCHS, _PRECISIONS = ("A", "D", "E"), ("bf16", "fp16")
_AT_224 = ("--crop", "224", "--train-scale", "256", "--device", "cuda")
_SIZES = (256, 128, 64, 32)
"""Images at a time; the next one where the GPU's memory is too small."""
_CORES = (6, 16)
"""Of a machine that has more: which decoder is the best depends on how many cores each GPU has."""
_SECONDS_A_RUN = 1800
_GENERATED = "generated photographs"
_NOTHING = "Nothing yet: `make gpu-report` on a machine with a GPU writes this section."
_MEANING = {
    1: "Images per second are medians",
    2: "Images per second of the first table are images over time, of the others medians over rounds (lowest–highest)",
}


@dataclass(frozen=True)
class Run:
    """A program to run."""

    kind: str
    """tests, throughput, inputs, loaders or steps."""
    name: str
    command: list[str]
    """What follows the interpreter."""
    size_flag: str | None = None
    """The flag that takes one of _SIZES."""
    report: Path | None = None
    """The file with the results; None: the last line on stdout is them."""

    def at(self, size: int) -> list[str]:
        return [*self.command, self.size_flag, str(size)] if self.size_flag else self.command


def main(argv: list[str] | None = None) -> int:
    return run_program(lambda: _run(argv))


def _run(argv: list[str] | None) -> int:
    parser = flag_parser("gpu_report", "Measure on a GPU what this project promises of one.")
    parser.add_argument(
        "--data", type=Path, help="folder with train/<class>/* and val/<class>/*; default: made-up images"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/gpu-report"), help="folder for the files of the runs")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder with performance.md and gpu/")
    parser.add_argument("--dry-run", action="store_true", help="only list what would be run")
    arguments = parser.parse_args(argv)
    folder = arguments.work.resolve()  # the runs start in the repository
    work = folder / f"{datetime.now():%Y%m%d-%H%M%S}"
    data = arguments.data.resolve() if arguments.data else folder / "photographs"
    runs, left_out = plan(data, work)
    if arguments.dry_run:
        for run in runs:
            say(" ".join(["python", *run.at(_SIZES[0])]))
        print(json.dumps({"runs": [run.name for run in runs], "left_out": left_out}))
        return 0
    if not torch.cuda.is_available():
        raise UserError("no GPU: torch finds none here; check the driver with nvidia-smi, or see --dry-run")
    if arguments.data is None:
        photograph_folder(data)
    report = measure(runs, left_out, work)
    report["data"] = data.name if arguments.data else _GENERATED
    path = write(report, arguments.docs)
    print(json.dumps({"card": report["card"], "failed": report["failed"], "report": str(path)}))
    return 1 if report["failed"] or not report["tests"] or report["tests"]["failed"] else 0


def plan(data: Path, work: Path) -> tuple[list[Run], dict[str, str]]:
    """The runs in order, and by name what is left out because it is not installed."""
    left_out = {
        name: f"{module} is not installed"
        for name, module in (("tests/gpu", "pytest"), ("timm's networks", "timm"))
        if not importlib.util.find_spec(module)
    }
    results, images, size = work / "tests.xml", str(data), ["--batch-size", str(_SIZES[0])]
    command = ["-m", "pytest", "tests/gpu", "-q", "-rs", f"--junitxml={results}"]
    runs = [] if "tests/gpu" in left_out else [Run("tests", "tests/gpu", command, report=results)]
    for arch, precision, of in itertools.product(_ARCHS, _PRECISIONS, ("noise", "images")):
        out = work / f"{arch}-{precision}-{of}"
        command = ["profile/throughput.py", *_AT_224, "--arch", arch, "--precision", precision, *size]
        command += ["--data", SYNTHETIC if of == "noise" else images, "--out", str(out)]
        runs.append(Run("throughput", f"{arch} {precision}, {of}", command, "--micro-batch", out / REPORT_JSON))
    command = ["-m", "benchmarks.inputs", *_AT_224, "--arch", "D", "--precision", "bf16", "--data", images, *size]
    runs.append(Run("inputs", "D bf16, inputs", command, "--micro-batch"))
    for cores in _CORES:
        name = f"D bf16, inputs on {cores} cores"
        if cores < usable_cores():
            runs.append(Run("inputs", name, [*command, "--cores", str(cores)], "--micro-batch"))
        elif cores > usable_cores():
            left_out[name] = f"this machine has {usable_cores()}"
    for precision in _PRECISIONS:
        command = ["-m", "benchmarks.steps", *_AT_224, "--arch", "D", "--precision", precision, "--variants"]
        runs.append(Run("steps", f"D {precision}, against others", command, "--batch-size"))
    command = ["-m", "benchmarks.loaders", "--data", images, "--device", "cuda", "--batch-size", "128"]
    runs.append(Run("loaders", "loaders", command))
    return runs, left_out


def measure(runs: list[Run], left_out: dict[str, str], work: Path) -> dict:
    """Run everything. Returns the content of docs/gpu/<card>.json, less "data"."""
    work.mkdir(parents=True)
    with ranks_of_this_run("cuda") as ranks:
        machine = msgspec.to_builtins(hardware(ranks))
    kept: dict = {"tests": None, "throughput": {}, "inputs": {}, "steps": {}, "loaders": None}
    failed = {}
    for number, run in enumerate(runs, start=1):
        say(f"{number} of {len(runs)}: {run.name}")
        result, reason = execute(run)
        if result is None:
            failed[run.name] = reason
            say(f"{run.name} failed: {reason}")
        elif kept[run.kind] is None:  # one run of its kind
            kept[run.kind] = results_of(run.kind, result)
        else:
            kept[run.kind][run.name] = results_of(run.kind, result)
    return {
        "program": "gpu_report",
        "format": FORMAT,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "git_revision": git_revision(),
        "card": machine["name"],
        "hardware": machine,
        **kept,
        "left_out": left_out,
        "failed": failed,
    }


def results_of(kind: str, text: str) -> dict:
    """What is kept of what a run of this kind has left."""
    if kind == "tests":
        return of_tests(text)
    if kind == "throughput":
        return of_throughput(msgspec.json.decode(text, type=Report))
    return {name: value for name, value in json.loads(text).items() if name != "data"}  # no paths of the machine


def execute(run: Run) -> tuple[str | None, str]:
    """Run it with the largest size that fits. Returns its results as text, or None and why there are none."""
    reason = ""
    for size in _SIZES if run.size_flag else _SIZES[:1]:
        command = [sys.executable, *run.at(size)]
        try:
            done = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, timeout=_SECONDS_A_RUN, check=False
            )
        except subprocess.TimeoutExpired:
            return None, f"it took more than {_SECONDS_A_RUN // 60} minutes"
        sys.stderr.write(done.stderr)
        if run.report and run.report.exists():  # of tests that fail, too
            return run.report.read_text(), ""
        if done.returncode == 0 and not run.report:
            return done.stdout.splitlines()[-1], ""
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}, and no word"])[-1]
        if "memory is too small" not in done.stderr:
            break
    return None, reason


def write(report: dict, docs: Path) -> Path:
    """Write docs/gpu/<card>.json and the table of all cards. Returns the former's path. Raises UserError."""
    path = docs / "gpu" / f"{re.sub('[^a-z0-9]+', '-', report['card'].lower()).strip('-')}.json"
    with writing_to(path, "--docs"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(json.dumps(report, indent=1).encode() + b"\n")
    rewrite_table(docs)
    return path


# ---- what is kept, and the section that shows it -------------------------------------------------------------


def of_tests(junit: str) -> dict:
    """Of pytest's --junitxml: how many passed; the others by name, with the reason."""
    counts: dict = {"passed": 0, "failed": {}, "skipped": {}, "expected_failures": {}}
    for case in ElementTree.fromstring(junit).iter("testcase"):
        problem = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        if problem is None:
            counts["passed"] += 1
            continue
        expected = problem.get("type") == "pytest.xfail"
        kind = "expected_failures" if expected else "skipped" if problem.tag == "skipped" else "failed"
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        counts[kind][name] = (problem.get("message") or "").partition("\n")[0]
    return counts


def of_throughput(report: Report) -> dict:
    """Rates, the step's parts, how near the hardware's limit, energy, the verdict."""
    names = ("arch", "precision", "batch_size", "micro_batch", "compile", "decoder")
    stages, parts = msgspec.structs.asdict(report.stages), msgspec.structs.asdict(report.step_parts)
    kept = {
        "config": {name: report.config[name] for name in names},
        "stages": {
            name: stage and {RATE: stage.images_per_second, "interval": stage.interval}
            for name, stage in stages.items()
        },
        "step_parts": {name: part and part.mean for name, part in parts.items()},
        "compile_seconds": report.warm_up.compile_seconds,
        "ceiling": report.ceiling,
        "peaks": report.roofline.peaks,
        "mfu": report.roofline.mfu,
        "images_per_joule": report.roofline.images_per_joule,
        "power_watts": [device.fields.get("power_watts") for device in report.telemetry.devices],
        "verdict": {name: getattr(report.verdict, name) for name in ("bound", "sentence", "evidence")},
    }
    return msgspec.to_builtins(kept)


def rewrite_table(docs: Path) -> None:
    """Replace what stands between the two comments in DOCS/performance.md. Raises OSError, and UserError: they are not there."""
    path = docs / "performance.md"
    before, found_begin, rest = path.read_text().partition(BEGIN)
    _, found_end, after = rest.partition(END)
    if not (found_begin and found_end):
        raise UserError(f"{path}: has no lines {BEGIN} and {END} to put the table between; restore them")
    reports = [json.loads(report.read_text()) for report in sorted((docs / "gpu").glob("*.json"))]
    with replacing(path) as file:
        file.write(f"{before}{BEGIN}\n\n{section(reports)}\n\n{END}{after}".encode())


def section(reports: list[dict]) -> str:
    """Markdown of all cards, one after the other."""
    return "\n\n".join(map(_card, reports)) or _NOTHING


def _card(report: dict) -> str:
    machine, tests, loaders = report["hardware"], report["tests"], report["loaders"]
    revision = (report["git_revision"] or "unknown")[:8]
    lines = [
        f"### {report['card']}",
        "",
        f"{report['created'][:10]}, revision {revision}; torch {machine['torch']}, DALI {machine['dali']}, driver "
        f"{machine['driver'] or 'unknown'}, {machine['cores']} cores of {machine['cpu']}. Images: {report['data']}. "
        f"{_MEANING[report['format']]}; a dash was not measured.",
        "",
        "| run | step alone | loader alone | training | training / ceiling | MFU | images/J | at a time | limited by |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_throughput(name, run) for name, run in report["throughput"].items()),
    ]
    for name, run in report["inputs"].items():
        lines += ["", *table(f"Training by what feeds it, {name}, {run['batch_size']} images:", run["inputs"])]
    for name, run in report["steps"].items():
        lines += ["", *table(f"The step alone, {name}, {run['batch_size']} images:", run["steps"])]
    for scale, rows in loaders["scales"].items() if loaders else ():
        lines += ["", *table(f"Loaders, {scale}, batches of {loaders['batch_size']}:", rows)]
    if tests:
        others = "; ".join(
            f"{kind.replace('_', ' ')}: {', '.join(f'`{name}` ({why})' for name, why in tests[kind].items())}"
            for kind in ("failed", "skipped", "expected_failures")
            if tests[kind]
        )
        lines += ["", f"tests/gpu: {tests['passed']} passed" + (f"; {others}" if others else "") + "."]
    for title, entries in (("Left out", report["left_out"]), ("Failed", report["failed"])):
        if entries:
            lines += ["", f"{title}: " + "; ".join(f"{name} ({why})" for name, why in entries.items()) + "."]
    return "\n".join(lines)


def _throughput(name: str, run: dict) -> str:
    stages = [run["stages"][stage] or {} for stage in ("step", "loader", "training")]
    rates = [stage.get(RATE, stage.get("median")) for stage in stages]
    figures = (
        *((rate, "{:,.0f}") for rate in rates),
        (run["ceiling"]["training_over_ceiling"], "{:.3f}"),
        (run["mfu"], "{:.1%}"),
        (run["images_per_joule"], "{:.2f}"),
    )
    cells = ["–" if value is None else form.format(value).replace("%", " %") for value, form in figures]
    return f"| {' | '.join([name, *cells, str(run['config']['micro_batch']), run['verdict']['bound']])} |"


if __name__ == "__main__":
    end(main)
