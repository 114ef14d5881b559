"""python profile/sweep.py --csv FILE --program train.py [--ranks N] FLAGS: one run of a sweep, and its row in the CSV file.

The scripts in sweeps/ call this once for each point of their grid. A run whose row is there is skipped; one that fails has
a row that says why. FLAGS are the program's own, --out apart: each run has a folder of its own beside the CSV file.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    from common.start import begin

    begin()  # before the other imports: Ctrl-C ends them in a line, too

    from common.process import end
    from perf.sweep import main

    end(main)
