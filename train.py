#!/usr/bin/env python3
"""Train a VGG: python train.py --arch A --data digits, or torchrun --nproc_per_node=8 train.py --arch D --data DIR."""

if __name__ == "__main__":  # before the other imports: Ctrl-C ends them in a line, too
    from common.start import begin

    begin()

import json
from dataclasses import replace

from common.errors import EXIT_STOPPED
from common.memory import share_one_heap
from common.parent_death import end_with_torchrun
from common.process import end, is_first_rank, run_program
from engine.config import Config, parse_args
from engine.training.preemption import StopRequests


def train(config: Config, requests: StopRequests) -> dict:
    """Run a configuration to its end. Returns the results, on every rank. Raises UserError, TrainingError.

    requests: entered.
    """
    # Imports here, not above: --help and mistyped flags answer without waiting for torch.
    if config.inspect:
        from engine.monitoring.inspection import inspect

        return inspect(config)
    from common.lock import FolderLock
    from common.progress import say
    from common.ranks import on_rank_0, ranks_of_this_run
    from engine.data import open_training_data
    from engine.monitoring.memory_profile import record_memory
    from engine.networks import initial_network, start_from
    from engine.precision import choose_precision, set_numerics
    from engine.training.assembly import network_of
    from engine.training.fitting import halve_until_it_fits
    from engine.training.resume import check_same_data, claim_out, open_checkpoint, with_micro_batch_of
    from engine.training.trainer import Trainer
    from perf.costs import Job, peak_seconds_an_image
    from perf.dry_run import dry_run
    from perf.hybrid import choose_parallel

    limits = {"collective_minutes": config.collective_minutes, "lost_seconds": config.lost_seconds}
    with ranks_of_this_run(config.device, **limits) as ranks, FolderLock(config.out) as lock:
        set_numerics(deterministic=config.deterministic)
        precision = choose_precision(config.precision, ranks)
        if config.profile_memory:
            record_memory(ranks)
        checkpoint = open_checkpoint(config, ranks, None if config.dry_run else lock)
        may_halve = config.micro_batch is None  # given, it is never changed
        if checkpoint:
            config = with_micro_batch_of(checkpoint, config, ranks)
        initial = None if checkpoint else initial_network(config)
        data = open_training_data(config, ranks, precision, checkpoint=checkpoint, initial=initial)
        if checkpoint:
            check_same_data(checkpoint, data, config)
        job = Job.of(data)
        config = choose_parallel(config, ranks, job)
        model = network_of(config, classes=len(data.classes), device=ranks.device)
        if initial:
            done = start_from(initial, model, config, data.classes)
            if ranks.is_main:
                say(done)
        if config.dry_run:
            return dry_run(config, data, job, checkpoint)
        if may_halve:
            data = halve_until_it_fits(data, model)
            config = replace(config, micro_batch=data.config.micro_batch)
        on_rank_0(ranks, lambda: claim_out(config, checkpoint, lock))
        trainer = Trainer(
            config,
            ranks=ranks,
            precision=precision,
            data=data,
            model=model,
            checkpoint=checkpoint,
            requests=requests,
            # The costs are those of training all layers.
            peak_seconds_an_image=None if config.frozen_blocks else peak_seconds_an_image(job, ranks.device),
        )
        return trainer.fit()


def main(argv: list[str] | None = None) -> int:
    """Parse, train, print the results.

    Returns the exit code: 0, 1 (the run failed), 2 (something given is wrong), 75 (stopped by a signal, its state saved, or
    nothing new yet: start the same command again), 130 (Ctrl-C).
    """
    end_with_torchrun()
    share_one_heap()
    config: Config | None = None

    def work() -> int:
        nonlocal config
        with StopRequests() as requests:  # from here on: what follows takes its time before there is anything to save
            config = parse_args(argv)
            results = train(config, requests)
        if is_first_rank():
            print(json.dumps(results), flush=True)
        return EXIT_STOPPED if results["stopped"] else 0

    def interrupted() -> str:
        if config is None or config.inspect or config.dry_run or not any(config.out.glob("*.pt")):
            return "interrupted; nothing was saved yet"
        again = (
            "start the same command again" if config.resume == "auto" else "start the same command with --resume auto"
        )
        return f"interrupted; {again} to go on from the last checkpoint"

    return run_program(work, interrupted=interrupted)


if __name__ == "__main__":
    end(main)
