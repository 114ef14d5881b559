"""report.html: one file that needs nothing else, to read on a screen, on a phone or on paper."""

import base64
from collections.abc import Iterable
from html import escape

from common.progress import printable
from perf.report_format import find
from perf.report_words import (
    NOT_MEASURED,
    STAGES,
    ceiling_sentence,
    flags_to_try,
    name_of,
    number,
    part_table,
    percent,
    stage_table,
    subject,
    text_of,
    verdict_evidence,
    verdict_sentence,
    warm_up_sentence,
)

CAPTIONS = {
    "waterfall": "From the images a second that the hardware's peaks allow down to those that training achieves. "
    "The floating bars are what is lost on the way.",
    "timeline": "One median step: where each part starts and how long it takes. Hatched: the least that the hardware's peaks "
    "allow for it. In none of these: what a step of training takes beyond its parts as they were measured without a loader.",
    "telemetry": "Each GPU over the whole measurement; the shaded spans are its stages.",
    "roofline": "Each layer at its FLOPs a byte of memory traffic, on the rate that these allow: left of the bend, memory limits "
    "it, right of it, arithmetic. The larger the mark, the larger its share of the floor.",
}

_STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8882; --mark: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --mark: #56b4e9; } }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 56rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .2rem 0 1rem; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1rem 0 .3rem; }
.subject { color: GrayText; margin: 0; }
.evidence { display: flex; flex-wrap: wrap; gap: .8rem; padding: 0; margin: 0; list-style: none; }
.evidence li { flex: 1 1 12rem; border-left: .3rem solid var(--mark); background: var(--soft); padding: .5rem .8rem; }
.evidence strong { display: block; font-size: 1.5rem; line-height: 1.2; }
code { font-family: ui-monospace, monospace; background: var(--soft); padding: .1rem .3rem; border-radius: .2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { text-align: right; padding: .25rem .7rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead th { border-bottom-width: 2px; vertical-align: bottom; }
.figures td { white-space: nowrap; }
.settings td { text-align: left; overflow-wrap: anywhere; }
figure { margin: 1.5rem 0; break-inside: avoid; }
img { width: 100%; height: auto; background: white; border-radius: .3rem; }
figcaption { color: GrayText; font-size: .9rem; }
@media print {
  body { max-width: none; font-size: 9pt; }
  .wide { overflow: visible; }
  .figures td { white-space: normal; }
  tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  img { width: 75%; }
}
"""


def page(report: dict, pictures: dict[str, bytes | str]) -> str:
    """The whole page. pictures: the PNG of each of CAPTIONS, or the sentence that says why there is none."""
    body = "".join((_headline(report), _stages(report), _pictures(report, pictures), _settings(report)))
    title = escape(f"{verdict_sentence(report)} {subject(report)}")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )


def _headline(report: dict) -> str:
    figures = "".join(
        f"<li><strong>{escape(value)}</strong>{escape(name)}</li>\n" for name, value in verdict_evidence(report)
    )
    flags = "".join(f"<li><code>{escape(flags)}</code> {escape(why)}</li>\n" for flags, why in flags_to_try(report))
    return (
        f'<header>\n<p class="subject">{escape(subject(report))}</p>\n<h1>{escape(verdict_sentence(report))}</h1>\n'
        + (f'<ul class="evidence">\n{figures}</ul>\n' if figures else "")
        + (f"<h2>To try next</h2>\n<ol>\n{flags}</ol>\n" if flags else "")
        + "</header>\n"
    )


def _stages(report: dict) -> str:
    return (
        "<h2>Stages</h2>\n"
        + _table(*stage_table(report))
        + _paragraph(ceiling_sentence(report))
        + _paragraph(warm_up_sentence(report))
        + "<h2>Parts of a step</h2>\n"
        + _table(*part_table(report))
    )


def _pictures(report: dict, pictures: dict[str, bytes | str]) -> str:
    tables = {"telemetry": _telemetry(report), "roofline": _roofline(report)}
    parts = ["<h2>Pictures</h2>\n"]
    for name, caption in CAPTIONS.items():
        picture = pictures[name]
        if isinstance(picture, str):
            parts.append(_paragraph(picture))
        else:
            data = base64.b64encode(picture).decode()
            parts.append(
                f'<figure>\n<img alt="{escape(name)}" src="data:image/png;base64,{data}">\n'
                f"<figcaption>{escape(caption)}</figcaption>\n</figure>\n"
            )
        parts.append(tables.get(name, ""))
    return "".join(parts)


def _telemetry(report: dict) -> str:
    """For each GPU, over the whole run and each stage: every reading, energy, and how often it was throttled, and why."""
    if not find(report, "telemetry.available"):
        return ""
    remark = find(report, "telemetry.reason")
    parts = [_paragraph(printable(remark))] if remark else []
    stages = find(report, "telemetry.stages") or {}
    for place, device in enumerate(find(report, "telemetry.devices") or []):
        columns = {"whole run": device} | {
            STAGES.get(stage, name_of(stage)).removesuffix(" alone"): devices[place]
            for stage, devices in stages.items()
            if devices and place < len(devices)
        }
        rows = [
            [_reading_name(field), *(_reading(column, field) for column in columns.values())]
            for field in device["fields"] or {}
        ]
        rows.append(["energy, J", *(number(column["energy_joules"]) for column in columns.values())])
        rows.append(["throttled, share of samples", *(_throttled(column) for column in columns.values())])
        parts.append(f"<h3>GPU {escape(text_of(device['index']))}, {escape(text_of(device['name']))}</h3>\n")
        parts.append(_table(["median", *columns], rows, "readings"))
        parts += [_paragraph(printable(f"{name_of(field)}: {why}")) for field, why in (device["missing"] or {}).items()]
    return "".join(parts)


def _reading_name(field: str) -> str:
    if field.endswith("_bytes_per_second"):
        return f"{name_of(field.removesuffix('_bytes_per_second'))}, GB/s"
    return f"{name_of(field.removesuffix('_bytes'))}, GiB" if field.endswith("_bytes") else name_of(field)


def _reading(device: dict, field: str) -> str:
    summary = (device["fields"] or {}).get(field)
    if summary is None or summary["median"] is None:
        return NOT_MEASURED
    scale = 1e-9 if field.endswith("_bytes_per_second") else 1 / 2**30 if field.endswith("_bytes") else 1.0
    return number(scale * summary["median"])


def _throttled(device: dict) -> str:
    fractions = device["throttled_fraction"]
    if fractions is None:
        return NOT_MEASURED
    reasons = [f"{name_of(reason)} {percent(fraction)}" for reason, fraction in fractions.items() if fraction]
    return ", ".join(reasons) or "never"


def _roofline(report: dict) -> str:
    """MFU, joules, and what the model predicts for other numbers of GPUs."""
    mfu, images_per_joule = find(report, "roofline.mfu"), find(report, "roofline.images_per_joule")
    text = _paragraph(f"MFU: {percent(mfu)}. Images per joule: {number(images_per_joule)}.")
    scaling = find(report, "roofline.scaling") or []
    if not scaling:
        return text
    columns = {
        "ranks": "ranks",
        "images_per_second": "images/s",
        "efficiency": "of so many alone",
        "images_per_second_compressed": "images/s, gradients in 16 bits",
        "efficiency_compressed": "of so many alone",
    }
    columns = {key: title for key, title in columns.items() if key in scaling[0]}
    rows = [
        [percent(row.get(key)) if key.startswith("efficiency") else number(row.get(key)) for key in columns]
        for row in scaling
    ]
    return text + "<h2>Predicted for other numbers of ranks</h2>\n" + _table(columns.values(), rows)


def _settings(report: dict) -> str:
    origin = {"created": report["created"], "git revision": report["git_revision"]}
    return "".join(
        f"<h2>{title}</h2>\n"
        + _table(["", ""], [[name_of(key), text_of(value)] for key, value in entries.items()], "settings")
        for title, entries in (
            ("Configuration", report["config"] or {}),
            ("Hardware", report["hardware"] or {}),
            ("Origin", origin),
        )
    )


def _table(header: Iterable[str], rows: Iterable[Iterable[str]], style: str = "figures") -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    table = f'<table class="{style}">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>'
    return f'<div class="wide">{table}</div>\n'


def _paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>\n"
