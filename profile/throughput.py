"""python profile/throughput.py [flags of train.py] [--seconds 12] [--trace] [--out DIR]: what limits a run, and what to change.

Measures in one process, with the trainer's own loader and step: reading, decoding and the loader alone; the step alone on a
batch that stays on the device, part by part; and both together, as in training. Compares them with each other and with the
hardware's limit, and says what the bottleneck is. The same under torchrun, for all ranks together.

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
