"""The flags of train.py to try next, by what limits a run. Each changes something, given the configuration of the report."""

from perf.report import Advice, Report

SHARED_CORES = "cores shared by both"
SHARED_GPU = "a GPU shared by decoder and step"


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
    prepared = ""
    if not shards:
        prepared = "what pipeline.prepare makes: smaller images in few large files"
    elif part == "decoding":
        prepared = "what pipeline.prepare --format raw makes: nothing to decode, and many more bytes to read"
    elif config["decoder"] == "none":
        prepared = "what pipeline.prepare makes without --format raw: far fewer bytes to read"
    return flags + _if(prepared, "--data PREPARED", prepared)


def for_the_step(report: Report, bound: str) -> list[Advice]:
    """bound: that of the verdict, or SHARED_GPU. Nothing where no flag helps, or nobody knows which."""
    config, cores, gpu = report.config, report.hardware.cores, on_gpu(report)
    precision, threads, size = config["precision"], config["threads"], config["micro_batch"]
    share = config["batch_size"] // report.hardware.ranks
    passes = _if(size < share, f"--micro-batch {min(share, 2 * size)}", "fewer, larger passes")
    compiled = _if(not config["compile"], "--compile", "fewer and longer kernels, which read and write less")
    plain = gpu and config["compile"] and config["compile_mode"] == "default"
    fewer = report.ceiling.set_by == SHARED_CORES and threads > 1
    compute = [
        *_if(gpu and precision == "fp32", "--precision bf16", "tensor cores compute it many times faster"),
        *_if(not gpu and precision != "fp32", "--precision fp32", "most CPUs compute the others many times slower"),
        *_if(config.get("deterministic"), "--no-deterministic", "the fastest kernels, in whatever order they add up"),
        *compiled,
        *_if(plain, "--compile-mode max-autotune-no-cudagraphs", "tries more kernels for each layer"),
        *passes,
        *_if(fewer, f"--threads {threads - 1}", "leaves more of the shared cores to the step"),
    ]

    def larger(why: str) -> Advice:
        return _try(f"--batch-size {2 * config['batch_size']}", f"{why}; --lr has to grow with it")

    return {
        SHARED_GPU: [
            _try("--decoder cpu", f"leaves the GPU to the step; this machine has {cores} cores for all of its GPUs"),
            *_if(config["images_in"] == "files", "--data PREPARED", "what pipeline.prepare makes: less to decode"),
        ],
        "launch": [*passes, *compiled, larger("the same kernels for more images")],
        "communication": [
            *_if(config["grad_compression"] == "none", "--grad-compression bf16", "half the bytes"),
            larger("one all-reduce for more images"),
        ],
        "optimizer": [larger("one update for more images")],
        "kernels": [*compute, larger("more work for each kernel, to fill the device")],
        "memory": [
            *compiled,
            *_if(gpu and precision == "fp32", "--precision bf16", "half the bytes of every activation"),
            *passes,
            larger("the weights are read once for more images"),
        ],
        "compute": compute,
    }.get(bound, [])


def _try(flags: str, why: str) -> Advice:
    return Advice(flags=flags, why=why)


def _if(helps: object, flags: str, why: str) -> list[Advice]:
    return [_try(flags, why)] if helps else []
