"""The number format of the training step."""

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from common.ranks import Ranks, gather

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Precision:
    """A resolved --precision on a device."""

    name: str
    """bf16, fp16 or fp32."""
    device_type: str

    @property
    def half_images(self) -> bool:
        """Whether the loader's images are float16: on a GPU whose network does not compute in float32 anyway."""
        return self.device_type == "cuda" and self.name != "fp32"

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device_type, dtype=_DTYPES[self.name], enabled=self.name != "fp32")

    def grad_scaler(self) -> torch.amp.GradScaler:
        """Scales the loss for fp16, whose gradients would vanish; does nothing for the others."""
        return torch.amp.GradScaler(self.device_type, enabled=self.name == "fp16")


def choose_precision(name: str, ranks: Ranks) -> Precision:
    """Resolve --precision; every rank must call this. "auto": what is fast on the GPUs of all ranks, so that none of them scales
    its gradients while others do not.
    """
    if name == "auto":
        found = gather(fast_format(ranks.device), ranks)
        name = next((each for each in found if each != "bf16"), "bf16")
    return Precision(name, ranks.device.type)


def fast_format(device: torch.device) -> str:
    """bf16 on a GPU that has it, fp16 on one that has not, fp32 on a CPU, where both are slow."""
    if device.type == "cpu":
        return "fp32"
    # including_emulation=False: GPUs before Ampere take bf16 and compute it many times slower.
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def set_numerics(*, deterministic: bool) -> None:
    """TF32 for what stays float32, the fastest convolution kernels; or, asked for, deterministic kernels only."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = not deterministic  # shapes never change, so the search for kernels pays once
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
