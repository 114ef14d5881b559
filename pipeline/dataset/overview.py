"""What a manifest holds, as a table for people and as plain values for programs."""

from collections import Counter

import numpy as np

from common.progress import say
from pipeline.dataset.headers import FORMATS
from pipeline.dataset.manifest import Manifest, read_scan
from pipeline.dataset.quarantine import read_quarantine
from pipeline.dataset.scan import SPLITS


def results(manifest: Manifest) -> dict:
    """The summary as plain values, fit for JSON."""
    quarantine = read_quarantine(manifest.folder)
    left_out, found_by_runs = quarantine[: manifest.quarantined], quarantine[manifest.quarantined :]
    tables = read_scan(manifest.folder).tables
    return {
        "data": str(manifest.root),
        "manifest": str(manifest.folder),
        "classes": len(manifest.classes),
        "train": len(manifest.train),
        "val": len(manifest.val),
        "quarantined": manifest.quarantined,
        "val_lost": manifest.val_lost,
        "reasons": dict(Counter(reason for _, reason in left_out).most_common()),
        "found_by_runs": len({path for path, _ in found_by_runs}),
        "splits": {split: _figures(tables[split]) for split in SPLITS},
        "verified": "decode" if manifest.verified else None,
        "fingerprint": manifest.fingerprint,
    }


def print_table(summary: dict) -> None:
    """Print results() for people."""
    rows = [("", "images", "shorter side, px", "longer side, px", "GB", "formats")]
    for split, figures in summary["splits"].items():
        formats = ", ".join(f"{name} {count:,}" for name, count in figures["formats"].items())
        shorter, longer = (
            " / ".join(f"{side:,}" for side in figures[f"{which}_side_px"]) for which in ("shorter", "longer")
        )
        rows.append((split, f"{figures['images']:,}", shorter, longer, f"{figures['bytes'] / 1e9:,.3f}", formats))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        aligned = [text.rjust(width) for text, width in zip(row[:-1], widths, strict=False)]
        say("  ".join((*aligned, row[-1])).rstrip())
    say("(sides: smallest / median / largest)")
    for reason, count in summary["reasons"].items():
        say(f"{count:8,} left out: {reason}")
    if summary["found_by_runs"]:
        say(f"{summary['found_by_runs']:8,} found by training runs since; --verify decode leaves them out")
    say(
        "every image has been decoded once"
        if summary["verified"]
        else "headers only; --verify decode decodes every image"
    )


def _figures(table: np.ndarray) -> dict:
    sides = np.sort(np.stack((table["height"], table["width"])), axis=0)
    counts = np.bincount(table["format"], minlength=len(FORMATS)).tolist()
    return {
        "images": len(table),
        "bytes": int(table["bytes"].sum()),
        "formats": {name: count for name, count in zip(FORMATS, counts, strict=True) if count},
        **{
            f"{which}_side_px": [int(side.min()), int(np.median(side)), int(side.max())]
            for which, side in zip(("shorter", "longer"), sides, strict=True)
        },
    }
