"""python -m pipeline.prepare SRC DST --short-side 256: resize a data set once and pack it into shards, for --data DST."""

if __name__ == "__main__":  # before the other imports: Ctrl-C ends them in a line, too
    from common.start import begin

    begin()

from common.process import end
from pipeline.preparation.packing import main

if __name__ == "__main__":
    end(main)
