"""Dropout that does not depend on how a batch is shared out: its masks are a function of (seed, sample, unit)."""

import hashlib

import torch
from torch import Tensor, nn

_WORD = 0xFFFFFFFF


class Dropout(nn.Dropout):
    """Dropout (Srivastava et al. 2014) in which an image's mask depends on its number in the training, and on nothing else.

    So a training is the same, up to rounding, on any number of ranks, in passes of any size, and however its units are shared
    among the ranks. Until number_samples() is called, masks come from torch's random generator, as those of nn.Dropout.

    A mask costs some ten integer operations an activation, which torch.compile makes one kernel of. torch's own generator
    cannot be used so: it hands out numbers in the order in which threads ask.
    """

    first_sample: Tensor
    """int64 []: the number of the first row's sample, on the activations' device. To be set by at_sample() before each pass."""

    def number_samples(
        self,
        key: str,
        *,
        device: torch.device,
        ranks: int = 1,
        rank: int = 0,
        share: int = 0,
        units: int | None = None,
    ) -> None:
        """From now on, draw masks by numbers of samples. key: of the training and the layer; another one, other masks.

        device: of the activations. ranks, rank: of those whose rows are in one batch, each rank's together in the order of the
        ranks, and this one's place among them. share: samples between two ranks' first ones. units: how many there are of which
        this layer has the `rank`-th part; None: it has all.
        """
        digest = hashlib.blake2b(key.encode(), digest_size=12).digest()
        self._keys = [int.from_bytes(digest[at : at + 4], "little") for at in (0, 4, 8)]
        self._ranks, self._share = ranks, share
        self._samples_before = rank * share
        self._first_unit = rank * (units // ranks) if units else 0
        self.register_buffer("first_sample", torch.zeros((), dtype=torch.int64, device=device), persistent=False)

    def at_sample(self, number: int) -> None:
        """The next pass begins with this sample, of this rank. Nothing waits for the device."""
        if self._is_numbered:
            self.first_sample.fill_(number - self._samples_before)

    @property
    def _is_numbered(self) -> bool:
        return "first_sample" in self._buffers

    def forward(self, x: Tensor) -> Tensor:
        """x: [n, units]. Each activation is dropped with probability p, or multiplied by 1 / (1 - p)."""
        if not (self.training and self.p) or not self._is_numbered:
            return super().forward(x)
        return x * (self._kept(x).to(x.dtype) * (1 / (1 - self.p)))

    def _kept(self, x: Tensor) -> Tensor:
        """bool [n, units]: 32 random bits of each activation, compared with p."""
        images, units = (torch.arange(size, device=x.device) for size in x.shape)
        images_a_rank = len(images) // self._ranks
        numbers = self.first_sample + images // images_a_rank * self._share + images % images_a_rank
        low, high, unit = self._keys
        words = _mixed(_mixed(numbers & _WORD ^ low) ^ numbers >> 32 ^ high)
        units = _mixed(units + self._first_unit ^ unit)
        return _mixed(words[:, None] ^ units) >= round(self.p * 2**32)


def _mixed(words: Tensor) -> Tensor:
    """A bijection of the numbers of 32 bits in which every bit of the result depends on all of the argument's (the two
    multiply and xor-shift rounds of MurmurHash3's finaliser, with Chris Wellons's constants of the least bias:
    github.com/skeeto/hash-prospector). int64, in which no product overflows, since the constants have 31 bits."""
    words = (words ^ words >> 16) * 0x21F0AAAD & _WORD
    words = (words ^ words >> 15) * 0x735A2D97 & _WORD
    return words ^ words >> 15
