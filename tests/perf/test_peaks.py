"""Names find their card and no other; measured peaks are not below what the same machine does beside them."""

from time import perf_counter

import pytest
import torch

from perf import peaks
from perf.peaks import CARDS, find_card, measure_peaks, peaks_here, peaks_of
from perf.report import Peaks

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100-PCIe-40GB"),
        ("NVIDIA A100 80GB PCIe", "A100-PCIe-80GB"),
        ("Tesla V100-SXM2-16GB", "V100"),
        ("Tesla V100-PCIE-32GB", "V100-PCIe"),
        ("Tesla T4", "T4"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L40", "L40"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA A30", "A30"),
        ("NVIDIA A40", "A40"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200 NVL", "H200 NVL"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 5090", "RTX 5090"),
        ("AMD Instinct MI300X", "MI300X"),
        ("h100", "H100"),
        ("rtx4090", "RTX 4090"),
        ("a100-80gb", "A100-80GB"),
    ],
)
def test_a_name_finds_its_card(name, card):
    found = find_card(name)
    assert found is not None
    assert found.name == card


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A10M",
        "NVIDIA L40G",
        "NVIDIA H800 NVL",
        "NVIDIA GH200 144G HBM3e",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "Tesla V100S-PCIE-32GB",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 3090 Ti",
        "A100",
        "",
    ],
)
def test_another_device_is_not_taken_for_its_namesake(name):
    assert find_card(name) is None
    assert peaks_of(name, "fp32") is None


def test_names_are_unique():
    names = [name for card in CARDS for name in (card.name, *card.reported_as)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_rates_are_plausible(card):
    """Figures of sparse products, or of accumulation in float16, would stand out by a factor of two."""
    if card.bf16_tflops:
        assert card.bf16_tflops == card.fp16_tflops
    if card.tf32_tflops:
        assert card.bf16_tflops / card.tf32_tflops == pytest.approx(2, rel=0.02)
    if "RTX" in card.name or card.name in ("A10G", "L40"):
        assert card.fp16_tflops / card.fp32_tflops == pytest.approx(2, rel=0.01)
    assert 20 < card.fp16_tflops * 1e3 / card.memory_gbytes_per_second < 450, "FLOP a byte"
    assert (card.nvlink_gbytes_per_second is None) == (card.nvlink_gpus == 1)
    assert card.pcie_gbytes_per_second in (15.75, 31.5, 63)
    assert "NVIDIA" in card.source or "AMD" in card.source


def test_switches_that_add_up():
    """NVSwitch of the third generation came with the H100; bridges and the A100's switches only pass on."""
    assert {card.name for card in CARDS if card.in_switch} == {"H100", "H200", "B200", "GB200"}


def test_peaks_of_a_precision():
    assert peaks_of("NVIDIA H100 80GB HBM3", "bf16") == Peaks(
        name="H100", source="table", flops_per_second=989.4e12, bytes_per_second=3.35e12, watts=700
    )
    h100, v100 = peaks_of("H100", "fp32"), peaks_of("V100", "fp32")
    assert h100 is not None
    assert v100 is not None
    assert (h100.flops_per_second, v100.flops_per_second) == (494.7e12, 15.7e12), "TF32 where there is one"
    assert peaks_of("V100", "bf16") is None
    gh200 = peaks_of("NVIDIA GH200 480GB", "bf16")
    assert gh200 is not None
    assert gh200.watts is None, "no document gives the GPU's own"


def test_gpus_of_a_machine_are_joined_by_nvlink_or_pcie():
    cards = {card.name: card for card in CARDS}
    assert cards["H100"].bytes_per_second_to_peers(8) == 450e9
    assert [cards["H100-PCIe"].bytes_per_second_to_peers(gpus) for gpus in (2, 4)] == [300e9, 63e9]
    assert [cards["H200 NVL"].bytes_per_second_to_peers(gpus) for gpus in (4, 8)] == [450e9, 63e9]
    assert cards["L4"].bytes_per_second_to_peers(2) == 31.5e9


def test_a_gpu_is_looked_up_and_otherwise_measured(monkeypatch):
    measured = Peaks(name="it", source="measured", flops_per_second=1.0, bytes_per_second=1.0, watts=None)
    monkeypatch.setattr(peaks, "measure_peaks", lambda device, precision: measured)
    for name, precision, source in (
        ("NVIDIA L4", "bf16", "table"),
        ("NVIDIA A10M", "bf16", "measured"),
        ("Tesla T4", "bf16", "measured"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peaks_here(torch.device("cuda", 0), precision).source == source
    assert peaks_here(CPU, "fp32") is measured


def best_rate(call, work: float) -> float:
    seconds = []
    for _ in range(5):
        began = perf_counter()
        call()
        seconds.append(perf_counter() - began)
    return work / min(seconds)


@pytest.mark.seconds
def test_measured_peaks_are_not_below_what_was_measured_beside_them(monkeypatch):
    monkeypatch.setattr(peaks, "_MEASURE_SECONDS", 0.2)
    matrix, values = torch.randn(1024, 1024), torch.ones(64 << 20)
    copy = torch.ones_like(values)
    for _ in range(4):  # others may be at work on this machine at one time and not at the other
        flops = best_rate(lambda: matrix @ matrix, 2 * 1024**3)
        rate = best_rate(lambda: copy.copy_(values), 2 * 4 * values.numel())
        found = measure_peaks(CPU, "fp32")
        if found.flops_per_second > 0.5 * flops and found.bytes_per_second > 0.5 * rate:
            break
    else:
        raise AssertionError((found, flops, rate))
    assert found.source == "measured"
    cores, cycles_per_second, flops_per_cycle = torch.get_num_threads(), 7e9, 128  # more than any core has
    assert found.flops_per_second < cores * cycles_per_second * flops_per_cycle
    assert found.bytes_per_second < 2e12
