"""The run's folder, and which checkpoint the run goes on from."""

import os
import re
import tempfile
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from common.errors import UserError
from common.files import half_written, remove_own
from common.lock import FolderLock
from common.progress import say
from common.ranks import Ranks, on_rank_0
from engine import checkpoint as checkpoints
from engine.checkpoint import Checkpoint
from engine.config import Config, save_config, to_dict
from engine.data import Data
from engine.monitoring.run_files import CONFIG
from engine.networks import check_weights, differing_classes
from model.weights import is_finite, is_plain
from pipeline.dataset.scan import SPLITS

# Settings that say how a run is carried out, not what it computes: free to change between a run and its resumption.
_FREE_SETTINGS = {
    "data", "out", "resume", "device", "micro_batch", "epochs", "steps", "threads", "prefetch", "decoder",
    "read_threads", "read_ahead", "log_every", "checkpoint_minutes", "keep", "max_bad_images", "allow_changed_data",
    "compile", "compile_mode", "pad_channels", "fuse", "parallel", "fc_ranks", "collective_minutes",
    "lost_seconds", "weights", "init_from", "wandb", "profile_memory", "inspect", "dry_run",
}  # fmt: skip
_SCALER = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}
# What a run writes into OUT, and nothing else is touched there; .lock, which stays, left out.
_NAMES = re.compile(
    r"last\.pt|best\.pt|step-\d{8,}\.pt|config\.yaml|metrics\.jsonl|curves\.png|inspect\.png|memory\.pickle|tensorboard|wandb"
    "|wandb-id"
)


def open_checkpoint(config: Config, ranks: Ranks, lock: FolderLock | None) -> Checkpoint | None:
    """The checkpoint that --resume names, None to start anew. Takes the lock of OUT, if there is an OUT yet; without a lock to
    take, only looks.

    Raises UserError: OUT cannot be written, another run writes to it, no checkpoint can be read, or holds another network.
    """
    path = on_rank_0(ranks, lambda: _find(config, lock))
    if path is None:
        return None
    checkpoint = checkpoints.load(path)
    check_weights(checkpoint, path)
    _check_optimizer(checkpoint, path)
    for flag, theirs, ours in (
        ("arch", checkpoint.arch, config.arch),
        ("crop", checkpoint.crop, config.crop),
        ("std", ",".join(map(str, checkpoint.std_rgb)), ",".join(map(str, config.std_rgb))),
    ):
        if theirs != ours:
            raise UserError(
                f"checkpoint {path} was trained with --{flag} {theirs}, this run asks for {ours}; {_instead(config)}"
            )
    if checkpoint.batch_norm != config.batch_norm:
        raise UserError(
            f"checkpoint {path} was trained {_with(checkpoint.batch_norm)} --batch-norm, this run is "
            f"{_with(config.batch_norm)}; {_instead(config)}"
        )
    if ranks.is_main:
        say(f"going on from {path}: step {checkpoint.steps:,}, {checkpoint.samples_seen:,} images seen")
        then = to_dict(Config()) | checkpoint.config  # a flag that there was not did what its default does
        of_a_pass = {"micro_batch"} if config.mixes or config.batch_norm else set()  # not only rounding depends on it
        for setting, value in to_dict(config).items():
            before = then[setting]
            if setting not in _FREE_SETTINGS - of_a_pass and before != value:
                say(f"  note: {setting} was {before} until now and is {value} from here on")
        if checkpoint.world_size != ranks.world_size:
            changes = "rounding and which images are mixed do" if config.mixes else "rounding does"
            say(
                f"  note: ranks were {checkpoint.world_size} until now and are {ranks.world_size} from here on; the batches "
                f"and dropout stay the same, {changes} not"
            )
    return checkpoint


def with_micro_batch_of(checkpoint: Checkpoint, config: Config, ranks: Ranks) -> Config:
    """The configuration, where it leaves --micro-batch open, with that of the checkpoint: what did not fit is not tried again,
    and the passes, on which rounding depends, stay the same.
    """
    size = checkpoint.config.get("micro_batch")
    if config.micro_batch or type(size) is not int or size < 1:
        return config
    if ranks.is_main:
        say(f"  note: --micro-batch {size}, as until now; where it is given, it changes")
    return replace(config, micro_batch=size)


def _check_optimizer(checkpoint: Checkpoint, path: Path) -> None:
    """Raise UserError unless the optimizer's and the scaler's states are such as a run can go on from."""
    groups, momenta = checkpoint.optimizer.get("param_groups"), checkpoint.optimizer.get("state")
    shapes = [
        weight.shape
        for name, weight in checkpoint.model.items()
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))
    ]
    is_one_group = (
        isinstance(groups, list)
        and len(groups) == 1
        and isinstance(groups[0], dict)
        and {"lr", "dampening"} <= groups[0].keys()
        and groups[0].get("params") == list(range(len(shapes)))
        and all(isinstance(value, int | float | None) for name, value in groups[0].items() if name != "params")
    )
    if not is_one_group or not isinstance(momenta, dict):
        raise UserError(f"checkpoint {path}: its entry optimizer is not the state of this trainer's optimizer")
    for number, state in momenta.items():
        momentum = state.get("momentum_buffer") if isinstance(state, dict) else state
        if momentum is None:  # of a run without momentum
            continue
        fits = number in range(len(shapes)) and isinstance(momentum, Tensor) and momentum.shape == shapes[number]
        if not fits or not is_plain(momentum) or not is_finite(momentum):
            raise UserError(f"checkpoint {path}: its entry optimizer has a momentum that is not finite or does not fit")
    scaler = checkpoint.scaler
    if scaler and (_SCALER - scaler.keys() or not all(isinstance(value, int | float) for value in scaler.values())):
        raise UserError(f"checkpoint {path}: its entry scaler is not the state of a gradient scaler")


