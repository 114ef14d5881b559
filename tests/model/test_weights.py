import pytest
import torch
import torchvision
from torchvision.transforms.v2.functional import normalize

from model.vgg import CONFIGURATIONS, VGG, build
from model.weights import (
    NOT_DIVIDED,
    TORCHVISION_MEAN,
    TORCHVISION_MEAN_RGB,
    TORCHVISION_STD,
    TORCHVISION_STD_RGB,
    as_float32,
    describe,
    for_std,
    initialise_from,
    load_all,
    to_torchvision,
    unwrapped,
)

CPU = torch.device("cpu")
TORCHVISION = {"A": "vgg11", "B": "vgg13", "D": "vgg16", "E": "vgg19"}
ALL_TORCHVISION = [(arch, batch_norm) for arch in TORCHVISION for batch_norm in (False, True)]


def outline(arch, **arguments):
    with torch.device("meta"):
        return VGG(arch, **arguments)


def small(arch, *, seed=0, classes=7, **arguments):
    return build(arch, classes=classes, crop=32, dropout=0.5, init="xavier", device=CPU, seed=seed, **arguments)


def torchvision_network(arch, batch_norm):
    """As torchvision builds it, 10 classes, its weights and statistics made up: torchvision's own take seconds to draw."""
    with torch.device("meta"):
        network = getattr(torchvision.models, TORCHVISION[arch] + "_bn" * batch_norm)(num_classes=10)
    network.to_empty(device=CPU).eval()
    generator = torch.Generator().manual_seed(0)
    for name, value in network.state_dict().items():
        if value.ndim > 1:
            bound = (6 / value[0].numel()) ** 0.5  # keeps the activations' size from layer to layer
            repeated = torch.empty(min(value.numel(), 1_000_003)).uniform_(-bound, bound, generator=generator)
            copies = -(-value.numel() // repeated.numel())
            value.copy_(repeated.repeat(copies)[: value.numel()].view_as(value))
        elif name.endswith("num_batches_tracked"):
            value.fill_(5)
        elif name.endswith(("weight", "running_var")):
            value.uniform_(0.5, 1.5, generator=generator)
        else:
            value.uniform_(-0.3, 0.3, generator=generator)
    return network


def test_torchvisions_own_normalisation_is_known():
    for weights in (torchvision.models.VGG11_Weights.IMAGENET1K_V1, torchvision.models.VGG16_Weights.IMAGENET1K_V1):
        transform = weights.transforms()
        assert (tuple(transform.mean), tuple(transform.std)) == (TORCHVISION_MEAN, TORCHVISION_STD)


STDS = [NOT_DIVIDED, (40.0, 100.0, 127.5), TORCHVISION_STD_RGB]


@pytest.mark.parametrize(
    ("arch", "batch_norm", "std"),
    [*((*network, NOT_DIVIDED) for network in ALL_TORCHVISION), *(("A", True, std) for std in STDS[1:])],
)
@pytest.mark.seconds
def test_torchvisions_networks_in_and_out_give_equal_logits(arch, batch_norm, std):
    """Seen through torchvision's own Normalize: the mean and the division by 255·std, borders included."""
    reference = torchvision_network(arch, batch_norm)
    theirs = reference.state_dict()
    state = for_std(theirs, TORCHVISION_STD_RGB, std)
    model = outline(arch, classes=10, batch_norm=batch_norm).eval()
    model.load_state_dict(state, assign=True)

    pixels = torch.randint(0, 256, (1, 3, 224, 224), generator=torch.Generator().manual_seed(1)).float()
    seen_by_theirs = normalize(pixels / 255, list(TORCHVISION_MEAN), list(TORCHVISION_STD))
    with torch.no_grad():
        expected = reference(seen_by_theirs)
        logits = model((pixels - torch.tensor(TORCHVISION_MEAN_RGB).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())

    back, normalize_mean = to_torchvision(model.state_dict(), TORCHVISION_MEAN_RGB, std)
    assert normalize_mean == pytest.approx(TORCHVISION_MEAN, rel=1e-12)
    assert back.keys() == theirs.keys()
    torch.testing.assert_close(back.pop("features.0.weight"), theirs["features.0.weight"], rtol=2e-7, atol=0)
    assert all(torch.equal(weight, theirs[name]) for name, weight in back.items())


@pytest.mark.parametrize("std", STDS)
def test_the_division_is_exact_to_the_border(std):
    """In float64, on the first convolution alone, whose padding is of zeros: every pixel of its output, corners too."""
    state = {name: weight.double() for name, weight in small("A").state_dict().items()}
    ours = for_std(state, TORCHVISION_STD_RGB, std)
    pixels = torch.randint(0, 256, (1, 3, 32, 32), generator=torch.Generator().manual_seed(1)).double()
    seen_by_theirs = normalize(pixels / 255, list(TORCHVISION_MEAN), list(TORCHVISION_STD))
    mean, divisor = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (TORCHVISION_MEAN_RGB, std))
    seen_by_ours = (pixels - mean) / divisor
    expected, result = (
        torch.conv2d(seen, weights["features.0.weight"], padding=1)
        for seen, weights in ((seen_by_theirs, state), (seen_by_ours, ours))
    )
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-13)


