"""What evaluate.py is asked for, as trials, and what came out, as text for people and plain values for programs."""

from collections.abc import Sequence

from common.errors import UserError
from common.progress import say
from engine.evaluation import paper_tables
from engine.evaluation.flags import EvaluateFlags
from engine.evaluation.posteriors import Hits
from engine.evaluation.trials import Evaluator, Trial
from engine.networks import Network


def fused(flags: EvaluateFlags, networks: Sequence[Network], evaluator: Evaluator) -> dict:
    """Test the networks by the flags' protocol and average their posteriors. Raises UserError, TrainingError."""
    trials = [
        Trial(
            network=network,
            protocol=flags.protocol,
            scales=flags.chosen_scales() or (network.test_scale,),
            flip=flags.flip,
        )
        for network in networks
    ]
    for trial in trials:
        evaluator.check(trial)
    hits = evaluator.hits(trials)
    lines = [f"{trial.network.name}: {trial.protocol}, Q = {_comma(trial.scales)}" for trial in trials]
    top1, top5 = hits.errors
    lines.append(f"top-1 error {top1:.2f} %, top-5 error {top5:.2f} % of {hits.images:,} images{_lost(hits)}")
    return {
        "text": "\n".join(lines),
        "checkpoints": [network.name for network in networks],
        "protocol": flags.protocol,
        "scales": [list(trial.scales) for trial in trials],
        "flip": flags.flip,
        **_figures(hits),
    }


def table(number: int, networks: Sequence[Network], evaluator: Evaluator) -> dict:
    """Test what a table of the paper needs, as far as the networks belong to it. Raises UserError, TrainingError."""
    crops = {network.crop for network in networks}
    if len(crops) > 1:
        raise UserError(
            f"--table {number}: the checkpoints take crops of {_comma(sorted(crops))} pixels; give one kind"
        )
    crop = crops.pop()
    by_training: dict[paper_tables.Trained, Network] = {}
    for network in networks:
        if network.train_scale is None:
            continue
        other = by_training.setdefault((network.arch, network.train_scale), network)
        if other is not network:
            raise UserError(
                f"--table {number}: {other.name} and {network.name} belong to the same row; give one of them"
            )
    rows = paper_tables.rows_with(number, by_training, crop)
    if not rows:
        raise UserError(f"--table {number}: no row can be filled; it needs {paper_tables.needed(number, crop)}")
    trials = {row: _trials(row, by_training, crop) for row in rows}
    used = [trial.network for in_row in trials.values() for trial in in_row]
    for in_row in trials.values():
        for trial in in_row:
            evaluator.check(trial)
    for network in networks:
        if evaluator.is_main and network not in used:
            say(f"{network.name}: belongs to no row of Table {number}")
    hits = {row: evaluator.hits(in_row) for row, in_row in trials.items()}
    ours = {row: counted.errors for row, counted in hits.items()}
    lost = _lost(next(iter(hits.values())))
    return {
        "text": paper_tables.formatted(number, ours, crop) + (f"\n{lost.strip()}" if lost else ""),
        "table": number,
        "rows": [
            {
                "checkpoints": [trial.network.name for trial in trials[row]],
                "protocol": row.protocol,
                "scales": [list(trial.scales) for trial in trials[row]],
                **_figures(counted),
                "paper_top1_error": row.paper[0],
                "paper_top5_error": row.paper[1],
            }
            for row, counted in hits.items()
        ],
    }


def _trials(row: paper_tables.Row, by_training: dict[paper_tables.Trained, Network], crop: int) -> list[Trial]:
    trials = []
    for arch, scale in row.networks:
        trained = paper_tables.train_scale(scale, crop)
        scales = paper_tables.scales_to_test(trained, crop, several=row.several_scales)
        trials.append(Trial(network=by_training[arch, trained], protocol=row.protocol, scales=scales))
    return trials


def _figures(hits: Hits) -> dict:
    top1, top5 = hits.errors
    return {
        "top1": hits.top1 / hits.images,
        "top5": hits.top5 / hits.images,
        "top1_error": round(top1, 4),
        "top5_error": round(top5, 4),
        "images": hits.images,
        "lost": hits.lost,
    }


def _lost(hits: Hits) -> str:
    return f" ({hits.lost:,} of them cannot be decoded and count as wrong)" if hits.lost else ""


def _comma(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
