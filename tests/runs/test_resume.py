"""A run resumed from any of its steps is the uninterrupted one."""

import random
import shutil

import pytest

import train
from engine.checkpoint import load
from tests.support.images import photo_folder
from tests.support.launch import assert_same_weights

STEPS = 30


@pytest.mark.slow
def test_resumed_from_each_of_20_random_steps_it_is_bit_identical(tmp_path):
    """In the middle of an epoch and at its end, with dropout and augmentation; six epochs of five steps."""
    data = photo_folder(tmp_path / "data", train=60, val=10)
    flags = ["--arch", "A", "--data", str(data), "--crop", "32", "--train-scale", "32-64", "--batch-size", "12"]
    flags += ["--schedule", "step", "--step-epochs", "2", "--lr", "0.001", "--steps", str(STEPS)]
    whole = tmp_path / "whole"
    every_step = ["--checkpoint-minutes", "0", "--keep", str(STEPS)]
    assert train.main([*flags, *every_step, "--out", str(whole)]) == 0
    again = tmp_path / "again"
    for step in random.sample(range(1, STEPS), 20):
        assert train.main([*flags, "--out", str(again), "--resume", str(whole / f"step-{step:08}.pt")]) == 0
        assert_same_weights(whole / "last.pt", again / "last.pt")
        assert load(again / "last.pt").history == load(whole / "last.pt").history
        shutil.rmtree(again)  # else each run would be moved aside for the next: 8 GB in all
