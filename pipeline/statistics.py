"""python -m pipeline.statistics DATA: mean and covariance of a data set's RGB values, for training on it."""

if __name__ == "__main__":  # before the other imports: Ctrl-C ends them in a line, too
    from common.start import begin

    begin()

from common.process import end
from pipeline.preparation.statistics import main

if __name__ == "__main__":
    end(main)
