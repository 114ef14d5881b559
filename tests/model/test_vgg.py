import copy

import pytest
import torch
import torch.nn.functional as F

from model.vgg import (
    CONFIGURATIONS,
    FUSIONS,
    INITIALISERS,
    VGG,
    Convolution,
    LocalResponseNorm,
    PoolThenBias,
    build,
    convolution_relu,
)

CPU = torch.device("cpu")
# Table 2 of the paper in full, for 1000 classes at 224 pixels.
PARAMETERS = {
    "A": 132_863_336,
    "A-LRN": 132_863_336,
    "B": 133_047_848,
    "C": 133_638_952,
    "D": 138_357_544,
    "E": 143_667_240,
}


@pytest.mark.parametrize("arch", CONFIGURATIONS)
def test_parameters_and_weight_layers_are_the_papers(arch):
    with torch.device("meta"):
        model = VGG(arch)
    assert sum(weight.numel() for weight in model.parameters()) == PARAMETERS[arch]
    layers = sum(weight.ndim > 1 for weight in model.parameters())
    assert layers == {"A": 11, "A-LRN": 11, "B": 13, "C": 16, "D": 16, "E": 19}[arch]


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("arch", CONFIGURATIONS)
def test_freezing_blocks(arch, batch_norm):
    """Counted by hand: the layers with weights, convolutions and normalisations, of each block. Both modes come and go."""
    convolutions = {"A": (1, 1, 2, 2, 2), "A-LRN": (1, 1, 2, 2, 2), "B": (2,) * 5, "C": (2, 2, 3, 3, 3)}
    convolutions |= {"D": (2, 2, 3, 3, 3), "E": (2, 2, 4, 4, 4)}
    with torch.device("meta"):
        model = VGG(arch, classes=3, crop=32, batch_norm=batch_norm)
    for blocks in (0, 1, 3, 5):
        model.freeze(blocks)
        layers = [layer for layer in model.features.modules() if list(layer.parameters(recurse=False))]
        frozen = sum(convolutions[arch][:blocks]) * (1 + batch_norm)
        for place, layer in enumerate(layers):
            assert {weight.requires_grad for weight in layer.parameters()} == {place >= frozen}
        assert all(weight.requires_grad for weight in model.classifier.parameters())
        for mode in (False, True):
            model.train(mode)
            for place, layer in enumerate(layers):
                is_kept = place < frozen and isinstance(layer, torch.nn.BatchNorm2d)
                assert layer.training == (mode and not is_kept)
            assert model.classifier[2].training == mode
    model.keep_statistics(0)
    assert all(layer.training for layer in model.modules())


def test_lrn_keeps_the_keys_of_a():
    with torch.device("meta"):
        plain, with_lrn = VGG("A"), VGG("A-LRN")
    assert list(plain.state_dict()) == list(with_lrn.state_dict())
    assert sum(isinstance(module, LocalResponseNorm) for module in with_lrn.modules()) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lrn_is_alexnets_formula(dtype):
    x = (torch.randn(2, 9, 4, 5, generator=torch.Generator().manual_seed(0)) * 300).to(dtype)
    exact = x.double()
    expected = torch.empty_like(exact)
    for channel in range(9):
        neighbours = exact[:, max(0, channel - 2) : channel + 3]
        expected[:, channel] = exact[:, channel] / (2 + 1e-4 * (neighbours**2).sum(dim=1)) ** 0.75
    result = LocalResponseNorm()(x)
    assert result.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 6e-4}[dtype]
    assert torch.allclose(result.double(), expected, rtol=tolerance)


