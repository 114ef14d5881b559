"""python profile/throughput.py [flags of train.py] [--seconds 12] [--trace] [--out DIR]: what limits a run, and what to change.

Measures reading, decoding, the loader, the step and training, one after the other, with the trainer's own objects. The same
under torchrun, for all ranks together.

Writes report.json, report.html and pictures into DIR, by default a new folder in runs/profile. docs/profiling.md says what
each figure is. With --tune it searches for faster settings instead, and writes a recipe (perf/tuning.py).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    from common.start import begin

    begin()  # before the other imports: Ctrl-C ends them in a line, too

    from common.process import end
    from perf.throughput import main

    end(main)
