"""GPUs as their vendors describe them."""

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Card:
    """A GPU as its vendor describes it. Rates are dense (without sparsity) and at the boost clock; 16-bit products are
    accumulated in float32, as PyTorch has them done. None: the GPU has it not, or no document was at hand that says so."""

    name: str
    """Short, for --gpu."""
    reported_as: tuple[str, ...]
    """What the driver calls it (torch.cuda.get_device_name, nvmlDeviceGetName)."""
    fp32: float
    """TFLOP/s without tensor cores."""
    tf32: float | None
    """TFLOP/s."""
    bf16: float | None
    """TFLOP/s."""
    fp16: float
    """TFLOP/s."""
    memory: float
    """GB/s."""
    pcie: float
    """GB/s in each direction: 16 lanes of generation 3, 4 or 5 at 8, 16 or 32 GT/s, 128 of 130 bits of which are data."""
    nvlink: float | None = None
    """GB/s in each direction, all links of the GPU together (Infinity Fabric on AMD's)."""
    nvlink_gpus: int = 1
    """GPUs that are joined so: 2 by a bridge, 8 on a board."""
    watts: float
    """Power limit."""

    def bytes_per_second_to_peers(self, gpus: int) -> float:
        """In each direction, among so many GPUs of a machine: NVLink where it joins them all, PCIe otherwise."""
        rate = self.nvlink if self.nvlink and gpus <= self.nvlink_gpus else self.pcie
        return rate * 1e9


_PCIE_3, _PCIE_4, _PCIE_5 = 15.75, 31.5, 63.0

