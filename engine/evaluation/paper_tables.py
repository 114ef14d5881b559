"""The paper's Tables 3 to 6: what each row tests and how, the paper's figures, and a printed table with ours beside them.

Scales are the paper's at a crop of 224 pixels; for another crop they are the paper's · crop / 224, rounded down.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from engine.config import middle

Scale = tuple[int, int]
"""Lowest and highest training scale S in pixels; the same number twice for a fixed one."""
Trained = tuple[str, Scale]
"""Architecture and training scale of a network."""
Errors = tuple[float, float]
"""Top-1 and top-5 error in %."""

PAPER_CROP = 224
_S256, _S384, _JITTERED = (256, 256), (384, 384), (256, 512)
_SCALE_STEP = 32  # between a network's test scales, where its training scale is fixed (section 4.2)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of a table, or a part of one: a figure of the paper."""

    networks: tuple[Trained, ...]
    """Whose posteriors are averaged."""
    protocol: str
    """As evaluate.py's --protocol."""
    several_scales: bool
    """Whether posteriors are averaged over test scales, or there is only one."""
    paper: Errors


def _fixed(table: Mapping[Trained, Errors], *, several_scales: bool) -> tuple[Row, ...]:
    return tuple(
        Row(networks=(trained,), protocol="dense", several_scales=several_scales, paper=errors)
        for trained, errors in table.items()
    )


def _by_protocol(networks: tuple[Trained, ...], dense: Errors, multicrop: Errors, both: Errors) -> tuple[Row, ...]:
    figures = {"dense": dense, "multicrop": multicrop, "multicrop+dense": both}
    return tuple(
        Row(networks=networks, protocol=protocol, several_scales=True, paper=errors)
        for protocol, errors in figures.items()
    )


TABLES: dict[int, tuple[Row, ...]] = {
    # Section 4.1: a single test scale.
    3: _fixed(
        {
            ("A", _S256): (29.6, 10.4),
            ("A-LRN", _S256): (29.7, 10.5),
            ("B", _S256): (28.7, 9.9),
            ("C", _S256): (28.1, 9.4),
            ("C", _S384): (28.1, 9.3),
            ("C", _JITTERED): (27.3, 8.8),
            ("D", _S256): (27.0, 8.8),
            ("D", _S384): (26.8, 8.7),
            ("D", _JITTERED): (25.6, 8.1),
            ("E", _S256): (27.3, 9.0),
            ("E", _S384): (26.9, 8.7),
            ("E", _JITTERED): (25.5, 8.0),
        },
        several_scales=False,
    ),
    # Section 4.2: several test scales.
    4: _fixed(
        {
            ("B", _S256): (28.2, 9.6),
            ("C", _S256): (27.7, 9.2),
            ("C", _S384): (27.8, 9.2),
            ("C", _JITTERED): (26.3, 8.2),
            ("D", _S256): (26.6, 8.6),
            ("D", _S384): (26.5, 8.6),
            ("D", _JITTERED): (24.8, 7.5),
            ("E", _S256): (26.9, 8.7),
            ("E", _S384): (26.7, 8.6),
            ("E", _JITTERED): (24.8, 7.5),
        },
        several_scales=True,
    ),
    # Section 4.3: dense evaluation against 50 crops a scale.
    5: (
        *_by_protocol((("D", _JITTERED),), (24.8, 7.5), (24.6, 7.5), (24.4, 7.2)),
        *_by_protocol((("E", _JITTERED),), (24.8, 7.5), (24.6, 7.4), (24.4, 7.1)),
    ),
    # Section 4.4: two networks fused.
    6: _by_protocol((("D", _JITTERED), ("E", _JITTERED)), (24.0, 7.1), (23.9, 7.2), (23.7, 6.8)),
}

_TITLES = {
    3: "Table 3. A single test scale, dense evaluation.",
    4: "Table 4. Several test scales, dense evaluation.",
    5: "Table 5. Dense and multi-crop evaluation.",
    6: "Table 6. Two networks fused.",
}
_PROTOCOL_NAMES = {"dense": "dense", "multicrop": "multi-crop", "multicrop+dense": "multi-crop & dense"}
_NOT_GIVEN = "–"


def at_crop(scale: int, crop: int) -> int:
    """A scale of the paper for networks of another crop."""
    return scale * crop // PAPER_CROP


def train_scale(scale: Scale, crop: int) -> Scale:
    """A training scale of the paper for networks of another crop."""
    return at_crop(scale[0], crop), at_crop(scale[1], crop)


def scales_to_test(scale: Scale, crop: int, *, several: bool) -> tuple[int, ...]:
    """Q of a network trained at this scale: a single one, or S − 32, S, S + 32, or the ends and middle of its range (4.2)."""
    lowest, highest = scale
    if not several:
        return (middle(scale),)
    if lowest < highest:
        return lowest, middle(scale), highest
    step = at_crop(_SCALE_STEP, crop)
    return lowest - step, lowest, lowest + step


def rows_with(number: int, given: Iterable[Trained], crop: int) -> list[Row]:
    """The rows of a table all of whose networks are among those given, whose scales are those of this crop."""
    there = set(given)
    return [
        row for row in TABLES[number] if all((arch, train_scale(scale, crop)) in there for arch, scale in row.networks)
    ]


def needed(number: int, crop: int) -> str:
    """The networks of a table, in words."""
    trained = dict.fromkeys(network for row in TABLES[number] for network in row.networks)
    return ", ".join(f"{arch} at {_scale_text(train_scale(scale, crop))}" for arch, scale in trained)


def formatted(number: int, ours: Mapping[Row, Errors], crop: int) -> str:
    """The table in the paper's layout, our errors beside the paper's; "–" for rows that are not in `ours`."""
    lines = [
        _TITLES[number] + ("" if crop == PAPER_CROP else f" Scales are the paper's · {crop}/{PAPER_CROP}."),
        f"{'':44}{'top-1 error, %':>16}{'top-5 error, %':>18}",
        f"{'network':13}{'train, S':13}{'test, Q':18}{'ours':>7}{'paper':>9}{'ours':>9}{'paper':>9}",
    ]
    before = None
    for row in TABLES[number]:
        if row.networks != before:
            lines += _network_lines(row, crop)
            before = row.networks
        top1, top5 = (f"{error:.1f}" for error in ours[row]) if row in ours else (_NOT_GIVEN, _NOT_GIVEN)
        figures = f"{top1:>7}{row.paper[0]:>9.1f}{top5:>9}{row.paper[1]:>9.1f}"
        if number in (5, 6):
            lines.append(f"  {_PROTOCOL_NAMES[row.protocol]:42}{figures}")
        else:
            lines[-1] = f"{lines[-1]:44}{figures}"
    return "\n".join(lines)


def _network_lines(row: Row, crop: int) -> list[str]:
    lines = []
    for arch, scale in row.networks:
        trained = train_scale(scale, crop)
        scales = scales_to_test(trained, crop, several=row.several_scales)
        lines.append(f"{arch:13}{_scale_text(trained):13}{','.join(map(str, scales))}")
    return lines


def _scale_text(scale: Scale) -> str:
    lowest, highest = scale
    return str(lowest) if lowest == highest else f"[{lowest};{highest}]"
