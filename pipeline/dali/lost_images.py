"""Images of a data set that turn out, while they are loaded, not to be decodable: warned of, listed, and counted."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import TrainingError
from common.progress import printable, say, say_once
from common.ranks import Ranks, union_over_ranks
from pipeline.dataset.headers import read_header
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.quarantine import QUARANTINE, add_to_quarantine
from pipeline.dataset.table import FileTable
from pipeline.plan.samples import Samples
from pipeline.shards.index import Prepared
from pipeline.shards.shard_table import ShardTable


@dataclass(frozen=True, kw_only=True)
class LostImages:
    """Those of one split that this rank has found; other ranks find others."""

    manifest: Manifest | Prepared
    split: str
    """train or val."""
    max_bad_images: int | None
    """As --max-bad-images."""
    rows: set[int] = field(default_factory=set)
    """Of the split's table, of images that cannot be decoded, or not everywhere."""

    @property
    def table(self) -> FileTable | ShardTable:
        return self.manifest.train if self.split == "train" else self.manifest.val

    @property
    def limit(self) -> int:
        """Images that may be lost before the run ends; one at least must be left."""
        images = len(self.table)
        limit = math.ceil(images / 1000) if self.max_bad_images is None else self.max_bad_images
        return min(limit, images - 1)

    def add(self, samples: Samples, reasons: list[str]) -> None:
        """Warn of each file once, and add it to the quarantine. Raises TrainingError where it is one too many."""
        news = {}
        for index, (row, reason) in enumerate(zip(samples.rows.tolist(), reasons, strict=True)):
            if row not in self.rows:
                self.rows.add(row)
                name = self.table.name(samples.source[index])
                if isinstance(self.table, FileTable):  # "empty file" says more than the decoder does
                    reason = read_header(Path(name)).reason or reason
                news[name] = reason
        for name, reason in news.items():
            say(f"warning: {printable(name)} cannot be decoded ({reason}); going on without it")
        folder = self.manifest.folder
        try:
            add_to_quarantine(folder, self.manifest.root, news)
        except OSError as error:
            say_once(f"warning: {folder / QUARANTINE} cannot be added to ({error.strerror})")
        self.check(len(self.rows))

    def of_all_ranks(self, ranks: Ranks) -> int:
        """How many are lost; what several ranks have found counts once. Every rank must call this."""
        return len(union_over_ranks(self.rows, ranks))

    def check(self, lost: int) -> None:
        """Raise TrainingError where so many are more than may be lost."""
        if lost > self.limit:
            raise TrainingError(
                f"{lost} images cannot be decoded, more than the {self.limit} that --max-bad-images allows; they were named "
                f"above, and are listed in {self.manifest.folder / QUARANTINE} where that can be written"
            )
