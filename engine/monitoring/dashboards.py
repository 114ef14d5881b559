"""Where a run's figures and pictures can be followed: TensorBoard always, Weights & Biases where it is asked for."""

import threading
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from common.errors import UserError
from common.files import replacing
from common.progress import printable
from engine.config import Config, to_dict

_WANDB_ID = "wandb-id"


class TensorBoard:
    """Event files in OUT/tensorboard, for: tensorboard --logdir runs."""

    NAME = "TensorBoard's log"

    def __init__(self, config: Config, steps_done: int) -> None:
        """Events after steps_done, of a run that did not come to save them, are hidden. The configuration is a text."""
        # Its thread raises what our next call gets too: once is enough.
        self._excepthook = threading.excepthook
        threading.excepthook = self._unless_it_is_the_writer
        self._writer = SummaryWriter(str(config.out / "tensorboard"), purge_step=steps_done + 1)
        flags = {name: printable(str(value)) for name, value in to_dict(config).items() if value is not None}
        rows = "\n".join(f"| {name} | {value} |" for name, value in flags.items())
        self._writer.add_text("configuration", f"| flag | value |\n|---|---|\n{rows}", steps_done)

    def scalars(self, step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """picture: uint8 [height, width, 3]."""
        self._writer.add_image(name, picture, step, dataformats="HWC")

    def close(self, *, failed: bool) -> None:
        try:
            self._writer.close()
        finally:
            threading.excepthook = self._excepthook

    def _unless_it_is_the_writer(self, raised: threading.ExceptHookArgs) -> None:
        if not type(raised.thread).__module__.startswith("tensorboard."):
            self._excepthook(raised)


class WandB:
    """A run of Weights & Biases; OUT/wandb-id keeps its id, so that a resumed run goes on in the same one."""

    NAME = "the log of Weights & Biases"

    def __init__(self, config: Config) -> None:
        """Raises UserError where wandb cannot start: no key, no network."""
        import wandb

        self._wandb, id_file = wandb, config.out / _WANDB_ID
        try:
            self._run = wandb.init(
                dir=str(config.out),
                name=printable(str(config.out)),
                id=_read(id_file),
                resume="allow",
                config={name: printable(v) if isinstance(v, str) else v for name, v in to_dict(config).items()},
            )
            with replacing(id_file) as file:
                file.write(self._run.id.encode())
        except Exception as error:  # whatever it, its server or the disk says
            raise UserError(
                f"--wandb: it cannot start ({' '.join(str(error).split())}); run wandb login, set WANDB_MODE=offline, or leave "
                "--wandb out"
            ) from error
        # Its own step never goes back, ours does where a run is resumed from its last checkpoint.
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, figures: dict[str, float]) -> None:
        self._run.log({"step": step, **figures})

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """picture: uint8 [height, width, 3]."""
        self._run.log({"step": step, name: self._wandb.Image(picture)})

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _read(path: Path) -> str | None:
    return path.read_text().strip() if path.exists() else None
