#!/usr/bin/env python3
"""Features of a data set (appendix B): python features.py --checkpoint D.pt --data DIR --scales 256,384,512 --output F --svm"""

if __name__ == "__main__":  # before the other imports: Ctrl-C ends them in a line, too
    from common.start import begin

    begin()

import json

from common.errors import UserError
from common.memory import share_one_heap
from common.parent_death import end_with_torchrun
from common.process import end, is_first_rank, run_program
from engine.evaluation.flags import FeatureFlags, parse_features


def write(flags: FeatureFlags) -> dict:
    """Write the features of train and val. Returns the results, on every rank. Raises UserError, TrainingError."""
    # Here, not above: --help and mistyped flags answer without waiting for torch.
    import numpy as np

    from common.files import replacing
    from common.progress import printable, say
    from common.ranks import on_rank_0, ranks_of_this_run
    from engine.data import open_data
    from engine.evaluation.features import WIDTH, svm_accuracy, write_features
    from engine.networks import load_network
    from engine.precision import choose_precision, set_numerics
    from pipeline.dataset.scan import SPLITS

    with ranks_of_this_run(flags.device) as ranks:
        set_numerics(deterministic=False)
        network = load_network(flags.checkpoint)
        if ranks.is_main and network.entry:
            say(f"the weights are those of {network.origin}")
        scales = flags.chosen_scales() or (network.test_scale,)
        if min(scales) < network.crop:
            raise UserError(f"--scales {min(scales)}: the network takes images of {network.crop} pixels at least")
        precision = choose_precision(flags.precision, ranks)
        data = open_data(flags.data, ranks, precision, flags.loading, max_bad_images=flags.max_bad_images)
        assert data.manifest
        tables = {split: getattr(data.manifest, split) for split in SPLITS}
        labels = {split: table.read(np.arange(len(table))).labels for split, table in tables.items()}
        for split in SPLITS:
            write_features(
                network,
                data,
                split,
                scales,
                flags.output / f"{split}.npy",
                flip=flags.flip != "off",
                batch_size=flags.batch_size,
            )

        def finish() -> dict:
            for split in SPLITS:
                with replacing(flags.output / f"{split}-labels.npy") as file:
                    np.save(file, labels[split])
            with replacing(flags.output / "classes.txt") as file:
                names = (printable(name) if "\n" in name else name for name in data.classes)  # a line each
                file.write("".join(f"{name}\n" for name in names).encode(errors="surrogateescape"))
            results = {
                "checkpoint": flags.checkpoint,
                "scales": list(scales),
                "flip": flags.flip != "off",
                "images": {split: len(table) for split, table in tables.items()},
                "width": WIDTH,
                "output": str(flags.output),
            }
            if flags.svm:
                train, val = ((np.load(flags.output / f"{split}.npy"), labels[split]) for split in SPLITS)
                accuracy, mean_class_accuracy = svm_accuracy(train, val, flags.svm_c)
                results |= {"svm_c": flags.svm_c, "accuracy": accuracy, "mean_class_accuracy": mean_class_accuracy}
            return results

        return on_rank_0(ranks, finish)


def main(argv: list[str] | None = None) -> int:
    """Parse, write, print the results. Returns the exit code: 0, 1 (the run failed), 2 (something given is wrong), 130."""
    end_with_torchrun()
    share_one_heap()

    def work() -> int:
        results = write(parse_features(argv))
        if is_first_rank():
            if "accuracy" in results:
                print(f"accuracy {results['accuracy']:.2%}, mean class accuracy {results['mean_class_accuracy']:.2%}")
            print(json.dumps(results), flush=True)
        return 0

    return run_program(work)


if __name__ == "__main__":
    end(main)
