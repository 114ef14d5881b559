"""The flags of train.py to try next, by what limits a run. Each changes something, given the configuration of the report."""

from perf.report import Advice, Report

SHARED_CORES = "cores shared by both"


def on_gpu(report: Report) -> bool:
    return report.hardware.device == "cuda"


def for_input(report: Report, part: str) -> list[Advice]:
    """part: reading or decoding, the slower one of the loader."""
    config, cores, gpu = report.config, report.hardware.cores, on_gpu(report)
    shards, threads, readers = config["images_in"] == "shards", config["threads"], config["read_threads"]
    of_one_rank = threads < cores + 1 and report.hardware.ranks == 1
    if part == "decoding":
        more = f"--threads {cores + 1}", f"there are {cores} cores, and one thread waits at times"
        on_cpu = config["decoder"] == "cpu"
        flags = _if(gpu and on_cpu, "--decoder gpu", "the GPU decodes JPEGs, some with their own engine")
        flags += _if(not gpu and of_one_rank, *more)
    elif shards:
        flags = [
            _try(f"--read-threads {2 * readers if readers else 64}", "more requests to the storage at a time"),
            _try(f"--read-ahead {2 * config['read_ahead']}", "evens out slow requests"),
            *_if(config["order"] == "global", "--order window", "reads shards from end to end"),
        ]
    else:
        flags = [
            _try(f"--threads {2 * threads}", "more files are read at a time; waiting costs no core"),
            _try(f"--prefetch {2 * config['prefetch']}", "evens out slow files"),
        ]
    return flags + _if(not shards, "--data PREPARED", "what pipeline.prepare makes: smaller images in few large files")


def for_a_shared_gpu(report: Report) -> list[Advice]:
    """Where the GPU's decoder keeps the step from its GPU."""
    cores, files = report.hardware.cores, report.config["images_in"] == "files"
    return [
        _try("--decoder cpu", f"leaves the GPU to the step; this machine has {cores} cores for all of its GPUs"),
        *_if(files, "--data PREPARED", "what pipeline.prepare makes: less to decode"),
    ]


def for_launch(report: Report) -> list[Advice]:
    return [*_larger_passes(report), *_compiled(report), *larger_batches(report, "the same kernels for more images")]


def for_communication(report: Report) -> list[Advice]:
    return [
        *_if(report.config["grad_compression"] == "none", "--grad-compression bf16", "half the bytes"),
        *larger_batches(report, "one all-reduce for more images"),
    ]


def for_memory(report: Report) -> list[Advice]:
    """Where activations are read and written for longer than anything is computed from them."""
    whole = on_gpu(report) and report.config["precision"] == "fp32"
    return [
        *_compiled(report),
        *_if(whole, "--precision bf16", "half the bytes of every activation"),
        *_larger_passes(report),
        *larger_batches(report, "the weights are read once for more images"),
    ]


def for_compute(report: Report) -> list[Advice]:
    config, gpu, precision = report.config, on_gpu(report), report.config["precision"]
    plain = gpu and config["compile"] and config["compile_mode"] == "default"
    fewer = report.ceiling.set_by == SHARED_CORES and config["threads"] > 1
    return [
        *_if(gpu and precision == "fp32", "--precision bf16", "tensor cores compute it many times faster"),
        *_if(not gpu and precision != "fp32", "--precision fp32", "most CPUs compute the others many times slower"),
        *_if(config.get("deterministic"), "--no-deterministic", "the fastest kernels, in whatever order they add up"),
        *_compiled(report),
        *_if(plain, "--compile-mode max-autotune-no-cudagraphs", "tries more kernels for each layer"),
        *_larger_passes(report),
        *_if(fewer, f"--threads {config['threads'] - 1}", "leaves more of the shared cores to the step"),
    ]


def for_kernels(report: Report) -> list[Advice]:
    return for_compute(report) + larger_batches(report, "more work for each kernel, to fill the device")


def larger_batches(report: Report, why: str) -> list[Advice]:
    return [_try(f"--batch-size {2 * report.config['batch_size']}", f"{why}; --lr has to grow with it")]


def _larger_passes(report: Report) -> list[Advice]:
    share, size = report.config["batch_size"] // report.hardware.ranks, report.config["micro_batch"]
    return _if(size < share, f"--micro-batch {min(share, 2 * size)}", "fewer, larger passes")


def _compiled(report: Report) -> list[Advice]:
    return _if(not report.config["compile"], "--compile", "fewer and longer kernels, which read and write less")


def _try(flags: str, why: str) -> Advice:
    return Advice(flags=flags, why=why)


def _if(helps: object, flags: str, why: str) -> list[Advice]:
    return [_try(flags, why)] if helps else []
