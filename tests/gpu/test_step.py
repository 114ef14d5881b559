"""The training step in half precision and compiled, against float32 on a CPU and against itself uncompiled."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.ranks import Ranks
from engine.config import Config
from engine.precision import Precision, fast_format, set_numerics
from engine.training.assembly import Assembly, assemble
from model.vgg import FUSIONS, VGG, build
from pipeline.dali.loader import Batch
from tests.gpu.device import DEVICE

pytestmark = pytest.mark.gpu

CPU = torch.device("cpu")
CLASSES, CROP, IMAGES = 10, 64, 16
STEPS = 30
LOGITS_WITHIN = {"fp32": 0.005, "bf16": 0.03, "fp16": 0.005}
"""Norm of the difference over norm: a few units in the last place of TF32, bfloat16, float16."""


@pytest.fixture(scope="module")
def reference() -> VGG:
    """On the CPU, in float32."""
    return build("A", classes=CLASSES, crop=CROP, dropout=0.0, init="kaiming", device=CPU, seed=3)


def on_gpu(reference: VGG, fuse: str = "none") -> VGG:
    model = VGG("A", classes=CLASSES, crop=CROP, dropout=0.0, fuse=fuse)
    model.load_state_dict(reference.state_dict())
    return model.to(device=DEVICE, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch names no such pair


@pytest.fixture(scope="module")
def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(IMAGES, 3, CROP, CROP, generator=generator) * 50
    return images.to(memory_format=torch.channels_last), torch.randint(CLASSES, (IMAGES,), generator=generator)


def as_the_loader_has_it(batch: Batch, precision: Precision) -> Batch:
    images, labels = batch
    return images.to(DEVICE, torch.float16 if precision.half_images else torch.float32), labels.to(DEVICE)


def assembled(model: VGG, precision: Precision, **settings) -> Assembly:
    ranks = Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1, device=DEVICE, patient_group=None)
    config = Config(
        data="synthetic",
        crop=CROP,
        train_scale=str(CROP),
        batch_size=IMAGES,
        dropout=0.0,
        **{"lr": 1e-4, "compile": "off", **settings},
    )
    return assemble(config, ranks=ranks, precision=precision, micro_batch=IMAGES, model=model)


def logits_and_gradient(model: nn.Module, batch: Batch, precision: Precision, *, scale: float) -> tuple[Tensor, Tensor]:
    """Of the loss times `scale`, all weights in one vector; float64 on the CPU."""
    images, labels = batch
    with precision.autocast():
        logits = model(images)
    loss = F.cross_entropy(logits.float(), labels) * scale
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return logits.detach().cpu().double(), torch.cat([g.flatten().cpu().double() for g in gradients]) / scale


def relative(one: Tensor, other: Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


def test_auto_is_what_the_gpu_has():
    assert fast_format(DEVICE) == ("bf16" if torch.cuda.get_device_capability(DEVICE) >= (8, 0) else "fp16")


@pytest.mark.parametrize("fuse", FUSIONS)
@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_logits_and_gradient_follow_float32_on_a_cpu(reference, batch, name, fuse):
    set_numerics(deterministic=False)
    precision = Precision(name, "cuda")
    expected, exact = logits_and_gradient(reference, batch, Precision("fp32", "cpu"), scale=1.0)
    logits, gradient = logits_and_gradient(
        on_gpu(reference, fuse), as_the_loader_has_it(batch, precision), precision, scale=64.0
    )
    assert relative(logits, expected) < LOGITS_WITHIN[name]
    assert torch.cosine_similarity(gradient, exact, dim=0) > 0.99


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_the_loss_is_finite_and_falls_on_a_fixed_batch(batch, name):
    """In fp16 with the scaler, whose first scales are too large: it skips steps until they are not."""
    set_numerics(deterministic=False)
    precision = Precision(name, "cuda")
    model = build("A", classes=CLASSES, crop=CROP, dropout=0.0, init="xavier", device=DEVICE, seed=3)
    parts = assembled(model, precision, lr=2e-4)
    assert parts.scaler.is_enabled() == (name == "fp16")
    here = as_the_loader_has_it(batch, precision)
    losses = torch.stack([parts.step(iter([here])) for _ in range(STEPS)]).tolist()
    assert all(torch.isfinite(torch.tensor(losses)))
    assert losses[-1] < 0.5 * losses[0], losses
    assert all(weight.dtype == torch.float32 and weight.isfinite().all() for weight in model.parameters())


@pytest.mark.parametrize("fuse", FUSIONS)
@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_compiled_logits_equal_eager_ones(reference, batch, name, fuse):
    if not any(map(shutil.which, ("gcc", "clang", "cc"))):
        pytest.skip("torch.compile needs a C compiler, and there is none")
    set_numerics(deterministic=False)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    precision = Precision(name, "cuda")
    here = as_the_loader_has_it(batch, precision)
    eager, model = on_gpu(reference), on_gpu(reference, fuse)
    compiled = assembled(model, precision, compile="auto")
    assert compiled.compiled, "on a GPU, auto means on"
    with torch.no_grad(), precision.autocast():
        assert relative(model(here[0]).double().cpu(), eager(here[0]).double().cpu()) < LOGITS_WITHIN[name]
    loss, expected = compiled.step(iter([here])), assembled(eager, precision).step(iter([here]))
    assert loss.item() == pytest.approx(expected.item(), rel=0.01)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2, "one with gradients, one without"
    assert not torch._dynamo.utils.counters["graph_break"]


def test_a_fourth_channel_changes_no_more_than_rounding(reference, batch):
    set_numerics(deterministic=False)
    precision = Precision("fp16", "cuda")
    images, labels = as_the_loader_has_it(batch, precision)
    padded = F.pad(images, (0, 0, 0, 0, 0, 1))
    assert padded.is_contiguous(memory_format=torch.channels_last)
    model = on_gpu(reference)
    plain, gradient = logits_and_gradient(model, (images, labels), precision, scale=64.0)
    logits, other = logits_and_gradient(model, (padded, labels), precision, scale=64.0)
    assert relative(logits, plain) < LOGITS_WITHIN["fp16"]
    assert torch.cosine_similarity(gradient, other, dim=0) > 0.999
