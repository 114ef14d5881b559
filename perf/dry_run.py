"""train.py --dry-run: what would be run, in lines for people and as results, without a step of it."""

from dataclasses import replace

import torch
from torch import Tensor

from common.progress import clock, printable, say
from engine.checkpoint import Checkpoint
from engine.config import Config
from engine.data import TrainingData
from engine.training import schedule
from engine.training.assembly import ranks_that_share
from engine.training.shared_layers import number_dropout
from engine.training.trainer import samples_of_other_data
from model.vgg import VGG
from perf.costs import Job
from perf.hybrid import least_step_seconds
from perf.peaks import peaks_of

_FLOAT32_BYTES = 4


def dry_run(config: Config, data: TrainingData, job: Job, checkpoint: Checkpoint | None) -> dict:
    """Tell, on rank 0, and return it as plain values; every rank must call this. job: the run's.

    Time is the least that the device's rates allow, for the steps alone; None for a device that is not in the table, and with
    --freeze. Memory is that of torch's tensors on one rank: what weights, gradients, momentum and average take, and the
    activations of a pass as the eager network keeps them.
    """
    ranks = data.ranks
    sharing = ranks_that_share(config, ranks)
    parameters, own_parameters = (_parameters(job, count) for count in (1, sharing))
    frozen = frozen_parameters(job, config.frozen_blocks)  # of convolutions, which no ranks share
    has_momentum, has_average = config.momentum > 0, config.ema > 0
    memory = {
        "weights": own_parameters * _FLOAT32_BYTES,
        "gradients": (own_parameters - frozen) * _FLOAT32_BYTES,
        "momentum": (own_parameters - frozen) * has_momentum * _FLOAT32_BYTES,
        "average": own_parameters * has_average * _FLOAT32_BYTES,
        "activations": saved_bytes(job, config.frozen_blocks),
    }
    done, seen = (checkpoint.steps, checkpoint.samples_seen) if checkpoint else (0, 0)
    if checkpoint and checkpoint.fingerprint != data.fingerprint:
        seen = samples_of_other_data(checkpoint, data.train_images)
    steps = schedule.total_steps(config, data.train_images, steps_done=done, samples_seen=seen)
    name = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "CPU"
    peaks = peaks_of(name, job.precision)
    # The costs are those of training all layers.
    step_seconds = least_step_seconds(job, peaks, ranks, sharing) if peaks and not frozen else None
    results = {
        "dry_run": True,
        "arch": config.arch,
        "parameters": parameters,
        "frozen_parameters": frozen,
        "data": config.data,
        "classes": len(data.classes),
        "train_images": data.train_images,
        "validation_images": data.val_images,
        "device": name,
        "precision": job.precision,
        "batch_size": config.batch_size,
        "world_size": ranks.world_size,
        "passes": job.passes,
        "micro_batch": data.micro_batch,
        "sharing": sharing,
        "steps_done": done,
        "steps": steps,
        "floor_step_seconds": step_seconds,
        "floor_seconds": step_seconds and max(0, steps - done) * step_seconds,
        "memory_bytes": {**memory, "total": sum(memory.values())},
        "checkpoint_bytes": _FLOAT32_BYTES * (parameters * (1 + has_average) + (parameters - frozen) * has_momentum),
        "out": str(config.out),
        "stopped": False,
    }
    if ranks.is_main:
        for line in _lines(config, results):
            say(line)
    return results


def _parameters(job: Job, sharing: int) -> int:
    """Of one rank, when so many share FC6 and FC7."""
    return sum(sum(layer.parameters) for layer in replace(job, sharing=sharing).layers())


def frozen_parameters(job: Job, frozen_blocks: int) -> int:
    """Elements of the weights and biases of so many blocks of convolutions."""
    return sum(weight.numel() for weight in _on_meta(job, frozen_blocks).parameters() if not weight.requires_grad)


def _on_meta(job: Job, frozen_blocks: int) -> VGG:
    with torch.device("meta"):
        model = VGG(job.arch, classes=job.classes, crop=job.crop, batch_norm=job.batch_norm, fuse=job.fuse)
    model.freeze(frozen_blocks)
    return model