@pytest.mark.parametrize("crop", [32, 64, 96, 160])
@pytest.mark.seconds
def test_any_multiple_of_32_works(crop):
    model = build("A-LRN", classes=5, crop=crop, dropout=0.5, init="xavier", device=torch.device("cpu"))
    assert model.classifier[0].in_features == 512 * (crop // 32) ** 2
    assert model(torch.zeros(2, 3, crop, crop)).shape == (2, 5)


@pytest.mark.parametrize("crop", [0, 16, 100, 225, -32])
def test_other_crops_are_refused(crop):
    with pytest.raises(ValueError, match="multiple of 32"):
        VGG("A", crop=crop)


def test_unknown_architecture_is_refused():
    with pytest.raises(ValueError, match="unknown architecture F; choose one of A, A-LRN, B, C, D, E"):
        VGG("F")


@pytest.mark.parametrize("init", INITIALISERS)
def test_initial_weights_have_the_spread_of_their_rule(init):
    model = build("C", classes=10, crop=32, dropout=0.5, init=init, device=torch.device("cpu"), seed=1)
    for module in model.modules():
        if not isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            continue
        weight = module.weight
        inputs = weight[0].numel()
        outputs = weight.shape[0] * weight[0, 0].numel()
        expected = {"xavier": (2 / (inputs + outputs)) ** 0.5, "normal": 0.1, "kaiming": (2 / inputs) ** 0.5}[init]
        assert weight.std().item() == pytest.approx(expected, rel=0.08)
        assert module.bias is not None
        assert not module.bias.any()


@pytest.mark.parametrize("arch", ["A-LRN", "C"])
def test_batch_norm_stands_between_every_convolution_and_its_relu_and_starts_as_the_identity(arch):
    """In the configurations that torchvision does not have; tests/model/test_weights.py compares the others with its own."""
    model = build(arch, classes=10, crop=32, dropout=0.5, init="xavier", device=CPU, seed=1, batch_norm=True)
    plain = build(arch, classes=10, crop=32, dropout=0.5, init="xavier", device=CPU, seed=1)
    layers = list(model.features)
    convolutions = [number for number, layer in enumerate(layers) if isinstance(layer, torch.nn.Conv2d)]
    for number in convolutions:
        norm = layers[number + 1]
        assert isinstance(norm, torch.nn.BatchNorm2d)
        assert norm.num_features == layers[number].out_channels
        behind = layers[number + 3] if isinstance(layers[number + 2], torch.nn.MaxPool2d) else layers[number + 2]
        assert isinstance(behind, torch.nn.ReLU | torch.nn.Sequential)
    assert len(convolutions) == sum(isinstance(layer, torch.nn.Conv2d) for layer in plain.features)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # running mean 0, variance 1: equal up to the 1e-5 that is added to the variance
        torch.testing.assert_close(model.eval()(images), plain.eval()(images), rtol=1e-3, atol=1e-4)


def test_initial_weights_are_a_function_of_the_seed():
    def first_weight(seed):
        model = build("A", classes=10, crop=32, dropout=0.5, init="xavier", device=torch.device("cpu"), seed=seed)
        return model.state_dict()["features.0.weight"]

    torch.manual_seed(123)
    assert torch.equal(first_weight(4), first_weight(4))
    assert not torch.equal(first_weight(4), first_weight(5))


def test_weights_are_channels_last():
    model = build("A", classes=10, crop=32, dropout=0.5, init="xavier", device=torch.device("cpu"))
    assert model.state_dict()["features.3.weight"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_fourth_channel_is_not_in_the_first_convolutions_sums(dtype):
    """On small whole numbers, whose sums are exact in any order; the fourth channel holds what must not count."""
    generator = torch.Generator().manual_seed(0)
    convolution = Convolution(3, 64, kernel_size=3, padding=1, dtype=dtype)
    images = torch.randint(-100, 100, (2, 4, 32, 32), generator=generator).to(dtype)
    with torch.no_grad():
        for weight in convolution.parameters():
            weight.copy_(torch.randint(-10, 10, weight.shape, generator=generator))
    results = []
    for seen in (images[:, :3], images):
        outputs = convolution(seen.contiguous(memory_format=torch.channels_last))
        gradients = torch.autograd.grad(outputs.square().sum(), list(convolution.parameters()))
        results.append((outputs, *gradients))
    for plain, padded in zip(*results, strict=True):
        assert torch.equal(plain, padded)
    assert results[0][1].shape == (64, 3, 3, 3)


def test_with_a_fourth_channel_the_network_gives_the_same_logits_and_gradients():
    model = build("D", classes=10, crop=32, dropout=0.0, init="xavier", device=torch.device("cpu")).double()
    images = 50 * torch.randn(2, 3, 32, 32, dtype=torch.float64).to(memory_format=torch.channels_last)
    results = []
    for seen in (images, F.pad(images, (0, 0, 0, 0, 0, 1))):
        logits = model(seen)
        gradients = torch.autograd.grad(F.cross_entropy(logits, torch.tensor([3, 7])), list(model.parameters()))
        results.append((logits, *gradients))
    for plain, padded in zip(*results, strict=True):
        assert (plain - padded).norm() <= 1e-12 * plain.norm()


def paper_order(features: torch.nn.Module) -> torch.nn.Sequential:
    """The layers as the paper and torchvision have them, each ReLU in front of its pooling, with the same parameters."""
    layers: list[torch.nn.Module] = []
    for layer in features.children():
        pooled = layers and isinstance(layers[-1], torch.nn.MaxPool2d)
        layers.insert(len(layers) - bool(pooled and isinstance(layer, torch.nn.ReLU)), layer)
    assert layers != list(features.children())
    return torch.nn.Sequential(*layers)


def maps_and_gradients(features: torch.nn.Module, images):
    """The last feature map, and the gradients of something that is flat nowhere."""
    maps = features(images)
    towards = torch.randn(maps.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    named = dict(features.named_parameters())
    gradients = torch.autograd.grad(maps, list(named.values()), towards.to(maps.dtype))
    return maps.detach(), dict(zip(named, gradients, strict=True))


def small(arch, *, channels=3, dtype=torch.float32, **settings):
    """The convolutions of a network and images in grey levels, with biases that matter: of both signs."""
    generator = torch.Generator().manual_seed(0)
    features = build(arch, classes=10, crop=32, dropout=0.0, init="kaiming", device=CPU, seed=2, **settings).features
    features.to(dtype)
    with torch.no_grad():
        for name, weight in features.named_parameters():
            if name.endswith("bias"):
                weight.copy_(torch.randn(weight.shape, generator=generator, dtype=dtype) * 20)
    images = torch.randn(4, channels, 32, 32, generator=generator, dtype=dtype) * 60
    return features, images.to(memory_format=torch.channels_last)


@pytest.mark.seconds
@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("arch", ["A", "A-LRN", "C"])
def test_pooling_before_the_relu_changes_no_bit(arch, batch_norm):
    features, images = small(arch, batch_norm=batch_norm)
    maps, gradients = maps_and_gradients(features, images)
    expected, expected_gradients = maps_and_gradients(paper_order(features), images)
    assert torch.equal(maps, expected)
    for gradient, other in zip(gradients.values(), expected_gradients.values(), strict=True):
        assert torch.equal(gradient, other)
        assert gradient.any()


@pytest.mark.seconds
@pytest.mark.parametrize(("arch", "channels"), [("A-LRN", 3), ("C", 3), ("A", 4)])
@pytest.mark.parametrize("fuse", ["pool", "conv"])
def test_fused_is_the_same_network(fuse, arch, channels):
    """In float64, so that another order of the sums cannot move an activation over the kink of its ReLU."""
    plain, images = small(arch, channels=channels, dtype=torch.float64)
    fused, _ = small(arch, dtype=torch.float64, fuse=fuse)
    assert [*fused.state_dict()] == [*plain.state_dict()]
    maps, gradients = maps_and_gradients(fused, images)
    expected, expected_gradients = maps_and_gradients(plain, images)
    torch.testing.assert_close(maps, expected, rtol=1e-9, atol=1e-9)
    for name, gradient in gradients.items():
        largest = expected_gradients[name].abs().max()
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-9, atol=1e-9 * largest.item())
    convolutions = [layer for layer in fused if isinstance(layer, Convolution)]
    poolings = 5 - (arch == "A-LRN")  # the normalisation stands between
    assert sum(layer.leaves_bias for layer in convolutions) == poolings
    assert sum(isinstance(layer, PoolThenBias) for layer in fused) == poolings
    assert sum(layer.takes_relu for layer in convolutions) == (fuse == "conv") * (len(convolutions) - 5)


def test_bias_behind_the_pooling_changes_no_bit_of_float32s_sums():
    """Rounding keeps order: max(x) + b is max(x + b). A convolution that adds its bias last gives the same logits."""
    maps, bias = torch.randn(2, 8, 12, 12) * 100, torch.randn(8)
    convolution = Convolution(8, 8, kernel_size=1)
    convolution.load_state_dict({"bias": bias}, strict=False)
    expected = torch.nn.functional.max_pool2d(maps + bias[:, None, None], 2)
    assert torch.equal(PoolThenBias(convolution)(maps), expected)


def test_a_copy_of_a_fused_network_adds_its_own_bias():
    model, images = small("A", fuse="pool")
    copied = copy.deepcopy(model)
    before = model(images)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    assert not model(images).any()
    assert torch.equal(copied(images), before)


def test_batch_norm_leaves_nothing_to_fuse():
    with torch.device("meta"):
        for fuse in FUSIONS:
            layers = list(VGG("A", batch_norm=True, fuse=fuse).modules())
            assert not any(isinstance(layer, PoolThenBias | torch.nn.Identity) for layer in layers)


@pytest.mark.parametrize("padding", [0, 1])
def test_convolution_and_relu_in_one_operation(padding):
    generator = torch.Generator().manual_seed(0)
    side = 2 * padding + 1
    images = torch.randn(2, 3, 5, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 3, side, side, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, generator=generator, dtype=torch.float64, requires_grad=True)
    result = convolution_relu(images, weight, bias, padding)
    assert torch.equal(result, torch.nn.functional.conv2d(images, weight, bias, padding=padding).relu())
    assert (result == 0).any()
    torch.library.opcheck(convolution_relu, (images, weight, bias, padding))
    assert torch.autograd.gradcheck(convolution_relu, (images, weight, bias, padding))


@pytest.mark.seconds
@pytest.mark.parametrize("fuse", ["pool", "conv"])
def test_fused_under_autocast_computes_in_half_precision(fuse):
    plain, images = small("A")
    fused, _ = small("A", fuse=fuse)
    exact, gradients = maps_and_gradients(plain, images)
    with torch.autocast("cpu", torch.bfloat16):
        assert {
            layer(torch.randn(1, layer.in_channels, 4, 4)).dtype for layer in fused if isinstance(layer, Convolution)
        } == {torch.bfloat16}
        maps, half_gradients = maps_and_gradients(fused, images)
        expected, expected_gradients = maps_and_gradients(plain, images)

    def error(value, of):
        return ((value - of).norm() / of.norm()).item()

    assert error(maps.float(), exact) < 1.5 * error(expected.float(), exact) < 0.05
    for name, gradient in half_gradients.items():
        assert gradient.dtype == torch.float32
        assert error(gradient, gradients[name]) < 1.5 * error(expected_gradients[name], gradients[name]), name