def _instead(config: Config) -> str:
    """What helps where a checkpoint is another network's."""
    if config.resume != "auto":
        return "give --resume another one, or never to start anew"
    return "choose another --out, or --resume never to start anew"


def _with(whether: bool) -> str:
    return "with" if whether else "without"


def check_same_data(checkpoint: Checkpoint, data: Data, config: Config) -> None:
    """Raise UserError where the checkpoint's classes are others, or its images, unless that is allowed."""
    if tuple(checkpoint.classes) != tuple(data.classes):
        how = differing_classes(checkpoint.classes, data.classes) or "it has the data set's classes in another order"
        raise UserError(f"the checkpoint does not fit the data set: {how}; {_instead(config)}")
    if checkpoint.fingerprint != data.fingerprint and not config.allow_changed_data:
        raise UserError(
            "the data set changed since the checkpoint was written, so its epoch cannot be completed exactly; "
            "restore the data, or give --allow-changed-data to go on with what is there"
        )


def claim_out(config: Config, checkpoint: Checkpoint | None, lock: FolderLock) -> None:
    """Take possession of OUT, on rank 0, when all that was given is known to be right.

    Moves an earlier run aside unless this one goes on with it, removes files that a killed run left half-written, saves
    config.yaml. Of what else is there nothing is touched: OUT may be any folder.
    Raises UserError: another run writes to OUT, a config.yaml there is not a run's, or the disk refuses.
    """
    out = config.out
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.take()
        remove_own(out, half_written(_NAMES.pattern))  # of a run that was killed while it wrote a checkpoint
        goes_on = checkpoint and (config.resume == "auto" or os.path.samefile(Path(config.resume).parent, out))
        if not _is_of_a_run(out / CONFIG):
            raise UserError(
                f"--out {out}: its {CONFIG} is not a run's; choose another folder, or give that file another name"
            )
        if checkpoints.all_in(out) and not goes_on:
            _move_aside(out)
        save_config(config, out / CONFIG)
    except OSError as error:
        raise _cannot_be_written(out, error) from error


def _is_of_a_run(path: Path) -> bool:
    """Whether a config.yaml may be replaced: there is none, or it has flags that no other program's file has together."""
    try:
        keys = {line.partition(":")[0] for line in path.read_text(errors="replace").splitlines()}
    except FileNotFoundError:
        return True
    return not keys or {"arch", "train_scale", "checkpoint_minutes"} <= keys


def _move_aside(out: Path) -> None:
    earlier = [entry for entry in out.iterdir() if _NAMES.fullmatch(entry.name)]
    if not earlier:
        return
    aside = next(out / f"earlier-{n}" for n in range(1, 10**6) if not os.path.lexists(out / f"earlier-{n}"))
    aside.mkdir()
    for entry in earlier:
        entry.rename(aside / entry.name)
    say(f"the earlier run in {out} is now in {aside}")


def _check_apart(config: Config) -> None:
    """Raise UserError where a run's files would lie among the images, or --resume never would move the images away."""
    data, out = (Path(os.path.realpath(path)) for path in (config.data, config.out))
    among = any(out.is_relative_to(os.path.realpath(data / split)) for split in SPLITS)
    if among or (data != out and data.is_relative_to(out) and _NAMES.fullmatch(data.relative_to(out).parts[0])):
        raise UserError(
            f"--out {config.out}: what a run writes there and the images of --data {config.data} would be taken for each "
            "other; choose another folder"
        )


def _find(config: Config, lock: FolderLock | None) -> Path | None:
    _check_apart(config)
    if lock:
        _take_if_there(config.out, lock)
    if config.resume == "never":
        return None
    return checkpoints.newest_good(config.out) if config.resume == "auto" else Path(config.resume)


def _take_if_there(out: Path, lock: FolderLock) -> None:
    """Take the lock of OUT, if there is an OUT yet. Raises UserError where nothing could be written there."""
    nearest = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    try:
        descriptor, probe = tempfile.mkstemp(dir=nearest, prefix=".probe.")
        os.close(descriptor)
        os.unlink(probe)
        if nearest == out:
            lock.take()  # before looking for checkpoints: a run that is just ending may write one more
    except OSError as error:
        raise _cannot_be_written(out, error) from error


def _cannot_be_written(out: Path, error: OSError) -> UserError:
    return UserError(f"--out {out}: cannot be written ({error.strerror}); choose another folder")