def test_a_mean_of_ones_own_is_torchvisions_times_255():
    _, normalize_mean = to_torchvision(small("A").state_dict(), (255.0, 51.0, 0.0), NOT_DIVIDED)
    assert normalize_mean == (1.0, 0.2, 0.0)


def test_states_that_are_given_stay_as_they_are():
    state = small("A").state_dict()
    before = {name: weight.clone() for name, weight in state.items()}
    for_std(state, TORCHVISION_STD_RGB, NOT_DIVIDED)
    to_torchvision(state, (1, 2, 3), NOT_DIVIDED)
    assert all(torch.equal(state[name], weight) for name, weight in before.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_for_the_same_std_stay_as_they_are_to_the_last_bit(dtype):
    """Of 32 bits, or of 16: also where the std is written in decimals, as --std has it."""
    weight = torch.randn(64, 3, 3, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    for std in ((58.395, 57.12, 57.375), TORCHVISION_STD_RGB):
        again = for_std({"features.0.weight": weight}, TORCHVISION_STD_RGB, std)["features.0.weight"]
        assert torch.equal(again, weight.float())


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("arch", CONFIGURATIONS)
def test_a_state_says_which_network_it_belongs_to(arch, batch_norm):
    for classes, crop in ((1000, 224), (3, 32), (10, 96)):
        state = outline(arch, classes=classes, crop=crop, batch_norm=batch_norm).state_dict()
        expected = "A" if arch == "A-LRN" else arch  # which has no weights of its own
        assert describe(state) == (expected, batch_norm, classes, crop)


def test_a_network_saved_before_batch_norm_counted_batches_is_known_and_loads():
    model = small("B", batch_norm=True)
    old = {name: weight for name, weight in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    assert describe(old) == ("B", True, 7, 32)
    assert not load_all(small("B", seed=1, batch_norm=True), for_std(old, TORCHVISION_STD_RGB, NOT_DIVIDED))


@pytest.mark.parametrize("what", ["empty", "checkpoint", "resnet", "extra layer", "wide", "odd FC6", "tiny FC6"])
def test_weights_of_something_else_are_refused(what):
    state = outline("A", classes=5, crop=32).state_dict()
    another = {
        "empty": {},
        "checkpoint": {"model": state["features.0.weight"]},
        "resnet": {"conv1.weight": torch.zeros(64, 3, 7, 7), "fc.weight": torch.zeros(5, 512)},
        "extra layer": {**state, "features.99.weight": torch.zeros(5)},
        "wide": {**state, "features.0.weight": torch.zeros(65, 3, 3, 3)},
        "odd FC6": {**state, "classifier.0.weight": torch.zeros(4096, 512 * 3, device="meta")},
        "tiny FC6": {**state, "classifier.0.weight": torch.zeros(4096, 3)},
    }[what]
    with pytest.raises(ValueError, match=r"these are not the weights of"):
        describe(another)


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("arch", CONFIGURATIONS)
@pytest.mark.seconds
def test_pre_initialisation_copies_four_convolutions_and_the_classifier(arch, batch_norm):
    """Against the paper's table counted by hand: conv1_1, conv2_1, conv3_1 and conv3_2 in torchvision's numbering."""
    source = small("A", batch_norm=batch_norm)
    for number, weight in enumerate(source.state_dict().values()):
        weight.fill_(number + 1)  # tells every layer of A from the others
    model = small(arch, seed=1, batch_norm=batch_norm)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    copied = initialise_from(model, source.state_dict())

    numbers = {
        ("A", False): (0, 3, 6, 8),
        ("A-LRN", False): (0, 3, 6, 8),
        ("A", True): (0, 4, 8, 11),
        ("A-LRN", True): (0, 4, 8, 11),
    }
    deeper = (0, 7, 14, 17) if batch_norm else (0, 5, 10, 12)
    expected = {}
    for theirs, ours in zip(numbers["A", batch_norm], numbers.get((arch, batch_norm), deeper), strict=True):
        parameters = ["0.weight", "0.bias"]
        if batch_norm:
            parameters += [
                f"1.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
            ]
        for offset, name in (parameter.split(".") for parameter in parameters):
            expected[f"features.{ours + int(offset)}.{name}"] = f"features.{theirs + int(offset)}.{name}"
    for number in (0, 3, 6):
        for name in ("weight", "bias"):
            expected[f"classifier.{number}.{name}"] = f"classifier.{number}.{name}"
    assert set(copied) == set(expected)
    assert len(copied) == len(expected)
    for name, weight in model.state_dict().items():
        wanted = source.state_dict()[expected[name]] if name in expected else before[name]
        assert torch.equal(weight, wanted), name


@pytest.mark.parametrize("source_has_it", [False, True])
def test_pre_initialisation_between_plain_and_batch_norm_copies_what_both_have(source_has_it):
    source = small("A", batch_norm=source_has_it).state_dict()
    model = small("D", seed=1, batch_norm=not source_has_it)
    copied = initialise_from(model, source)
    assert len(copied) == 2 * (4 + 3)
    theirs, ours = (
        ("features.4.weight", "features.5.weight") if source_has_it else ("features.3.weight", "features.7.weight")
    )
    assert torch.equal(model.state_dict()[ours], source[theirs])


def test_pre_initialisation_for_other_classes_leaves_the_last_layer():
    model = small("C", classes=4)
    copied = initialise_from(model, small("A", seed=1).state_dict())
    assert "classifier.3.weight" in copied
    assert not any(name.startswith("classifier.6") for name in copied)


def test_pre_initialisation_keeps_channels_last():
    model = small("E")
    initialise_from(model, small("A").state_dict())
    assert model.state_dict()["features.5.weight"].is_contiguous(memory_format=torch.channels_last)


def test_pre_initialisation_takes_nothing_but_a_of_the_same_crop():
    with pytest.raises(
        ValueError, match="these are the weights of B for 32 pixels; E for 32 pixels starts from those of A"
    ):
        initialise_from(small("E"), small("B").state_dict())
    with pytest.raises(ValueError, match="the weights of A with batch norm for 64 pixels; E for 32 pixels starts from"):
        initialise_from(small("E"), outline("A", crop=64, batch_norm=True).state_dict())


def test_loading_all_weights():
    source, model = small("C", batch_norm=True), small("C", seed=1, batch_norm=True)
    assert load_all(model, source.state_dict()) is False
    for name, weight in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)


def test_loading_all_weights_for_other_classes_keeps_the_new_last_layer():
    source, model = small("B"), small("B", seed=1, classes=4)
    last = {name: weight.clone() for name, weight in model.state_dict().items() if name.startswith("classifier.6")}
    assert load_all(model, source.state_dict()) is True
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, last[name] if name in last else source.state_dict()[name])


def test_loading_another_networks_weights_is_refused():
    with pytest.raises(ValueError, match="these are the weights of D for 32 pixels, the network is E for 32 pixels"):
        load_all(small("E"), small("D").state_dict())
    with pytest.raises(ValueError, match="of A for 64 pixels, the network is A with batch norm for 32 pixels"):
        load_all(small("A", batch_norm=True), outline("A", crop=64).state_dict())


def test_as_lrn_and_a_share_their_weights():
    assert load_all(small("A-LRN"), small("A").state_dict()) is False


WRAPS = [
    lambda state: {f"module.{name}": value for name, value in state.items()},
    lambda state: {f"_orig_mod.{name}": value for name, value in state.items()},
    lambda state: {f"module._orig_mod.{name}": value for name, value in state.items()},
    lambda state: {f"_orig_mod.module.{name}": value for name, value in state.items()},
    lambda state: {name.replace("features.", "features.module."): value for name, value in state.items()},
    lambda state: {name.replace("classifier.", "classifier._orig_mod."): value for name, value in state.items()},
    lambda state: {f"model.net.{name}": value for name, value in state.items()} | {"loss.weight": torch.ones(7)},
    lambda state: {"n_averaged": torch.tensor(9)} | {f"module.{name}": value for name, value in state.items()},
]
ENTRIES = [
    ("state_dict", lambda state: {"epoch": 9, "arch": "vgg13_bn", "state_dict": state, "optimizer": {"state": {}}}),
    ("model", lambda state: {"model": state, "args": None}),
    ("model_state_dict", lambda state: {"model_state_dict": state}),
    ("model_ema", lambda state: {"model": outline("B", classes=7, crop=32).state_dict(), "model_ema": state}),
    ("state_dict_ema", lambda state: {"state_dict": {"a": 1}, "state_dict_ema": state}),
    ("state_dict", lambda state: {"state_dict": state, "state_dict_ema": {"decay": 0.9}}),
    ("model.state_dict", lambda state: {"model": {"state_dict": state}}),
]


@pytest.mark.parametrize(("entry", "place"), [*(("", wrap) for wrap in WRAPS), *ENTRIES])
def test_state_dicts_as_other_trainers_save_them(entry, place):
    state = outline("B", classes=7, crop=32, batch_norm=True).state_dict()
    found, where = unwrapped(place(state))
    assert where == entry
    assert found.keys() == state.keys()
    assert all(found[name] is value for name, value in state.items())


@pytest.mark.parametrize(
    ("batch_norm", "place"), [(False, WRAPS[6]), (True, lambda state: {"state_dict_ema": WRAPS[0](state)})]
)
@pytest.mark.seconds
def test_timms_networks_give_equal_logits(batch_norm, place):
    """Whose FC6 is a convolution of 7×7, FC7 one of 1×1, and FC8 sees the mean of the one place that is left."""
    reference = torchvision_network("A", batch_norm)
    fc6, _, _, fc7, _, _, fc8 = reference.classifier
    theirs = {name: value for name, value in reference.state_dict().items() if name.startswith("features")}
    theirs |= {"pre_logits.fc1.weight": fc6.weight.view(4096, 512, 7, 7), "pre_logits.fc1.bias": fc6.bias}
    theirs |= {"pre_logits.fc2.weight": fc7.weight.view(4096, 4096, 1, 1), "pre_logits.fc2.bias": fc7.bias}
    theirs |= {"head.fc.weight": fc8.weight, "head.fc.bias": fc8.bias}
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        maps = reference.features(images)
        for layer in ("fc1", "fc2"):
            weight, bias = (theirs[f"pre_logits.{layer}.{what}"] for what in ("weight", "bias"))
            maps = torch.conv2d(maps, weight, bias).relu()
        expected = maps.mean((2, 3)) @ theirs["head.fc.weight"].T + theirs["head.fc.bias"]
        state, _ = unwrapped(place(theirs))
        assert describe(state) == ("A", batch_norm, 10, 224)
        model = outline("A", classes=10, batch_norm=batch_norm).eval()
        model.load_state_dict(state, assign=True)
        logits = model(images)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"features.0.weight": torch.ones(1), "pre_logits.fc1.weight": torch.ones(1)}, "it has no classifier.6.weight"),
        (torch.ones(2), "it holds a Tensor, not a state dict"),
        ([1], "it holds a list, not a state dict"),
        ({}, "not the weights of a VGG: it has no features.0.weight, classifier.0.weight, classifier.6.weight"),
        ({"features.0.weight": torch.ones(1)}, "not the weights of a VGG: its fully-connected layers are missing"),
        ({"features.0.weight": torch.ones(1), "classifier.0.weight": torch.ones(1)}, "it has no classifier.6.weight"),
        ({"epoch": 3, "state": {}}, "these are not the weights of a VGG: epoch is not a tensor"),
        ({"module.a": torch.ones(1), "a": torch.ones(1)}, "it holds a twice, once wrapped by another module"),
        (
            {"pre_logits.fc1.weight": torch.ones(1), "classifier.0.weight": torch.ones(1)},
            "it holds classifier.0.weight twice, once under timm's name",
        ),
        (
            {"student.features.0.weight": torch.ones(1), "teacher.features.0.weight": torch.ones(1)},
            r"it holds 2 networks \(student\., teacher\.\); save one of them",
        ),
        (
            {**outline("D", classes=7, crop=32).state_dict(), "classifier.3.bias": torch.ones(3)},
            "they differ from those of D for 32 pixels in classifier.3.bias$",
        ),
    ],
)
def test_what_is_wrong_with_other_files_is_said_truly(content, sentence):
    with pytest.raises(ValueError, match=sentence):
        unwrapped(content)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_other_precisions_are_kept_in_float32(dtype):
    """The folded first convolution too: in 16 bits it would be rounded a second time."""
    weight = torch.randn(64, 3, 3, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    stds = TORCHVISION_STD_RGB, NOT_DIVIDED
    folded = for_std(
        as_float32({"features.0.weight": weight, "features.1.num_batches_tracked": torch.tensor(3)}), *stds
    )
    exact = weight.double() / (255 * torch.tensor(TORCHVISION_STD, dtype=torch.float64).view(1, 3, 1, 1))
    assert folded["features.0.weight"].dtype == torch.float32
    torch.testing.assert_close(folded["features.0.weight"].double(), exact, rtol=1.2e-7, atol=0)
    directly = for_std({"features.0.weight": weight}, *stds)["features.0.weight"]
    torch.testing.assert_close(directly.double(), exact, rtol=1.2e-7, atol=0)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("classifier.6.bias", torch.tensor([1.0, torch.nan]), "classifier.6.bias holds values that are not finite"),
        (
            "features.1.running_var",
            torch.tensor([torch.inf]),
            "features.1.running_var holds values that are not finite",
        ),
        ("a", torch.tensor([torch.inf, -torch.inf]), "a holds values that are not finite"),
        ("a", torch.tensor([1e300], dtype=torch.float64), "a holds values beyond float32's largest"),
        ("a", torch.ones(2, dtype=torch.int8), "a holds int8, not floating-point numbers"),
        ("a", torch.ones(2, dtype=torch.complex64), "a holds complex64, not floating-point numbers"),
        ("a", torch.eye(2).to_sparse(), "a is sparse, quantised or without values"),
        ("a", torch.ones(2, device="meta"), "a is sparse, quantised or without values"),
    ],
)
def test_tensors_that_cannot_be_weights_are_named(name, value, sentence):
    with pytest.raises(ValueError, match=f"its tensor {sentence}"):
        as_float32({"b": torch.ones(1), name: value})


def test_large_numbers_are_finite_though_their_sum_is_not():
    as_float32({"a": torch.full((3,), 3e38)})


def test_without_its_last_layer_a_network_is_copied_but_for_that():
    source, model = small("A"), small("A", seed=1)
    last = {name: weight.clone() for name, weight in model.state_dict().items() if name.startswith("classifier.6")}
    assert load_all(model, source.state_dict(), last=False) is True
    assert not any(name.startswith("classifier.6") for name in initialise_from(model, source.state_dict(), last=False))
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, last[name] if name in last else source.state_dict()[name])
