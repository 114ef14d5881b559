"""quarantine.tsv: the files of a data set that are left out, each with the reason."""

import hashlib
import os
from pathlib import Path
from typing import Any

from common.files import open_own, replacing
from common.progress import printable

QUARANTINE = "quarantine.tsv"


def add_to_quarantine(folder: Path, root: str | Path, reasons: dict[str, str]) -> None:
    """Append images of the data set `root` (names with reasons) that turned out not to be decodable to quarantine.tsv.

    Raises OSError where that cannot be written.
    """
    beginning = f"{root if '://' in str(root) else os.path.abspath(root)}/"
    lines = [f"{printable(name.removeprefix(beginning))}\t{printable(reason)}\n" for name, reason in reasons.items()]
    with os.fdopen(open_own(folder / QUARANTINE, os.O_WRONLY | os.O_APPEND), "ab") as file:
        file.write("".join(lines).encode())  # whole lines at once: other ranks append too


def read_quarantine(folder: Path) -> list[tuple[str, str]]:
    """Paths and reasons, both printable, in quarantine.tsv: first those of the manifest, then what runs have added.

    None of either where somebody has removed the file meanwhile.
    """
    try:
        lines = (folder / QUARANTINE).read_bytes().decode(errors="replace").split("\n")[1:-1]
    except FileNotFoundError:
        return []
    return [(path, reason) for path, _, reason in (line.partition("\t") for line in lines)]


def write_quarantine(folder: Path, quarantine: list[tuple[str, str]]) -> dict[str, Any]:
    """Write quarantine.tsv: paths and reasons, both printable. Returns what tells it again. Raises OSError."""
    content = "".join(f"{path}\t{reason}\n" for path, reason in [("path", "reason"), *quarantine]).encode()
    with replacing(folder / QUARANTINE) as file:
        file.write(content)
    return {"bytes": len(content), "digest": digest_of(content)}


def check_quarantine(folder: Path, written: dict[str, Any]) -> None:
    """Raise OSError or ValueError unless quarantine.tsv begins as it was written; runs append to it."""
    with open(folder / QUARANTINE, "rb") as file:
        own = file.read(written["bytes"])
    if digest_of(own) != written["digest"]:
        raise ValueError


def digest_of(content: bytes) -> str:
    """What tells a file of ours again."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()
