"""The GPU that the tests use: the first of those that CUDA_VISIBLE_DEVICES leaves."""

import torch

DEVICE = torch.device("cuda", 0)
