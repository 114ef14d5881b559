import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch.nn import functional as F

from model.dense import Dense
from model.vgg import CONFIGURATIONS, VGG, build

CPU = torch.device("cpu")


def network(arch, crop, *, classes=11, batch_norm=False):
    model = build(
        arch, classes=classes, crop=crop, dropout=0.5, init="kaiming", device=CPU, seed=2, batch_norm=batch_norm
    )
    generator = torch.Generator().manual_seed(3)
    for name, value in model.state_dict().items():
        if name.endswith("bias") or name.endswith("running_mean"):
            value.uniform_(-0.5, 0.5, generator=generator)
        elif name.endswith("running_var"):
            value.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def images(n, height, width, dtype=torch.float32):
    pixels = torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(4), dtype=dtype) * 255 - 120
    return pixels.contiguous(memory_format=torch.channels_last)


def relu(x):
    return np.maximum(x, 0)


def reference(state, image, side):
    """Configuration A in NumPy, float64, on one image [3, height, width], its classifier on one window of the map at a time.

    Returns the means of FC7's activations and of the logits over the windows, and their number.
    """
    weights = {name: value.double().numpy() for name, value in state.items()}
    x, number = image.numpy(), 0
    for convolutions in (1, 1, 2, 2, 2):
        for _ in range(convolutions):
            windows = sliding_window_view(np.pad(x, ((0, 0), (1, 1), (1, 1))), (3, 3), axis=(1, 2))
            x = np.tensordot(weights[f"features.{number}.weight"], windows, axes=((1, 2, 3), (0, 3, 4)))
            x = relu(x + weights[f"features.{number}.bias"][:, None, None])
            number += 2
        number += 1
        down, across = x.shape[1] // 2, x.shape[2] // 2
        x = x[:, : 2 * down, : 2 * across].reshape(len(x), down, 2, across, 2).max(axis=(2, 4))
    features, logits = [], []
    for top in range(x.shape[1] - side + 1):
        for left in range(x.shape[2] - side + 1):
            window = x[:, top : top + side, left : left + side].reshape(-1)
            fc6 = relu(weights["classifier.0.weight"] @ window + weights["classifier.0.bias"])
            fc7 = relu(weights["classifier.3.weight"] @ fc6 + weights["classifier.3.bias"])
            features.append(fc7)
            logits.append(weights["classifier.6.weight"] @ fc7 + weights["classifier.6.bias"])
    return np.mean(features, axis=0), np.mean(logits, axis=0), len(logits)


@pytest.mark.parametrize(
    ("crop", "height", "width", "places"),
    [
        (64, 64, 64, 1),
        (64, 96, 64, 2),  # one more window down
        (64, 127, 161, 2 * 4),  # rows and columns that fill no multiple of 32
        (32, 40, 100, 3),  # FC6 is 1×1
    ],
)
@pytest.mark.seconds
def test_is_the_classifier_at_every_place_averaged(crop, height, width, places):
    model = network("A", crop).double()
    dense, x = Dense(model), images(2, height, width, torch.float64)
    with torch.no_grad():
        features, logits = dense.features(x), dense(x)
    assert features.shape == (2, 4096)
    for number, image in enumerate(x):
        expected_features, expected_logits, count = reference(model.state_dict(), image, crop // 32)
        assert count == places
        np.testing.assert_allclose(features[number], expected_features, rtol=0, atol=1e-12 * expected_features.max())
        np.testing.assert_allclose(logits[number], expected_logits, rtol=0, atol=1e-12 * np.abs(expected_logits).max())


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("arch", CONFIGURATIONS)
@pytest.mark.seconds
def test_is_a_fully_convolutional_network(arch, batch_norm):
    """The construction of section 3.2, layer by layer: FC6, FC7 and FC8 as convolutions, the score map averaged."""
    model = network(arch, 64, batch_norm=batch_norm)
    x = images(2, 96, 130)
    with torch.no_grad():
        scores = model.features(x)
        for layer, side in ((0, 2), (3, 1), (6, 1)):
            weight, bias = model.classifier[layer].weight, model.classifier[layer].bias
            scores = F.conv2d(scores, weight.view(len(weight), -1, side, side), bias)
            if layer != 6:
                scores = F.relu(scores)
        assert scores.shape == (2, 11, 2, 3)
        expected = scores.mean(dim=(2, 3))
        torch.testing.assert_close(Dense(model)(x), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("crop", [32, 96, 224])
@pytest.mark.seconds
def test_equals_the_network_on_an_image_of_the_crops_size(crop):
    model, x = network("A", crop), images(2, crop, crop)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(Dense(model)(x), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_windows_inside_the_image_are_not_padded():
    """What tells dense evaluation from crops: on a crop cut out of the image the network sees zeros around it instead."""
    model, x = network("A", 32), images(1, 32, 64)
    with torch.no_grad():
        crops = torch.stack([model(x[..., :32]), model(x[..., 32:])]).mean(dim=0)
        assert (Dense(model)(x) - crops).abs().max() > 0.01 * crops.abs().max()


def test_a_fourth_channel_of_zeros_changes_nothing():
    model, x = network("A", 32), images(2, 32, 64)
    with torch.no_grad():
        torch.testing.assert_close(Dense(model)(F.pad(x, (0, 0, 0, 0, 0, 1))), Dense(model)(x))


def test_shares_the_networks_parameters():
    model = network("A", 32)
    dense = Dense(model)
    assert {id(weight) for weight in dense.parameters()} == {id(weight) for weight in model.parameters()}
    x = images(1, 64, 64)
    with torch.no_grad():
        before = dense(x)
        model.classifier[6].bias += 1
        torch.testing.assert_close(dense(x), before + 1)


@pytest.mark.parametrize(("height", "width"), [(63, 100), (100, 63)])
def test_images_smaller_than_the_crop_are_refused(height, width):
    with torch.device("meta"):
        dense, x = Dense(VGG("A", crop=64)), torch.empty(1, 3, height, width)
    with pytest.raises(ValueError, match=rf"images of {width}×{height} pixels are smaller than the crop, 64"):
        dense(x)
