"""The section on GPUs in docs/performance.md, made from docs/gpu/*.json."""

import json
from pathlib import Path

from common.errors import UserError
from common.files import replacing

BEGIN, END = "<!-- gpu-report: made by make gpu-report -->", "<!-- end of gpu-report -->"
_NOTHING = "Nothing yet: `make gpu-report` on a machine with a GPU writes this section."
_OURS = "this project"


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
    machine, tests = report["hardware"], report["tests"]
    revision = (report["git_revision"] or "unknown")[:8]
    lines = [
        f"### {report['card']}",
        "",
        f"{report['created'][:10]}, revision {revision}; torch {machine['torch']}, DALI {machine['dali']}, driver "
        f"{machine['driver'] or 'unknown'}, {machine['cores']} cores of {machine['cpu']}. Images: {report['data']}. "
        "Images per second are medians; a dash was not measured.",
        "",
        "| run | step alone | loader alone | training | training / ceiling | MFU | images/J | at a time | limited by |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_throughput(name, run) for name, run in report["throughput"].items()),
    ]
    for name, run in report["inputs"].items():
        lines += ["", f"Training by what feeds it, {name}, {run['batch_size']} images:", "", *_inputs(run["inputs"])]
    for name, run in report["steps"].items():
        lines += ["", f"The step alone, {name}, {run['batch_size']} images:", "", *_turns(run["steps"])]
    if report["loaders"]:
        for scale, loaders in report["loaders"]["scales"].items():
            lines += ["", f"Loaders, {scale}, batches of {report['loaders']['batch_size']}:", "", *_turns(loaders)]
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
    rates = [_rate(run["stages"][stage]) for stage in ("step", "loader", "training")]
    ratio, config = run["ceiling"]["training_over_ceiling"], run["config"]
    mfu, joules = run["mfu"], run["images_per_joule"]
    cells = [
        name,
        *rates,
        "–" if ratio is None else f"{ratio:.3f}",
        "–" if mfu is None else f"{100 * mfu:.1f} %",
        "–" if joules is None else f"{joules:.2f}",
        f"{config['micro_batch']}",
        run["verdict"]["bound"],
    ]
    return f"| {' | '.join(cells)} |"


def _rate(images_per_second: dict | None) -> str:
    return f"{images_per_second['median']:,.0f}" if images_per_second else "–"


def _inputs(rows: dict) -> list[str]:
    """Median (lowest–highest) over rounds, and the share of noise's in the same round."""
    lines = ["| | images/s | of noise's |", "|---|---|---|"]
    for name, row in rows.items():
        rate = "{:,.0f} ({:,.0f}–{:,.0f})".format(*row["images_per_second"])
        share = "{:.3f} ({:.3f}–{:.3f})".format(*row["of noise"])
        lines.append(f"| {name} | {rate} | {share} |")
    return lines


def _turns(rows: dict) -> list[str]:
    """Median (lowest–highest) over rounds, and how many times as fast ours is."""
    lines = [f"| | images/s | {_OURS} is … times |", "|---|---|---|"]
    for name, row in rows.items():
        median, lowest, highest = row["images_per_second"]
        times = "" if name == _OURS else "{:.2f} ({:.2f}–{:.2f})".format(*row[f"times {_OURS}"])
        lines.append(f"| {name} | {median:,.0f} ({lowest:,.0f}–{highest:,.0f}) | {times} |")
    return lines
