"""python -m pipeline.manifest DATA [--rescan] [--verify decode]: the memory-mapped table of a data set's images.

DATA is a folder in torchvision's ImageFolder form, DATA/train/<class>/* and DATA/val/<class>/*. It is scanned once; the
result is kept in DATA/.vgg-manifest or, where DATA cannot be written, in the user's cache folder:

    manifest.json        classes, fingerprint, the folders' modification times; names the two tables; written last
    train-….npy, val-….npy   one row an image (pipeline/dataset/scan.py), memory-mapped, shared by all ranks
    quarantine.tsv       files left out, each with the reason

The next start costs one stat per folder, whatever the number of images. A file overwritten in place does not change its
folder's time: then ask for --rescan. Where the manifest's own files are not as they were written, it is made anew.

The scan reads headers, and leaves out the kinds of files that are not decoded to the right pixels (pipeline/dataset/headers.py).
--verify decode also decodes every image, once, and leaves out those that fail (pipeline/preparation/verify.py).
"""

import hashlib
import json
import os
from pathlib import Path

from common.errors import UserError
from common.files import cache_folder
from common.flags import FlagParser
from common.process import run_program
from common.progress import say
from pipeline.dataset.manifest_files import QUARANTINE, Manifest, find_manifest, load_manifest, write_manifest
from pipeline.dataset.overview import print_table, results
from pipeline.dataset.scan import Scan, check_layout, scan

_FOLDER_NAME = ".vgg-manifest"


def open_manifest(root: Path, *, rescan: bool = False) -> Manifest:
    """Open the manifest of a data folder; scan the folder first where there is none, or where the folder changed.

    Raises UserError: no such folder, no train/ or val/, classes that differ, a class without a readable image.
    """
    root = Path(root)
    check_layout(root)
    manifest = None if rescan else _find_current(root)
    if manifest is None:
        manifest = load_manifest(root, _write_somewhere(root, scan(root)))
    if manifest.quarantined:
        lost = f" ({manifest.val_lost:,} images of val among them count as wrong)" if manifest.val_lost else ""
        say(
            f"{manifest.quarantined:,} files cannot be decoded and are left out{lost}: see "
            f"{manifest.folder / QUARANTINE}"
        )
    return manifest


def _possible_folders(root: Path) -> list[Path]:
    name = hashlib.blake2b(os.fsencode(os.path.realpath(root)), digest_size=8).hexdigest()
    beside_images, cached = root / _FOLDER_NAME, cache_folder() / "manifests" / name
    # Through a link, files of somebody else would be replaced.
    return [cached] if beside_images.is_symlink() else [beside_images, cached]


def _find_current(root: Path) -> Manifest | None:
    found = (find_manifest(root, folder, check_changes=True) for folder in _possible_folders(root))
    return next(filter(None, found), None)


def _write_somewhere(root: Path, found: Scan) -> Path:
    """Write the manifest into the first possible folder that can be written; return that folder."""
    problems = []
    for folder in _possible_folders(root):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_manifest(folder, found, verified=False)
            return folder
        except OSError as error:
            problems.append(f"{folder} ({error.strerror})")
    raise UserError(
        f"no place for the manifest of {root}: cannot write {' nor '.join(problems)}; set XDG_CACHE_HOME to a folder of yours"
    )


# ---- command line ------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    def work() -> int:
        parser = FlagParser(
            prog="python -m pipeline.manifest", description="Scan a data folder, check its images, print a summary."
        )
        parser.add_argument("data", type=Path, help="folder with train/<class>/* and val/<class>/*")
        parser.add_argument("--rescan", action="store_true", help="scan even if no folder changed since the last scan")
        parser.add_argument(
            "--verify",
            choices=["decode"],
            help="decode every image once and leave out those that fail; after an interruption, the same command continues",
        )
        arguments = parser.parse_args(argv)
        manifest = open_manifest(arguments.data, rescan=arguments.rescan)
        if arguments.verify:
            from pipeline.preparation.verify import verify  # here, because DALI takes long to import

            manifest = verify(manifest)
        summary = results(manifest)
        print_table(summary)
        print(json.dumps(summary))
        return 0

    return run_program(work)
