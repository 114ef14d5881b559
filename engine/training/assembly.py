"""The training step as a configuration asks for it: the network compiled and wrapped, its optimizer and loss scaler."""

import functools
from dataclasses import dataclass

import torch
from torch import nn

from common.errors import TrainingError
from common.progress import say
from common.ranks import Ranks, on_rank_0
from engine.config import Config
from engine.precision import Precision
from engine.training.data_parallel import data_parallel
from engine.training.mixing import Mixing
from engine.training.optimizer import sgd
from engine.training.shared_layers import SharedLayers, number_dropout
from engine.training.step import TrainStep, compile_model
from engine.training.weight_average import WeightAverage
from model.vgg import FC_WIDTH, VGG, build


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """A training step and what it is made of."""

    step: TrainStep
    network: nn.Module
    """What the step calls: the DDP module or, on a single rank, the model itself."""
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: WeightAverage | None
    """The moving average of the weights, where one is asked for; the step keeps it up."""
    compiled: bool
    passes: int
    """Micro-batches that each rank takes in one step."""
    shared: SharedLayers | None
    """The layers that ranks share with --parallel hybrid."""


def assemble(config: Config, *, ranks: Ranks, precision: Precision, micro_batch: int, model: nn.Module) -> Assembly:
    """Compile the model in place, if that is asked for, and put the step together around it; every rank must call this.

    micro_batch: a divisor of the rank's share of the batch, as engine.data finds it. Raises TrainingError as SharedLayers does.
    """
    sharing = ranks_that_share(config, ranks)
    shared = None
    if sharing > 1:
        assert isinstance(model, VGG)
        shared = SharedLayers(model, ranks, sharing=sharing, grad_compression=config.grad_compression)
    share = config.batch_size // ranks.world_size
    dropout = number_dropout(model.modules(), seed=config.seed, device=ranks.device, shared=shared, share=share)
    average = WeightAverage(model, config.ema) if config.ema else None
    compile_as_asked = functools.partial(
        compile_model, choice=config.compile, mode=config.compile_mode, device=ranks.device, is_main=ranks.is_main
    )
    compiled = compile_as_asked(model)
    if average and compiled:
        compile_as_asked(average.model)  # for the validation
    passes = share // micro_batch
    optimizer = sgd(model, config)
    scaler = precision.grad_scaler()
    network = data_parallel(model, ranks, accumulates=passes > 1, grad_compression=config.grad_compression)
    step = TrainStep(
        network,
        optimizer=optimizer,
        scaler=scaler,
        precision=precision,
        passes=passes,
        label_smoothing=config.label_smoothing,
        mixing=Mixing(mixup=config.mixup, cutmix=config.cutmix, seed=config.seed) if config.mixes else None,
        average=average,
        shared=shared,
        dropout=dropout,
    )
    return Assembly(
        step=step,
        network=network,
        optimizer=optimizer,
        scaler=scaler,
        average=average,
        compiled=compiled,
        passes=passes,
        shared=shared,
    )


def ranks_that_share(config: Config, ranks: Ranks) -> int:
    """How many ranks share one set of FC6 and FC7; 1: each has its own. Every rank must call this.

    Those of one machine, where there are several machines of several ranks each; else all. But where 4096 or the ranks do not
    divide by them, nothing is shared.
    """
    if config.parallel != "hybrid":
        return 1
    # Of rank 0's machine: another one may have more ranks, or fewer.
    machine, world_size = on_rank_0(ranks, lambda: ranks.local_world_size), ranks.world_size
    usual = machine if machine > 1 and world_size % machine == 0 else world_size
    sharing = config.fc_ranks or usual
    if world_size % sharing == 0 and FC_WIDTH % sharing == 0:
        return sharing
    if ranks.is_main:
        say(
            f"--parallel hybrid: {FC_WIDTH} units do not divide among {sharing} ranks: each rank has all of FC6 and FC7"
            if world_size % sharing == 0
            else f"--fc-ranks {sharing}: {world_size} ranks are no multiple of it: each rank has all of FC6 and FC7"
        )
    return 1


def network_of(config: Config, *, classes: int, device: torch.device) -> VGG:
    """The network that a configuration asks for, initialised as it says, and with the blocks frozen that it says."""
    model = build(
        config.arch,
        classes=classes,
        crop=config.crop,
        dropout=config.dropout,
        init=config.init,
        device=device,
        seed=config.seed,
        batch_norm=config.batch_norm,
        fuse=config.fuse,
    )
    model.freeze(config.frozen_blocks)
    return model


def too_little_memory(micro_batch: int) -> TrainingError:
    """What to raise for torch.OutOfMemoryError. micro_batch: images in one pass of one rank."""
    if micro_batch == 1:
        return TrainingError(
            "the GPU's memory is too small even for one image at a time; end what else uses it (nvidia-smi shows it), or take "
            "a smaller --crop or another GPU"
        )
    return TrainingError(
        f"the GPU's memory is too small for {micro_batch} images at a time; halve it with "
        f"--micro-batch {micro_batch // 2} (gradients are accumulated)"
    )