CARDS = (
    # NVIDIA V100 datasheet (volta-v100-datasheet-update-us-1165301-r5); NVLink: Volta architecture white paper, six links
    # of 25 GB/s in each direction. Volta has neither TF32 nor bf16.
    Card(
        name="V100",
        reported_as=("Tesla V100-SXM2-16GB", "Tesla V100-SXM2-32GB"),
        fp32=15.7, tf32=None, bf16=None, fp16=125, memory=900, pcie=_PCIE_3, nvlink=150, nvlink_gpus=8, watts=300,
    ),
    Card(
        name="V100-PCIe",
        reported_as=("Tesla V100-PCIE-16GB", "Tesla V100-PCIE-32GB"),
        fp32=14, tf32=None, bf16=None, fp16=112, memory=900, pcie=_PCIE_3, watts=250,
    ),
    # NVIDIA T4 datasheet (t4-tensor-core-datasheet-951643). Memory: 256 bits at 10 Gbit/s.
    Card(
        name="T4",
        reported_as=("Tesla T4",),
        fp32=8.1, tf32=None, bf16=None, fp16=65, memory=320, pcie=_PCIE_3, watts=70,
    ),
    # NVIDIA A100 datasheet (nvidia-a100-datasheet-us-nvidia-1758950-r4).
    Card(
        name="A100-40GB",
        reported_as=("NVIDIA A100-SXM4-40GB",),
        fp32=19.5, tf32=156, bf16=312, fp16=312, memory=1555, pcie=_PCIE_4, nvlink=300, nvlink_gpus=8, watts=400,
    ),
    Card(
        name="A100-80GB",
        reported_as=("NVIDIA A100-SXM4-80GB",),
        fp32=19.5, tf32=156, bf16=312, fp16=312, memory=2039, pcie=_PCIE_4, nvlink=300, nvlink_gpus=8, watts=400,
    ),
    Card(
        name="A100-PCIe-40GB",
        reported_as=("NVIDIA A100-PCIE-40GB",),
        fp32=19.5, tf32=156, bf16=312, fp16=312, memory=1555, pcie=_PCIE_4, nvlink=300, nvlink_gpus=2, watts=250,
    ),
    Card(
        name="A100-PCIe-80GB",
        reported_as=("NVIDIA A100 80GB PCIe",),
        fp32=19.5, tf32=156, bf16=312, fp16=312, memory=1935, pcie=_PCIE_4, nvlink=300, nvlink_gpus=2, watts=300,
    ),
    # NVIDIA A10 datasheet. (The A10G of AWS is another GPU.)
    Card(
        name="A10",
        reported_as=("NVIDIA A10",),
        fp32=31.2, tf32=62.5, bf16=125, fp16=125, memory=600, pcie=_PCIE_4, watts=150,
    ),
    # NVIDIA L4 datasheet; it gives the tensor cores' rates with sparsity, halved here.
    Card(
        name="L4",
        reported_as=("NVIDIA L4",),
        fp32=30.3, tf32=60, bf16=121, fp16=121, memory=300, pcie=_PCIE_4, watts=72,
    ),
    # NVIDIA L40S datasheet.
    Card(
        name="L40S",
        reported_as=("NVIDIA L40S",),
        fp32=91.6, tf32=183, bf16=362.05, fp16=362.05, memory=864, pcie=_PCIE_4, watts=350,
    ),
    # NVIDIA H100 Tensor Core GPU Architecture, white paper V1.04, tables 1 and 3; memory, NVLink: H100 datasheet.
    Card(
        name="H100",
        reported_as=("NVIDIA H100 80GB HBM3",),
        fp32=66.9, tf32=494.7, bf16=989.4, fp16=989.4, memory=3350, pcie=_PCIE_5, nvlink=450, nvlink_gpus=8, watts=700,
    ),
    Card(
        name="H100-PCIe",
        reported_as=("NVIDIA H100 PCIe",),
        fp32=51, tf32=378, bf16=756, fp16=756, memory=2000, pcie=_PCIE_5, nvlink=300, nvlink_gpus=2, watts=350,
    ),
    # NVIDIA H200 datasheet: the H100's processor with other memory.
    Card(
        name="H200",
        reported_as=("NVIDIA H200",),
        fp32=66.9, tf32=494.7, bf16=989.4, fp16=989.4, memory=4800, pcie=_PCIE_5, nvlink=450, nvlink_gpus=8, watts=700,
    ),
    # NVIDIA Blackwell datasheet (blackwell-datasheet-3384703), column HGX B200; rates with sparsity, halved here. TF32 is
    # half of bf16, which the datasheet rounds down.
    Card(
        name="B200",
        reported_as=("NVIDIA B200",),
        fp32=75, tf32=1125, bf16=2250, fp16=2250, memory=7700, pcie=_PCIE_5, nvlink=900, nvlink_gpus=8, watts=1000,
    ),
    # NVIDIA Ampere GA102 GPU Architecture, white paper V2, appendix A; tensor cores: RTX Blackwell white paper, table 3. On
    # GeForce cards, 16-bit products accumulated in float32 go at half the rate of those accumulated in float16.
    Card(
        name="RTX 3090",
        reported_as=("NVIDIA GeForce RTX 3090",),
        fp32=35.6, tf32=35.6, bf16=71.2, fp16=71.2, memory=936, pcie=_PCIE_4, nvlink=56.25, nvlink_gpus=2, watts=350,
    ),
    # NVIDIA Ada GPU Architecture, white paper, appendix A.
    Card(
        name="RTX 4090",
        reported_as=("NVIDIA GeForce RTX 4090",),
        fp32=82.6, tf32=82.6, bf16=165.2, fp16=165.2, memory=1008, pcie=_PCIE_4, watts=450,
    ),
    # NVIDIA RTX Blackwell GPU Architecture, white paper V1.1, table 3.
    Card(
        name="RTX 5090",
        reported_as=("NVIDIA GeForce RTX 5090",),
        fp32=104.8, tf32=None, bf16=209.5, fp16=209.5, memory=1792, pcie=_PCIE_5, watts=575,
    ),
    # AMD Instinct MI300X data sheet; seven Infinity Fabric links of 64 GB/s in each direction.
    Card(
        name="MI300X",
        reported_as=("AMD Instinct MI300X", "AMD Instinct MI300X VF"),
        fp32=163.4, tf32=653.7, bf16=1307.4, fp16=1307.4, memory=5300, pcie=_PCIE_5, nvlink=448, nvlink_gpus=8, watts=750,
    ),
)  # fmt: skip


def find_card(name: str) -> Card | None:
    """The card of that name, the short one or the driver's; None for one that is not in the table.

    Names must agree to the last letter, but for case, spaces and dashes: an H100 NVL, an A10G, an RTX 4090 Laptop GPU and a
    slice of a GPU (… MIG 1g.10gb) are other devices than those they are named after.
    """
    wanted = _plain(name)
    return next((card for card in CARDS if wanted in map(_plain, (card.name, *card.reported_as))), None)


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).lower()
