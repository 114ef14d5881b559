"""report.html: one file that needs nothing else, to read on a screen, on a phone or on paper. Its layout is page.html.j2."""

import base64
from collections.abc import Mapping
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from msgspec.structs import asdict

from common.process import visible
from perf import words
from perf.report import Device, Report, Roofline
from perf.words import (
    STAGES,
    Table,
    duration,
    milliseconds,
    name_of,
    number,
    percent,
    ratio,
    text_of,
    with_prefix,
)


def page(report: Report, pictures: Mapping[str, bytes | str]) -> str:
    """The whole page. pictures: by name, the PNG of each that the layout shows, or the sentence that says why there is none."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Whatever the report holds, a browser and an editor show it, rather than obey it.
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    return environment.get_template("page.html.j2").render(
        report=report,
        words=words,
        pictures=pictures,
        base64=lambda picture: base64.b64encode(picture).decode(),
        spans=_spans,
        layers=layer_table(report.roofline, report.stages.step.step_seconds.mean),
        predictions=prediction_table(report.roofline),
        links=links_sentence(report.roofline),
        costs=cost_table(report),
        origin={**asdict(report.hardware), "created": report.created, "git revision": report.git_revision},
    )


def _spans(report: Report, place: int) -> dict[str, Device]:
    """What was read of one GPU, by its place in report.telemetry.devices: over the whole run, and in each stage."""
    return {"whole run": report.telemetry.devices[place]} | {
        STAGES.get(stage, name_of(stage)).removesuffix(" alone"): devices[place]
        for stage, devices in report.telemetry.stages.items()
        if place < len(devices)
    }


def layer_table(roofline: Roofline, step_seconds: float | None = None) -> Table:
    """Each layer's work, floors and, beside those of a step that was measured, its own time: forward and backward of one step.

    The measured time is with bias, ReLU and dropout, as the unfused floor is.
    """
    table, ridge = [], roofline.peaks.flops_per_second / roofline.peaks.bytes_per_second
    for layer in roofline.layers:
        measured, times = layer.measured_seconds, ratio(layer.measured_seconds, layer.floor_seconds_unfused)
        intensity = ratio(layer.flops, layer.bytes) or 0.0
        row = {
            "layer": text_of(layer.name),
            "kind": text_of(layer.kind),
            "GFLOP": number(layer.flops / 1e9),
            "MB": number(layer.bytes / 1e6),
            "unfused, MB": number(layer.bytes_unfused / 1e6),
            "FLOP/byte": number(intensity),
            "limit": "compute" if intensity > ridge else "memory",
            "floor, ms": milliseconds(layer.floor_seconds),
            "unfused, ms": milliseconds(layer.floor_seconds_unfused),
        }
        if step_seconds:
            row |= {
                "measured, ms": milliseconds(measured),
                "of unfused": "" if times is None else f"× {number(times)}",
                "of the step": "" if measured is None else percent(measured / step_seconds),
            }
        table.append(row)
    return table


def prediction_table(roofline: Roofline) -> Table:
    """% of linear: of so many times one device. Without overlap, the all-reduce follows the backward pass."""
    return [
        {
            "ranks": number(row.ranks),
            "gradients": gradients,
            "images/s": number(scaled.images_per_second),
            "% of linear": percent(scaled.efficiency),
            "all-reduce, ms": milliseconds(scaled.all_reduce_seconds),
            "exposed, ms": milliseconds(scaled.exposed_seconds),
            "images/s without overlap": number(scaled.images_per_second_without_overlap),
            "by": row.algorithm if row.ranks > 1 else "",
        }
        for row in roofline.scaling
        for gradients, scaled in (("float32", row.plain), ("16 bits", row.compressed), ("float32, hybrid", row.hybrid))
        if scaled
    ]


def links_sentence(roofline: Roofline) -> str:
    """Over which links the predictions hold, or why there are none."""
    links = roofline.links
    if links is None or not roofline.scaling:
        return (
            "Nothing is predicted for other numbers of ranks: the links between them are not known. Name them by flags, as "
            "--network-gbits-per-second."
        )
    within = f"{links.gpus_per_node} devices a machine, {with_prefix(links.peer_bytes_per_second, 'B/s')} from each to its peers"
    within += " with in-switch reduction; " if links.in_switch else "; "
    start = "the measured step" if roofline.scaling_from == "measured" else "the hardware's floor"
    return (
        f"Predicted from {start}, each rank with the same batch, over these links: {within if links.gpus_per_node > 1 else ''}"
        f"{with_prefix(links.network_bytes_per_second, 'B/s')} from each machine to the others; "
        f"{number(1e6 * links.latency_seconds)} µs a message ({links.source})."
    )


def cost_table(report: Report) -> Table:
    """Of an epoch and of the training; empty where there is no epoch."""
    costs, table = report.costs, []
    if costs is None:
        return []
    whole = f"the training, {costs.epochs:,} epoch{'s' * (costs.epochs != 1)}"
    for name, value, show in (
        ("time", costs.seconds, duration),
        ("energy of the GPUs, kWh", ratio(costs.joules, 3.6e6), number),
        (f"price, {costs.price_basis}", costs.price, number),
    ):
        if costs.price_basis or not name.startswith("price"):
            table.append(
                {"": name, "an epoch": show(value), whole: show(None if value is None else costs.epochs * value)}
            )
    return table
