"""Where a run's figures and pictures can be followed: TensorBoard always, Weights & Biases where it is asked for."""

from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from common.errors import UserError
from common.files import replacing
from engine.config import Config, to_dict

_WANDB_ID = "wandb-id"


class TensorBoard:
    """Event files in OUT/tensorboard, for: tensorboard --logdir runs."""

    def __init__(self, config: Config, steps_done: int) -> None:
        """Events after steps_done, of a run that did not come to save them, are hidden. The configuration is a text."""
        self._writer = SummaryWriter(str(config.out / "tensorboard"), purge_step=steps_done + 1)
        rows = "\n".join(f"| {name} | {value} |" for name, value in to_dict(config).items() if value is not None)
        self._writer.add_text("configuration", f"| flag | value |\n|---|---|\n{rows}", steps_done)

    def scalars(self, step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """picture: uint8 [height, width, 3]."""
        self._writer.add_image(name, picture, step, dataformats="HWC")

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases; OUT/wandb-id keeps its id, so that a resumed run goes on in the same one."""

    def __init__(self, config: Config) -> None:
        """Raises UserError where wandb cannot start: no key, no network."""
        import wandb

        self._wandb, id_file = wandb, config.out / _WANDB_ID
        try:
            self._run = wandb.init(
                dir=str(config.out),
                name=str(config.out),
                id=_read(id_file),
                resume="allow",
                config=to_dict(config),
            )
        except wandb.errors.Error as error:
            raise UserError(
                f"--wandb: it cannot start ({' '.join(str(error).split())}); run wandb login, or set WANDB_MODE=offline"
            ) from error
        with replacing(id_file) as file:
            file.write(self._run.id.encode())
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
