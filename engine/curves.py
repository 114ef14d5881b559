"""python -m engine.curves RUN: draw RUN/curves.png from RUN/metrics.jsonl, also while the run goes on."""

if __name__ == "__main__":  # before the other imports: Ctrl-C ends them in a line, too
    from common.start import begin

    begin()

from common.process import end
from engine.monitoring.curves import main

if __name__ == "__main__":
    end(main)
