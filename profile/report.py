"""python profile/report.py REPORT.json [--out DIR]: the table, report.html and the pictures of a measured run.

python profile/report.py A.json B.json: two runs against each other, a table and comparison.png. Both read the report.json that
profile/throughput.py writes, and write into its folder (B's) unless --out names another.

python profile/report.py SWEEP.csv: the table and the plots of a sweep, by the columns that vary in it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    from common.start import begin

    begin()  # before the other imports: Ctrl-C ends them in a line, too

    from common.process import end
    from perf.show import main

    end(main)
