"""python profile/nvml_sampler.py [--interval-ms 100] [--out FILE.json] -- COMMAND…: what the GPUs do while a command runs.

COMMAND runs as it would without this: same stdin, stdout and stderr, its exit code is passed on, and the signals that ask a
program to stop reach it. The GPUs are those that CUDA_VISIBLE_DEVICES leaves it. Afterwards there is a table on stderr, and
the report as one line of JSON, last on stdout or in FILE.json. Without a driver the report says so. perf/telemetry.py has the
same for Python.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    from common.start import begin

    begin()  # before the other imports: Ctrl-C ends them in a line, too

    from common.process import end
    from perf.nvml_sampler import main

    end(main)
