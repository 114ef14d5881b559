"""python -m pipeline.manifest DATA [--rescan] [--verify decode]: the memory-mapped table of a data set's images."""

if __name__ == "__main__":  # before the other imports: Ctrl-C ends them in a line, too
    from common.start import begin

    begin()

from common.process import end
from pipeline.dataset.manifest import main

if __name__ == "__main__":
    end(main)
