"""python -m pipeline.manifest DATA [--rescan] [--verify decode]: scan a data folder, check its images, print a summary."""

if __name__ == "__main__":  # before the other imports: Ctrl-C ends them in a line, too
    from common.start import begin

    begin()

import json
from pathlib import Path

from common.flags import FlagParser
from common.process import end, run_program
from pipeline.dataset.manifest import open_manifest
from pipeline.dataset.overview import print_table, results


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


if __name__ == "__main__":
    end(main)
