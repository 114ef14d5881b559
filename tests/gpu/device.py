"""The GPU that the tests use: the first of those that CUDA_VISIBLE_DEVICES leaves."""

import torch

DEVICE = torch.device("cuda", 0)

DECODERS_DIFFER_BY = 5.5
"""Grey levels. A JPEG decoder's inverse DCT may be one off, in luma and in chroma, and so may be the chroma it interpolates.
Blue is luma and 1.772 times a chroma; both decoders round. Another way to interpolate is tens of levels off at edges."""
DECODERS_DIFFER_ON_AVERAGE_BY = 1.0