def saved_bytes(job: Job, frozen_blocks: int = 0) -> int:
    """Bytes that autograd keeps of one forward pass for the backward pass, weights apart: activations, indices, masks, and the
    weights' copies in half precision.

    They are counted while the eager network runs on the meta device. What torch.compile keeps is not known before it compiles.
    """
    model = _on_meta(job, frozen_blocks)
    images = torch.empty(job.batch // job.passes, 3, job.crop, job.crop, device="meta")
    is_half = job.precision != "fp32"
    if is_half:  # there is no autocast on the meta device
        model, images = model.to(torch.bfloat16), images.to(torch.bfloat16)
    number_dropout(model.modules(), seed=0, device=images.device, shared=None, share=job.batch)
    kept: dict[int, Tensor] = {}  # by storage, each held, so that no other gets its number

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(images.to(memory_format=torch.channels_last))
    if not is_half:
        for parameter in model.parameters():
            kept.pop(parameter.untyped_storage()._cdata, None)
    del logits
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _lines(config: Config, results: dict) -> list[str]:
    network = f"{config.arch} with batch norm" if config.batch_norm else config.arch
    done, steps, memory = results["steps_done"], results["steps"], results["memory_bytes"]
    begins = f"from the checkpoint at step {done:,}" if done else f"from {_beginning(config)}"
    frozen = f" ({results['frozen_parameters'] / 1e6:.1f} M of them frozen)" if results["frozen_parameters"] else ""
    shared = f", FC6 and FC7 shared by {results['sharing']}" if results["sharing"] > 1 else ""
    seconds = results["floor_seconds"]
    time = (
        f"at least {clock(seconds)} for all of them, {1e3 * results['floor_step_seconds']:.2f} ms each at the hardware's rates, "
        "which no step reaches; validation and checkpoints come on top"
        if seconds is not None
        else "unknown: the floor is that of training all layers"
        if frozen
        else f"unknown: the table of cards does not have this device ({results['device']})"
    )
    of_states = ", ".join(f"{name} {_gib(memory[name])}" for name in memory if name != "total" and memory[name])
    minutes = f"{config.checkpoint_minutes:g} minutes" if config.checkpoint_minutes else "step"
    return [
        f"network: {network}, {results['parameters'] / 1e6:.1f} M parameters{frozen}, {begins}",
        f"data: {printable(config.data)}: {results['train_images']:,} training images, {results['validation_images']:,} of "
        f"validation, {results['classes']} classes; crop {config.crop}, {config.crops}",
        f"device: {results['device']}, {results['precision']}",
        f"batch: {config.batch_size} = {results['world_size']} ranks × {results['passes']} passes × {results['micro_batch']} "
        f"images{shared}",
        f"schedule: {_schedule(config)}; {max(0, steps - done):,} steps{' at most' * (config.schedule == 'plateau')}"
        f"{f' of {steps:,}' * (done > 0)}",
        f"time: {time}",
        f"memory: about {_gib(memory['total'])} a rank: {of_states}; the loader's and the kernels' come on top",
        f"checkpoints: {printable(str(config.out))}, after every epoch and every {minutes}, {_gib(results['checkpoint_bytes'])} "
        f"each; the newest {config.keep} and the best one stay",
    ]


def _beginning(config: Config) -> str:
    return printable(config.weights or config.init_from or f"--init {config.init}")


def _schedule(config: Config) -> str:
    rate = f"{config.schedule}, lr {config.lr:g}"
    if config.schedule == "cosine":
        return f"{rate} after {config.warmup_epochs:g} epochs of warm-up, 0 after {config.epochs} epochs"
    when = (
        f"every {config.step_epochs} epochs"
        if config.schedule == "step"
        else f"after {config.plateau_epochs} epochs without a better top-1, three times"
    )
    return f"{rate}, divided by 10 {when}; {config.epochs} epochs"


def _gib(size_bytes: float) -> str:
    return f"{size_bytes / 2**30:.2f} GiB"
