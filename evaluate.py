#!/usr/bin/env python3
"""Test networks as the paper does: python evaluate.py --checkpoint runs/A-digits/best.pt --data digits, also under torchrun.

Several checkpoints are fused. --table 3 … 6 prints a table of the paper from the checkpoints that belong to it.
"""

if __name__ == "__main__":  # before the other imports: Ctrl-C ends them in a line, too
    from common.start import begin

    begin()

import json

from common.memory import share_one_heap
from common.parent_death import end_with_torchrun
from common.process import end, is_first_rank, run_program
from common.progress import show
from engine.evaluation.flags import EvaluateFlags, parse_evaluate


def evaluate(flags: EvaluateFlags) -> dict:
    """Run the tests that the flags ask for. Returns the results, on every rank. Raises UserError, TrainingError."""
    # Here, not above: --help and mistyped flags answer without waiting for torch.
    from common.ranks import ranks_of_this_run
    from engine.data import open_data
    from engine.evaluation.report import fused, table
    from engine.evaluation.trials import Evaluator
    from engine.networks import for_data, load_network
    from engine.precision import choose_precision, set_numerics

    with ranks_of_this_run(flags.device) as ranks:
        set_numerics(deterministic=False)
        precision = choose_precision(flags.precision, ranks)
        networks = [load_network(spec) for spec in flags.checkpoint]
        data = open_data(flags.data, ranks, precision, flags.loading, max_bad_images=flags.max_bad_images)
        networks = [for_data(network, data.classes, tell=ranks.is_main) for network in networks]
        evaluator = Evaluator(data, batch_size=flags.batch_size, folder=flags.posteriors)
        results = table(flags.table, networks, evaluator) if flags.table else fused(flags, networks, evaluator)
        return {
            **results,
            "images_per_second": evaluator.images_per_second,
            "world_size": ranks.world_size,
            "device": ranks.device.type,
            "precision": precision.name,
        }


def main(argv: list[str] | None = None) -> int:
    """Parse, test, print the results. Returns the exit code: 0, 1 (the test failed), 2 (something given is wrong), 130."""
    end_with_torchrun()
    share_one_heap()

    def work() -> int:
        results = evaluate(parse_evaluate(argv))
        if is_first_rank():
            show(results.pop("text"))
            print(json.dumps(results), flush=True)
        return 0

    return run_program(work, interrupted="interrupted; posteriors that were complete are kept")


if __name__ == "__main__":
    end(main)
