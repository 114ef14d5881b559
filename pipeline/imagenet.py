"""python -m pipeline.imagenet TARS DATA: unpack ImageNet's official tar files into a data folder."""

if __name__ == "__main__":  # before the other imports: Ctrl-C ends them in a line, too
    from common.start import begin

    begin()

from common.process import end
from pipeline.preparation.imagenet import main

if __name__ == "__main__":
    end(main)
