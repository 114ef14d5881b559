import copy
import dataclasses
import itertools
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.distributed
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import engine.precision
import engine.training.step
from common.ranks import Ranks
from engine.config import Config
from engine.precision import Precision, choose_precision, fast_format
from engine.training.assembly import assemble
from engine.training.data_parallel import average_over_ranks, data_parallel
from engine.training.step import TrainStep, compile_model
from model.dropout import Dropout
from model.vgg import build
from tests.engine.test_accuracy import RANKS
from tests.support.networks import Noting

CPU = torch.device("cpu")
LR, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 5e-4


def make(precision: Precision, *, passes: int = 1, dropout: float = 0.0, shared=None, **network):
    model = build("A", classes=10, crop=32, dropout=dropout, init="xavier", device=CPU, seed=3, **network)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True)
    numbered = [module for module in model.modules() if isinstance(module, Dropout) and dropout]
    for number, layer in enumerate(numbered):
        layer.number_samples(f"layer {number}", device=CPU)
    return model, TrainStep(
        model,
        optimizer=optimizer,
        scaler=precision.grad_scaler(),
        precision=precision,
        passes=passes,
        shared=shared,
        dropout=numbered,
    )


def make_batch(count: int):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, 32, 32, generator=generator) * 50
    return images.to(memory_format=torch.channels_last), torch.randint(10, (count,), generator=generator)


FP32 = Precision("fp32", "cpu")


def test_steps_equal_the_papers_update_in_float64():
    """v ← 0.9·v + (gradient + decay·w); w ← w − lr·v, by hand on a float64 copy of the network."""
    model, step = make(FP32)
    exact = build("A", classes=10, crop=32, dropout=0.0, init="xavier", device=CPU, seed=3).double()
    velocities = [torch.zeros_like(weight) for weight in exact.parameters()]
    images, labels = make_batch(8)
    for _ in range(3):
        loss = step(iter([(images, labels)]))
        exact_loss = F.cross_entropy(exact(images.double()), labels)
        gradients = torch.autograd.grad(exact_loss, list(exact.parameters()))
        with torch.no_grad():
            for weight, velocity, gradient in zip(exact.parameters(), velocities, gradients, strict=True):
                velocity.mul_(MOMENTUM).add_(gradient + WEIGHT_DECAY * weight)
                weight.sub_(LR * velocity)
        assert loss.item() == pytest.approx(exact_loss.item(), rel=1e-4)
    for weight, exact_weight in zip(model.parameters(), exact.parameters(), strict=True):
        error = (weight - exact_weight).norm() / exact_weight.norm().clamp(min=1e-6)
        assert error < 1e-4


def test_a_step_that_is_given_up_leaves_nothing_behind():
    """Its second pass gets no images: the statistics of batch normalisation, which the first has moved, are put back."""
    model, step = make(FP32, passes=2, batch_norm=True)
    batch = make_batch(4)
    step(iter([batch, batch]))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(StopIteration):
        step(iter([batch]))
    assert not torch.equal(model.state_dict()["features.1.running_mean"], before["features.1.running_mean"])
    assert step.give_up()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())


