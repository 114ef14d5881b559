"""What docs/gpu/<card>.json keeps of each program's results, and the section on GPUs in docs/performance.md that shows them."""

import json
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree

import msgspec

from benchmarks.turns import OURS, RATE, rate_text, ratio_text
from common.errors import UserError
from common.files import replacing
from perf.report import Report

FORMAT = 2
"""1, which is shown too, has the median of laps as a stage's rate, and no intervals."""
BEGIN, END = "<!-- gpu-report: made by make gpu-report -->", "<!-- end of gpu-report -->"
KEPT = {
    "inputs": ("batch_size", "threads", "rounds", "inputs"),
    "steps": ("batch_size", "rounds", "steps"),
    "loaders": ("images", "batch_size", "threads", "rounds", "scales"),
}
"""Of the results of these programs; they say where the images are, too."""
_NOTHING = "Nothing yet: `make gpu-report` on a machine with a GPU writes this section."
_MEANING = {
    1: "Images per second are medians",
    2: "Images per second of the first table are images over time, of the others medians over rounds (lowest–highest)",
}


def of_tests(junit: str) -> dict:
    """Of pytest's --junitxml: how many passed; the others by name, with the reason."""
    counts: dict = {"passed": 0, "failed": {}, "skipped": {}, "expected_failures": {}}
    for case in ElementTree.fromstring(junit).iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        problem = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        if problem is None:
            counts["passed"] += 1
            continue
        kind = "skipped" if problem.tag == "skipped" else "failed"
        if problem.get("type") == "pytest.xfail":
            kind = "expected_failures"
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
    """Replace what stands between the two comments in DOCS/performance.md. Raises UserError: they are not there."""
    path = docs / "performance.md"
    try:
        before, found_begin, rest = path.read_text().partition(BEGIN)
        _, found_end, after = rest.partition(END)
        if not (found_begin and found_end):
            raise UserError(f"{path}: has no lines {BEGIN} and {END} to put the table between; restore them")
        reports = [json.loads(report.read_text()) for report in sorted((docs / "gpu").glob("*.json"))]
        with replacing(path) as file:
            file.write(f"{before}{BEGIN}\n\n{section(reports)}\n\n{END}{after}".encode())
    except OSError as error:
        raise UserError(f"{path}: cannot be rewritten ({error.strerror}); choose another --docs") from error


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
        title = f"Training by what feeds it, {name}, {run['batch_size']} images:"
        lines += _table(title, "of noise's", run["inputs"], "of noise", digits=3)
    for name, run in report["steps"].items():
        lines += _against_ours(f"The step alone, {name}, {run['batch_size']} images:", run["steps"])
    for scale, rows in loaders["scales"].items() if loaders else ():
        lines += _against_ours(f"Loaders, {scale}, batches of {loaders['batch_size']}:", rows)
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


def _against_ours(title: str, rows: Mapping[str, Mapping]) -> list[str]:
    return _table(title, f"{OURS} is … times", rows, f"times {OURS}", left_out=OURS)


def _table(
    title: str, head: str, rows: Mapping[str, Mapping], ratio: str, *, digits: int = 2, left_out: str = ""
) -> list[str]:
    """Lines of rows of turns.summarise(). left_out: the row that is compared with, whose ratio says nothing."""
    lines = ["", title, "", f"| | images/s | {head} |", "|---|---|---|"]
    for name, row in rows.items():
        lines.append(f"| {name} | {rate_text(row)} | {'' if name == left_out else ratio_text(row, ratio, digits)} |")
    return lines
