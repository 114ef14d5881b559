"""What the tests have a process of trials do, instead of measuring; in a module of its own, since it is found by its name."""

import os
import signal
import time

from common.errors import UserError
from perf.trials import Outcome


def serve(connection, config, limits) -> None:
    while True:
        stage, *_ = connection.recv()
        if stage == "sleep":
            time.sleep(60)
        if stage == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if stage == "fail":
            connection.send(Outcome(failure="as it was told"))
        elif stage == "refuse":
            connection.send(UserError("a mistake of the user's"))
        else:
            connection.send(Outcome(images_per_second=float(os.getpid())))