def test_a_step_that_fails_in_its_last_backward_pass_is_given_up():
    model, step = make(FP32)
    before = [weight.clone() for weight in model.parameters()]
    next(model.parameters()).register_hook(lambda gradient: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        step(iter([make_batch(2)]))
    assert step.give_up()
    assert all(weight.grad is None for weight in model.parameters())
    assert all(torch.equal(weight, value) for weight, value in zip(model.parameters(), before, strict=True))


def test_accumulated_passes_equal_one_large_pass():
    images, labels = make_batch(8)
    whole_model, whole = make(FP32)
    parts_model, parts = make(FP32, passes=4)
    loss = whole(iter([(images, labels)]))
    accumulated_loss = parts(iter([(images[i : i + 2], labels[i : i + 2]) for i in (0, 2, 4, 6)]))
    assert accumulated_loss.item() == pytest.approx(loss.item(), rel=1e-5)
    for one, other in zip(whole_model.parameters(), parts_model.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def test_dropout_is_that_of_the_sample_however_many_passes_a_step_has():
    images, labels = make_batch(8)
    losses = {}
    for passes, first_sample in ((1, 40), (4, 40), (1, 48)):
        _, step = make(FP32, passes=passes, dropout=0.5)
        parts = zip(images.chunk(passes), labels.chunk(passes), strict=True)
        losses[passes, first_sample] = step(parts, first_sample=first_sample).item()
    assert losses[4, 40] == pytest.approx(losses[1, 40], rel=1e-5)
    assert losses[1, 48] != pytest.approx(losses[1, 40], rel=1e-3)


def test_shared_layers_know_the_last_pass_whose_gradients_travel():
    seen: list[object] = []
    shared = SimpleNamespace(last_pass=None, finish_gradients=lambda *, scaled: seen.append("finished"))
    model, step = make(FP32, passes=3, shared=shared)
    model.register_forward_hook(lambda *_: seen.append(shared.last_pass))
    images, labels = make_batch(3)
    step(zip(images.chunk(3), labels.chunk(3), strict=True))
    assert seen == [False, False, True, "finished"]


@pytest.mark.parametrize("name", ["bf16", "fp16"])
@pytest.mark.seconds
def test_half_precision_steps_follow_float32(name):
    images, labels = make_batch(2)
    model, step = make(Precision(name, "cpu"))
    reference, reference_step = make(FP32)
    loss, exact = step(iter([(images, labels)])), reference_step(iter([(images, labels)]))
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)
    assert all(weight.dtype == torch.float32 for weight in model.parameters())
    start = build("A", classes=10, crop=32, dropout=0.0, init="xavier", device=CPU, seed=3)
    moved, exactly = (
        torch.cat(
            [(after - before).flatten() for after, before in zip(net.parameters(), start.parameters(), strict=True)]
        )
        for net in (model, reference)
    )
    assert torch.cosine_similarity(moved, exactly, dim=0) > 0.98


def test_label_smoothing_is_a_mixture_of_two_cross_entropies():
    """(1 - ε) · cross-entropy with the label + ε · cross-entropy with the uniform distribution, in float64."""
    model = build("A", classes=10, crop=32, dropout=0.0, init="xavier", device=CPU, seed=3)
    images, labels = make_batch(4)
    log_posteriors = copy.deepcopy(model).double()(images.double()).log_softmax(dim=1)
    expected = -(0.9 * log_posteriors[range(4), labels] + 0.1 * log_posteriors.mean(dim=1)).mean()
    step = TrainStep(
        model,
        optimizer=torch.optim.SGD(model.parameters(), lr=LR),
        scaler=FP32.grad_scaler(),
        precision=FP32,
        passes=1,
        label_smoothing=0.1,
    )
    assert step(iter([(images, labels)])).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_first_step_that_the_scaler_skips_leaves_no_velocity():
    """torch.empty is made to give NaN, so that memory which nobody has written to shows."""
    config = Config(data="synthetic", crop=32, train_scale="32", batch_size=2, dropout=0.0)
    models = [build("A", classes=10, crop=32, dropout=0.0, init="xavier", device=CPU, seed=3) for _ in range(2)]
    images, labels = make_batch(2)
    torch.use_deterministic_algorithms(True)
    try:
        for model, batches in zip(models, ([images * torch.inf, images], [images]), strict=True):
            parts = assemble(config, ranks=RANKS, precision=Precision("fp16", "cpu"), micro_batch=2, model=model)
            parts.scaler.load_state_dict({**parts.scaler.state_dict(), "scale": 256.0})
            for batch in batches:
                parts.step(iter([(batch, labels)]))
    finally:
        torch.use_deterministic_algorithms(False)
    for skipped, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert other.isfinite().all()
        assert torch.allclose(skipped, other, rtol=1e-4, atol=1e-6), "the scale, halved by the skip, rounds otherwise"


@pytest.mark.parametrize("batch_norm", [False, True])
def test_warm_up_changes_nothing(batch_norm):
    model, step = make(FP32, batch_norm=batch_norm)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step.warm_up(*make_batch(2))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"batch_norm": True}, {"fuse": "conv"}])
