"""python profile/roofline.py --arch D --batch-size 256 --precision bf16 --gpu H100: the least time that a step can take.

From first principles: what a step computes and moves (costs.py), what the hardware does at most (peaks.py: a table of GPUs, or
measured here), and how long an all-reduce takes (scaling.py). With --step-seconds, how near a measured step comes to that.
And what more GPUs would do, each with the same batch, where the links between them are known: from the table, or named by flags.

There are two floors. Fused: bias, ReLU and dropout cost nothing. Unfused: each reads and writes its values, as in a step that is
not compiled. A step's time above the second is that of kernels below their rate, and of waiting.

A floor holds for direct convolutions whose activations do not stay in a cache from one layer to the next: on a batch so small
that they do, layers that the memory limits can be faster. Not counted: starting kernels, the loss, the data.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    from common.start import begin

    begin()  # before the other imports: Ctrl-C ends them in a line, too

    from common.process import end
    from perf.roofline import main

    end(main)
