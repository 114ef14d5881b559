"""python -m engine.compare_runs RUN RUN… [--out comparison.png]: a table of several runs and their curves in one picture."""

if __name__ == "__main__":  # before the other imports: Ctrl-C ends them in a line, too
    from common.start import begin

    begin()

from common.process import end
from engine.monitoring.compare_runs import main

if __name__ == "__main__":
    end(main)