def test_training_and_evaluation_compile_once_each_and_give_the_same_numbers(settings):
    """With batch normalisation, whose statistics a compiled step has to write as well; and with an operation of our own."""
    images, labels = make_batch(4)
    eager_model, eager = make(FP32, **settings)
    model, step = make(FP32, **settings)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert compile_model(model, choice="on", mode="default", device=CPU, is_main=True)
    for _ in range(3):
        loss, expected = step(iter([(images, labels)])), eager(iter([(images, labels)]))
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
        model.eval(), eager_model.eval()
        with torch.no_grad():
            assert torch.allclose(model(images), eager_model(images), rtol=1e-3, atol=1e-3)
        model.train(), eager_model.train()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2, "one for training, one for evaluation"
    assert not torch._dynamo.utils.counters["graph_break"]
    assert list(model.state_dict()) == list(eager_model.state_dict())


def test_what_was_compiled_is_kept_in_the_users_cache_or_where_they_say(monkeypatch, tmp_path):
    """Not in the temporary folder, which a machine that is started anew has empty, and others do not see."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for chosen, expected in ((None, tmp_path / "vgg-dali/torchinductor"), ("/elsewhere", "/elsewhere")):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", chosen or "")
        if not chosen:
            monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
        assert compile_model(torch.nn.Linear(2, 2), choice="on", mode="default", device=CPU, is_main=True)
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(expected)


def test_without_a_compiler_the_model_stays_eager_with_a_warning(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    model, step = make(FP32)
    assert not compile_model(model, choice="on", mode="default", device=CPU, is_main=True)
    assert "warning: torch.compile needs a compiler" in capsys.readouterr().err
    step(itertools.repeat(make_batch(2)))


@pytest.mark.parametrize("choice", ["auto", "off"])
def test_on_a_cpu_compilation_is_off_unless_asked_for(choice):
    model, _ = make(FP32)
    assert not compile_model(model, choice=choice, mode="default", device=CPU, is_main=True)


@pytest.mark.parametrize(
    ("device", "has_bf16", "expected"), [("cpu", False, "fp32"), ("cuda", True, "bf16"), ("cuda", False, "fp16")]
)
def test_auto_precision(monkeypatch, device, has_bf16, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    ranks = dataclasses.replace(RANKS, device=torch.device(device))
    precision = choose_precision("auto", ranks)
    assert precision == Precision(expected, device)
    assert fast_format(ranks.device) == expected
    assert precision.half_images == (device == "cuda")
    assert choose_precision("fp32", ranks).name == "fp32"


@pytest.mark.parametrize("own", ["bf16", "fp16"])
def test_auto_precision_is_the_same_on_gpus_that_differ(monkeypatch, own):
    """Else one would scale its loss, and DDP would add its gradients up with those that are not scaled."""
    monkeypatch.setattr(engine.precision, "fast_format", lambda device: own)
    monkeypatch.setattr(engine.precision, "gather", lambda own, ranks: [own, "fp16" if own == "bf16" else "bf16"])
    assert choose_precision("auto", RANKS).name == "fp16"
    assert choose_precision("bf16", RANKS).name == "bf16"


@pytest.mark.parametrize(("device", "name", "half"), [
    ("cpu", "fp32", False), ("cpu", "bf16", False), ("cpu", "fp16", False),
    ("cuda", "fp32", False), ("cuda", "bf16", True), ("cuda", "fp16", True),
])  # fmt: skip
def test_images_are_float16_on_a_gpu_whose_network_computes_in_16_bits(device, name, half):
    assert Precision(name, device).half_images == half


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_a_step_computes_in_the_format_it_is_told_and_scales_the_loss_in_fp16_alone(name, dtype):
    model, precision = Noting(), Precision(name, "cpu")
    scaler = precision.grad_scaler()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    step = TrainStep(model, optimizer=optimizer, scaler=scaler, precision=precision, passes=1)
    loss = step(iter([(torch.ones(3, 4), torch.zeros(3, dtype=torch.int64))]))
    assert model.dtypes == [dtype]
    assert loss.dtype == torch.float32
    assert scaler.is_enabled() == (name == "fp16")


def test_a_step_is_put_together_as_the_configuration_says():
    """Two passes of one image; smoothed targets; an average that follows the weights after each step, not each pass."""
    model = torch.nn.Linear(3, 4, bias=False)
    before = model.weight.detach().clone()
    ranks = dataclasses.replace(TWO_RANKS, world_size=1, local_world_size=1)
    config = Config(
        data="synthetic", crop=32, train_scale="32", batch_size=2, label_smoothing=0.3, ema=0.15, lr=0.5, momentum=0.8,
        weight_decay=0.01,
    )  # fmt: skip
    parts = assemble(config, ranks=ranks, precision=FP32, micro_batch=1, model=model)
    assert (parts.passes, parts.compiled) == (2, False)
    images, labels = torch.randn(2, 3), torch.tensor([3, 1])
    exact = before.double().requires_grad_()
    logs = (images.double() @ exact.T).log_softmax(1)
    expected = -(0.7 * logs[[0, 1], labels] + 0.3 * logs.mean(dim=1)).mean()
    (gradient,) = torch.autograd.grad(expected, exact)
    loss = parts.step(iter([(images[:1], labels[:1]), (images[1:], labels[1:])]))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    first = before - 0.5 * (gradient.float() + 0.01 * before)
    assert torch.allclose(model.weight, first, atol=1e-5)
    assert parts.average
    average = 0.1 * before + 0.9 * first  # the decay of the first step is 1/10, of the second 0.15, less than 2/11
    assert torch.allclose(parts.average.model.state_dict()["weight"], average, atol=1e-5)
    parts.step(iter([(images[:1], labels[:1]), (images[1:], labels[1:])]))
    assert torch.allclose(
        parts.average.model.state_dict()["weight"], 0.15 * average + 0.85 * model.weight.detach(), atol=1e-5
    )
    assert parts.average.steps == 2


@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_weights_that_are_left_alone_keep_their_value_and_their_momentum(name):
    precision = Precision(name, "cpu")
    scaler = precision.grad_scaler()
    if scaler.is_enabled():  # at its own first scale, the first steps are skipped
        scaler.load_state_dict({**scaler.state_dict(), "scale": 256.0})
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True)
    step = TrainStep(model, optimizer=optimizer, scaler=scaler, precision=precision, passes=1)
    batch = torch.randn(6, 3), torch.arange(6) % 4
    step(iter([batch]))
    first = list(model[0].parameters())
    for left_alone in (first, []):
        step.left_alone = left_alone
        before = copy.deepcopy(model.state_dict())
        momenta = [optimizer.state[weight]["momentum_buffer"].clone() for weight in first]
        step(iter([batch]))
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, before[name]) == (bool(left_alone) and name.startswith("0."))
        for weight, momentum in zip(first, momenta, strict=True):
            assert torch.equal(optimizer.state[weight]["momentum_buffer"], momentum) == bool(left_alone)
        assert all(weight.grad is None for weight in model.parameters())


# ---- several ranks: a group of one process, which adds up as a larger one does ---------------------------------------


@pytest.fixture
def group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


TWO_RANKS = Ranks(rank=0, world_size=2, local_rank=0, local_world_size=2, device=CPU, patient_group=None)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("passes", [1, 2, 3])
def test_gradients_travel_once_in_a_step_however_many_passes_it_has(passes):
    """After the last pass, and as what all of them have added up."""
    travelled = []

    def hook(_, bucket):
        travelled.append(bucket.buffer().clone())
        future: torch.futures.Future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    model = torch.nn.Linear(4, 5)
    network = data_parallel(model, TWO_RANKS, accumulates=passes > 1, grad_compression="none")
    assert isinstance(network, DistributedDataParallel)
    network.register_comm_hook(None, hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    step = TrainStep(network, optimizer=optimizer, scaler=FP32.grad_scaler(), precision=FP32, passes=passes)
    images, labels = torch.randn(passes, 6, 4), torch.arange(6) % 5
    alone = copy.deepcopy(model)
    for number in range(1, 4):
        alone.load_state_dict(model.state_dict())
        alone.zero_grad()
        F.cross_entropy(alone(images.flatten(0, 1)), labels.repeat(passes)).backward()
        step(zip(images, itertools.repeat(labels)))
        assert len(travelled) == number, "a bucket a step: the model has one"
        gradients = torch.cat([weight.grad.flatten() for weight in alone.parameters() if weight.grad is not None])
        assert torch.allclose(travelled[-1].sort().values, gradients.sort().values, atol=1e-6)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("parallel", [False, True])
def test_warm_up_makes_the_backward_passes_after_which_ddp_keeps_its_buckets(parallel):
    """One to compile; inside DDP two, or the first step would add up in another order than those after it."""
    model = torch.nn.Linear(4, 5)
    backward = []
    model.weight.register_post_accumulate_grad_hook(lambda _: backward.append(1))
    network = data_parallel(model, TWO_RANKS, accumulates=False, grad_compression="none") if parallel else model
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    step = TrainStep(network, optimizer=optimizer, scaler=FP32.grad_scaler(), precision=FP32, passes=1)
    step.warm_up(torch.randn(6, 4), torch.arange(6) % 5)
    assert len(backward) == (2 if parallel else 1)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("choice", ["none", "bf16", "fp16"])
def test_gradients_travel_in_the_format_that_was_asked_for(choice):
    """They come out rounded to it: bf16 has 8 bits and the range of float32, fp16 has 11, and 6e-8 is its smallest number."""
    dtype = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[choice]
    model = torch.nn.Linear(3, 1, bias=False)
    config = Config(data="synthetic", crop=32, train_scale="32", batch_size=2, grad_compression=choice)
    parts = assemble(config, ranks=TWO_RANKS, precision=FP32, micro_batch=1, model=model)
    values = torch.tensor([[1 / 3, 1e-9, 1234.567]])
    parts.network(values).sum().backward()
    assert model.weight.grad is not None
    assert torch.equal(model.weight.grad, values.to(dtype).float())


@pytest.mark.usefixtures("group")
def test_the_mean_over_ranks_divides_by_their_number(monkeypatch):
    tensors = [torch.arange(6.0).reshape(2, 3), torch.tensor([[5.0]])]
    expected = [tensor.clone() for tensor in tensors]
    all_reduce = torch.distributed.all_reduce

    def of_three_alike(tensor):
        all_reduce(tensor)
        tensor *= 3

    monkeypatch.setattr(torch.distributed, "all_reduce", of_three_alike)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    average_over_ranks(tensors)
    for tensor, mean in zip(tensors, expected, strict=True):
        assert torch.equal(tensor, mean)


@pytest.mark.usefixtures("group")
def test_ranks_send_no_buffers_before_a_pass():
    """In a forward pass no rank waits for another; statistics are averaged after the step."""
    network = data_parallel(
        torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)), TWO_RANKS, accumulates=False,
        grad_compression="none",
    )  # fmt: skip
    assert isinstance(network, DistributedDataParallel)
    assert not network.will_sync_module_buffers()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("passes", [1, 2])
def test_statistics_of_all_ranks_are_averaged_once_after_a_step(monkeypatch, passes):
    """Those of batch normalisation, not its counter; without it there is nothing to send."""
    sent = []
    monkeypatch.setattr(
        engine.training.step, "average_over_ranks", lambda tensors: sent.append([tensor.clone() for tensor in tensors])
    )
    batch = torch.randn(6, 4), torch.arange(6) % 4
    for layers in ([torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)], [torch.nn.Linear(4, 4)]):
        model = torch.nn.Sequential(*layers)
        network = data_parallel(model, TWO_RANKS, accumulates=passes > 1, grad_compression="none")
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        step = TrainStep(network, optimizer=optimizer, scaler=FP32.grad_scaler(), precision=FP32, passes=passes)
        step(itertools.repeat(batch))
        if len(layers) == 2:
            ((mean, variance),) = sent
            assert torch.equal(mean, model.state_dict()["1.running_mean"])
            assert torch.equal(variance, model.state_dict()["1.running_var"])
            assert mean.any(), "after the step"
            layers[1].eval()  # it keeps its statistics, which are the same on all ranks
            step(itertools.repeat(batch))
    assert len(sent) == 1
