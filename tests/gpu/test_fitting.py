"""A GPU's memory that does not suffice for the whole batch: torch refuses what exceeds a limit, as if the GPU ended there."""

from dataclasses import replace

import pytest
import torch

from common.ranks import Ranks
from engine.config import parse_args
from engine.data import open_training_data
from engine.precision import Precision
from engine.training.assembly import network_of
from engine.training.fitting import halve_until_it_fits
from perf.costs import Job
from perf.dry_run import saved_bytes
from tests.gpu.device import DEVICE

pytestmark = pytest.mark.gpu
_HEADROOM_BYTES = 600 << 20  # for the kernels


def test_passes_are_halved_until_they_fit_and_the_memory_is_given_back():
    """D in bf16, with memory for 32 images of 64 at a time."""
    ranks = Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1, device=DEVICE, patient_group=None)
    config = parse_args(["--arch", "D", "--data", "synthetic", "--batch-size", "64", "--parallel", "data"])
    data = open_training_data(config, ranks, Precision("bf16", DEVICE.type))
    model = network_of(config, classes=len(data.classes), device=DEVICE)
    weights = 4 * sum(weight.numel() for weight in model.parameters())
    held = torch.cuda.memory_reserved(DEVICE) - weights  # by other tests
    limit = held + 3 * weights + saved_bytes(replace(Job.of(data), micro_batch=32)) + _HEADROOM_BYTES
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info(DEVICE)[1], DEVICE)
    try:
        fitted = halve_until_it_fits(data, model)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)
    assert fitted.micro_batch in (32, 16)
    assert fitted.config.micro_batch == fitted.micro_batch
    assert torch.cuda.memory_reserved(DEVICE) < held + 1.2 * weights
    assert all(parameter.grad is None for parameter in model.parameters())
