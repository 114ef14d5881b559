"""The flags of train.py to try next, by what limits a run. Each changes something, given the configuration of the report."""

from perf.report import Advice, Report

SHARED_CORES = "cores shared by both"


def on_gpu(report: Report) -> bool:
    return report.hardware.device == "cuda"


def for_input(report: Report, part: str) -> list[Advice]:
    """part: reading or decoding, the slower one of the loader."""
    config, cores = report.config, report.hardware.cores
    shards = config["images_in"] == "shards"
    flags = []
    if part == "reading" and shards:
        threads = config["read_threads"]
        flags.append(
            _advice(f"--read-threads {2 * threads if threads else 64}", "more requests to the storage at a time")
        )
        flags.append(_advice(f"--read-ahead {2 * config['read_ahead']}", "evens out slow requests"))
        if config["order"] == "global":
            flags.append(_advice("--order window", "reads shards from end to end"))
    elif part == "reading":
        flags.append(
            _advice(f"--threads {2 * config['threads']}", "more files are read at a time; waiting costs no core")
        )
        flags.append(_advice(f"--prefetch {2 * config['prefetch']}", "evens out slow files"))
    elif on_gpu(report) and config["decoder"] == "cpu":
        flags.append(_advice("--decoder gpu", "the GPU decodes JPEGs, some with an engine of their own"))
    elif config["threads"] < cores + 1 and report.hardware.ranks == 1:
        flags.append(_advice(f"--threads {cores + 1}", f"there are {cores} cores, and one thread waits at times"))
    if not shards:
        flags.append(_advice("--data PREPARED", "what pipeline.prepare makes: smaller images in few large files"))
    return flags


def for_a_shared_gpu(report: Report) -> list[Advice]:
    """Where the GPU's decoder keeps the step from its GPU."""
    cores = report.hardware.cores
    flags = [
        _advice("--decoder cpu", f"leaves the GPU to the step; this machine has {cores} cores for all of its GPUs")
    ]
    if report.config["images_in"] == "files":
        flags.append(_advice("--data PREPARED", "what pipeline.prepare makes: less to decode"))
    return flags


def for_launch(report: Report) -> list[Advice]:
    return [*_larger_passes(report), *_compiled(report), *larger_batches(report, "the same kernels for more images")]


def for_communication(report: Report) -> list[Advice]:
    flags = (
        [_advice("--grad-compression bf16", "half the bytes")] if report.config["grad_compression"] == "none" else []
    )
    return [*flags, *larger_batches(report, "one all-reduce for more images")]


def for_memory(report: Report) -> list[Advice]:
    """Where activations are read and written for longer than anything is computed from them."""
    flags = _compiled(report)
    if on_gpu(report) and report.config["precision"] == "fp32":
        flags.append(_advice("--precision bf16", "half the bytes of every activation"))
    return [*flags, *_larger_passes(report), *larger_batches(report, "the weights are read once for more images")]


def for_compute(report: Report) -> list[Advice]:
    config, flags = report.config, []
    if on_gpu(report) and config["precision"] == "fp32":
        flags.append(_advice("--precision bf16", "tensor cores compute it many times faster"))
    if not on_gpu(report) and config["precision"] != "fp32":
        flags.append(_advice("--precision fp32", "most CPUs compute the others many times slower"))
    if config.get("deterministic"):
        flags.append(
            _advice("--no-deterministic", "the fastest kernels may be chosen, whatever the order they add up in")
        )
    flags += _compiled(report)
    if on_gpu(report) and config["compile"] and config["compile_mode"] == "default":
        flags.append(_advice("--compile-mode max-autotune-no-cudagraphs", "tries more kernels for each layer"))
    flags += _larger_passes(report)
    if report.ceiling.set_by == SHARED_CORES and config["threads"] > 1:
        flags.append(_advice(f"--threads {config['threads'] - 1}", "leaves more of the shared cores to the step"))
    return flags


def for_kernels(report: Report) -> list[Advice]:
    return [
        *for_compute(report),
        *larger_batches(report, "more work for each kernel, to fill the device"),
    ]


def larger_batches(report: Report, why: str) -> list[Advice]:
    return [_advice(f"--batch-size {2 * report.config['batch_size']}", f"{why}; --lr has to grow with it")]


def _larger_passes(report: Report) -> list[Advice]:
    share, micro_batch = report.config["batch_size"] // report.hardware.ranks, report.config["micro_batch"]
    if micro_batch >= share:
        return []
    return [_advice(f"--micro-batch {min(share, 2 * micro_batch)}", "fewer, larger passes")]


def _compiled(report: Report) -> list[Advice]:
    return (
        []
        if report.config["compile"]
        else [_advice("--compile", "fewer and longer kernels, which read and write less")]
    )


def _advice(flags: str, why: str) -> Advice:
    return Advice(flags=flags, why=why)
