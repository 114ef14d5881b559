"""What a run of tests/support/programs/recording_worker.py, however often it was interrupted, has trained on."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

Image = tuple[int, int]
"""Row of the table that was shown, checksum of its pixels."""


@dataclass(frozen=True)
class Used:
    """The images of a run by their numbers in the plan."""

    images: dict[int, Image]
    """Of the steps that count: those of the last start that made them, since each start goes on from a checkpoint."""
    starts: int
    world_sizes: list[int]
    """Of the starts, in order."""
    repeated_steps: int
    """Steps that were begun more than once."""
    seen: dict[int, set[Image]]
    """All that a number showed, in steps that were repeated too: one image, if all is well."""

    @property
    def differing(self) -> dict[int, set[Image]]:
        return {number: images for number, images in self.seen.items() if len(images) > 1}

    def rows(self, epoch: int, size: int) -> Counter:
        """Row → how often it was used in an epoch of so many images."""
        return Counter(self.images[number][0] for number in range(epoch * size, (epoch + 1) * size))


def read_used(out: Path, batch_size: int) -> Used:
    """Raises AssertionError where a step that counts is not complete: ranks that together used other images than its own."""
    starts: dict[tuple[int, int], dict[int, dict[int, Image]]] = {}
    for path in (out / "used").glob("*.jsonl"):
        began, _, _, world_size = path.stem.split("-")
        steps = starts.setdefault((int(began), int(world_size)), {})
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # cut by a kill
            shown = zip(entry["rows"], entry["pixels"], strict=True)
            steps.setdefault(entry["step"], {}).update(zip(entry["numbers"], shown, strict=True))
    images: dict[int, Image] = {}
    seen: dict[int, set[Image]] = {}
    last_made: dict[int, dict[int, Image]] = {}
    repeated = set()
    for _, steps in sorted(starts.items()):
        for step, batch in steps.items():
            if step in last_made:
                repeated.add(step)
            last_made[step] = batch
            images.update(batch)
            for number, image in batch.items():
                seen.setdefault(number, set()).add(image)
    for step, batch in last_made.items():
        assert sorted(batch) == list(range(step * batch_size, (step + 1) * batch_size)), f"step {step}: {sorted(batch)}"
    assert sorted(last_made) == list(range(len(last_made))), "a step is missing"
    return Used(images, len(starts), [size for _, size in sorted(starts)], len(repeated), seen)
