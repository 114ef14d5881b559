"""The run: steps, and validation, schedule and checkpoints at the epochs' ends.

The host waits for the device only where a figure is logged (every --log-every steps and at an epoch's end), at the end of
a validation pass, and where the state is copied for a checkpoint, or a checkpoint is written; with --decoder split also some
twenty times at the beginning.
"""

import contextlib
import functools
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import TrainingError
from common.memory import present_objects_frozen
from common.progress import printable, say
from common.ranks import Ranks, sum_over_ranks, wait_for_all
from engine import checkpoint as checkpoints
from engine.checkpoint import Checkpoint
from engine.config import Config, to_dict
from engine.data import TrainingData
from engine.evaluation.accuracy import Accuracy, evaluate
from engine.monitoring.confusion_matrix import MOST_CLASSES
from engine.monitoring.gpu_curves import gpus_of_this_machine
from engine.monitoring.runlog import IMAGES_SHOWN, RunLog
from engine.precision import Precision
from engine.training import schedule
from engine.training.assembly import assemble, too_little_memory
from engine.training.checkpoint_writer import CheckpointWriter
from engine.training.clock import Clock, TimedBatches, timing_events
from engine.training.decoder_share import DecoderShare
from engine.training.optimizer import load_momenta, state_of
from engine.training.preemption import SharedBatches, StopRequests
from model.vgg import BLOCKS, VGG
from pipeline.dali.loader import Batch, DaliLoader


class Trainer:
    """A training run. Its whole state: weights, their average, optimizer, scaler, steps and samples done, validation history."""

    def __init__(
        self,
        config: Config,
        *,
        ranks: Ranks,
        precision: Precision,
        data: TrainingData,
        model: VGG,
        checkpoint: Checkpoint | None,
        requests: StopRequests,
        peak_seconds_an_image: float | None = None,
    ) -> None:
        """checkpoint: where to go on from; None starts anew. requests: entered, so that they hear of signals already.

        peak_seconds_an_image: of an image's FLOPs, on all GPUs of the run at their highest rate; None where that is not known.
        """
        self._clock, self._requests, self._lost = Clock(), requests, data.lost.get("train")
        self._config, self._ranks, self._precision, self._data, self._model = config, ranks, precision, data, model
        if checkpoint:
            model.load_state_dict(checkpoint.model)
        parts = assemble(config, ranks=ranks, precision=precision, micro_batch=data.micro_batch, model=model)
        self._step, self._optimizer, self._scaler = parts.step, parts.optimizer, parts.scaler
        self._average, self._compiled, self._passes = parts.average, parts.compiled, parts.passes
        self._shared = parts.shared
        self._steps, self._samples_seen, self._history = 0, 0, []
        self._resumed = checkpoint is not None
        self._peak_seconds_an_image = peak_seconds_an_image
        if checkpoint:
            optimizer = checkpoint.optimizer  # of which the momenta count; rates and decay are this run's flags'
            load_momenta(self._optimizer, model, self._shared.own_optimizer(optimizer) if self._shared else optimizer)
            if checkpoint.scaler:  # empty where the checkpoint's precision needed no scaling
                self._scaler.load_state_dict(checkpoint.scaler)
            if checkpoint.ema and self._average:
                average = checkpoint.ema
                self._average.model.load_state_dict(self._shared.own(average) if self._shared else average)
            self._steps, self._samples_seen = checkpoint.steps, checkpoint.samples_seen
            self._history = list(checkpoint.history)
            if checkpoint.fingerprint != data.fingerprint:
                self._samples_seen = samples_of_other_data(checkpoint, data.train_images)
                # In epochs of the same data as samples_seen: they may change once more before the next validation.
                self._history = [
                    entry | {"samples_seen": entry["epoch"] * data.train_images} for entry in self._history
                ]
        if self._average:
            self._average.steps = self._steps
        self._decoder_share: DecoderShare | None = None
        """Where --decoder split shares each batch; made with the loader."""
        self._known_share = checkpoint.decoder_share if checkpoint else None
        self._same_ranks = checkpoint is not None and checkpoint.world_size == ranks.world_size
        self._saved_steps = self._steps
        self._best_top1 = _top1_of_the_best(config.out / checkpoints.BEST)
        self._validated_epoch = self._history[-1]["epoch"] if self._history else 0
        self._stopped = False
        self._writer = CheckpointWriter()
        self._total_steps = schedule.total_steps(
            config, data.train_images, steps_done=self._steps, samples_seen=self._samples_seen
        )
        self._head_alone = False
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=ranks.device)
        if ranks.is_main:
            say(self._describe())

    def fit(self) -> dict:
        """Train until the epochs, the steps or the plateaus are used up. Returns the results, as plain values.

        What ends the run early finds the state after the last whole step saved, unless it is the state that is no good, or the
        disk. Raises TrainingError: a loss that is not finite, too many images that cannot be decoded, a disk that refuses, a
        GPU whose memory is too small; KeyboardInterrupt after a stop that Ctrl-C has asked for.
        """
        if (why := self._why_done()) is not None:
            if self._ranks.is_main:
                say(f"this run is complete; {why} goes on, --resume never starts anew")
            return self._results()
        try:
            with self._open_log() as log, self._writer:
                try:
                    self._train(log)
                except Exception:
                    self._save_what_is_whole()
                    raise
                if log:
                    log.draw_curves()
        except torch.OutOfMemoryError as error:
            raise too_little_memory(self._data.micro_batch) from error
        if self._stopped and self._requests.interrupted:
            raise KeyboardInterrupt
        return self._results()

    def _train(self, log: RunLog | None) -> None:
        config, requests = self._config, self._requests
        share = config.batch_size // self._ranks.world_size
        loader = self._data.train_batches(self._samples_seen)
        timed = TimedBatches(
            loader, images_to_keep=IMAGES_SHOWN if log else 0, make_event=timing_events(self._ranks.device)
        )
        if self._data.decoder == "split" and isinstance(loader, DaliLoader):
            self._decoder_share = self._share_decoding(loader, timed)
        batches = self._shared_batches(timed, passes=self._passes)
        requests.save_is_due = lambda: self._minutes_since_save() >= config.checkpoint_minutes
        self._choose_what_is_trained()
        self._step.warm_up(*self._data.blank_batch())
        self._clock.start(self._steps)
        self._last_save = time.monotonic()
        with requests.training(self._ranks), present_objects_frozen():
            if self._validation_is_due():  # the run was stopped in the middle of it
                self._end_epoch(log)
            while self._goes_on():
                self._choose_what_is_trained()
                self._set_learning_rate()
                first = self._samples_seen + self._ranks.rank * share
                self._loss_sum += self._step(batches, first_sample=first, before_gradients=requests.hear_others)
                self._steps += 1
                self._samples_seen += config.batch_size
                if log:
                    log.advance()
                if self._decoder_share:
                    self._decoder_share.after_step()
                self._stopped = requests.agreed()
                ends_epoch = self._validation_is_due()
                if self._steps % config.log_every == 0 or ends_epoch or self._done() or self._stopped:
                    self._log_training(log, timed)
                if ends_epoch and not self._stopped:
                    self._end_epoch(log)
                elif requests.agreed_to_save or not self._goes_on():
                    self._save(is_best=False, in_background=self._goes_on())
                if self._writer.has_failed:
                    self._saved_steps = self._steps  # it is the disk, or the state
                    self._finish_write()
            if self._stopped:
                # Until rank 0 has written: torchrun ends the others when the first one leaves.
                wait_for_all(self._ranks)

    def _end_epoch(self, log: RunLog | None) -> None:
        """Validate, save, and only then show the result: beside the writing, unless the run ends here."""
        with self._clock.evaluating():
            accuracy, confusion = self._validate()
        if self._decoder_share:
            self._decoder_share.after_pause()
        is_best = accuracy is not None and accuracy.top1 > self._best_top1
        if accuracy and is_best:
            self._best_top1 = accuracy.top1
        self._save(is_best=is_best, in_background=self._goes_on())
        if log and accuracy:
            log.validation(step=self._steps, epoch=self._validated_epoch, accuracy=accuracy, confusion=confusion)

    def _save_what_is_whole(self) -> None:
        """In an error: save the state after the last whole step, if it is not saved yet, and if it is not what is at fault.

        Of layers that ranks share, this takes all of them: where only this rank has failed, the last checkpoint stays the last.
        """
        with contextlib.suppress(Exception):  # the error that ends the run is the one to tell
            self._finish_write()
        at_hand = self._requests.failed_together if self._shared else self._ranks.is_main
        if self._step.give_up() and self._steps > self._saved_steps and at_hand:
            with contextlib.suppress(Exception):
                self._save(is_best=False)
                if self._ranks.is_main:
                    say(f"saved the state after step {self._steps:,}")
        if self._requests.failed_together:
            with contextlib.suppress(RuntimeError):
                wait_for_all(self._ranks)  # torchrun ends rank 0 when another one leaves

    def _goes_on(self) -> bool:
        return not (self._done() or self._stopped)

    def _done(self) -> bool:
        return self._why_done() is not None

    def _why_done(self) -> str | None:
        """What would let the run go on after its end; None as long as it is not done."""
        if self._config.schedule == "plateau" and self._plateau()[1]:
            return f"--plateau-epochs {self._config.plateau_epochs + 1} or more"
        if self._steps < self._total_steps or self._validation_is_due():
            return None
        epochs_left = self._samples_seen < self._config.epochs * self._data.train_images
        return "a larger --steps" if epochs_left else "a larger --epochs"

    def _validation_is_due(self) -> bool:
        return self._samples_seen // self._data.train_images > self._validated_epoch

    def _minutes_since_save(self) -> float:
        return (time.monotonic() - self._last_save) / 60

    # ---- what is trained, and the learning rate ------------------------------------------------------------------

    def _choose_what_is_trained(self) -> None:
        """The last layer alone for --head-epochs, then all that is not frozen."""
        head_alone = self._samples_seen < self._config.head_epochs * self._data.train_images
        if head_alone == self._head_alone:
            return
        self._head_alone = head_alone
        waiting = [weight for group in self._optimizer.param_groups if group["waits"] for weight in group["params"]]
        self._step.left_alone = waiting if head_alone else ()
        self._model.keep_statistics(BLOCKS if head_alone else self._config.frozen_blocks)

    def _set_learning_rate(self) -> None:
        rate = self._learning_rate()
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["lr_factor"]

    def _learning_rate(self) -> float:
        config, epoch = self._config, self._samples_seen / self._data.train_images
        if config.schedule == "plateau":
            return self._plateau()[0]
        if config.schedule == "step":
            return schedule.step(config.lr, epoch, config.step_epochs)
        middle_of_step = epoch + 0.5 * config.batch_size / self._data.train_images  # so that the first rate is not 0
        return schedule.cosine(config.lr, middle_of_step, config.epochs, config.warmup_epochs)

    def _plateau(self) -> tuple[float, bool]:
        return schedule.plateau(
            self._config.lr, [entry["top1"] for entry in self._history], self._config.plateau_epochs
        )

    # ---- figures -------------------------------------------------------------------------------------------------

    def _log_training(self, log: RunLog | None, batches: TimedBatches) -> None:
        lost = torch.full_like(self._loss_sum, len(self._lost.rows) if self._lost else 0)
        sums = sum_over_ranks(torch.stack((self._loss_sum, lost)), self._ranks)
        loss_sum, lost_images = sums.tolist()  # waits for the device
        self._loss_sum.zero_()
        self._check_lost_images(round(lost_images))
        steps, seconds = self._clock.lap(self._steps)
        loss = loss_sum / self._ranks.world_size / steps
        if not math.isfinite(loss):
            self._saved_steps = self._steps  # nothing here is worth saving
            config = self._config
            begun_anew = not (self._resumed or config.weights or config.init_from)
            cure = "a lower --lr or --init xavier" if begun_anew and config.init != "xavier" else "a lower --lr"
            raise TrainingError(
                f"the loss is {loss} after step {self._steps}: the training diverged; the last good checkpoint is "
                f"{self._last_good()}; try {cure}"
            )
        wait_seconds = batches.take_wait_seconds()
        if log:
            on_gpu = self._ranks.device.type == "cuda"
            images_per_second = steps * self._config.batch_size / seconds
            peak_seconds = self._peak_seconds_an_image
            log.train(
                step=self._steps,
                epoch=self._samples_seen / self._data.train_images,
                loss=loss,
                lr=self._optimizer.param_groups[0]["lr"],
                images_per_second=images_per_second,
                mfu=images_per_second * peak_seconds if peak_seconds else None,
                data_wait=wait_seconds / seconds,
                gpu_memory_gib=torch.cuda.max_memory_reserved(self._ranks.device) / 2**30 if on_gpu else None,
                decoder_share=self._decoder_share.share if self._decoder_share else None,
            )
            if (images := batches.take_images()) is not None:
                log.images(step=self._steps, images=images)

    def _check_lost_images(self, found: int) -> None:
        """found: images lost, added up over ranks, of which several may have found the same one."""
        if self._lost and found > self._lost.limit:
            lost = self._lost.of_all_ranks(self._ranks)
            self._requests.failed_together = lost > self._lost.limit  # so that the others wait for rank 0 to save
            self._lost.check(lost)

    def _validate(self) -> tuple[Accuracy | None, Tensor | None]:
        """Validate. Returns the result, and which classes were taken for which, where they are few.

        There is none for synthetic data, nor if a stop is asked for meanwhile: then resuming makes up for it.
        """
        epoch = self._samples_seen // self._data.train_images
        opened = self._validation
        if opened is None:
            self._validated_epoch = epoch
            return None, None
        batches, steps = opened
        classes = len(self._data.classes)
        small = classes <= MOST_CLASSES
        confusion = torch.zeros(classes, classes, dtype=torch.int64, device=self._ranks.device) if small else None
        accuracy = evaluate(
            self._average.model if self._average else self._model,
            batches,
            steps,
            ranks=self._ranks,
            precision=self._precision,
            lost_before=self._data.val_lost,
            confusion=confusion,
            stop=self._requests.agreed,
        )
        if accuracy is None:
            self._stopped = True
            return None, None
        self._history.append({"epoch": epoch, "samples_seen": epoch * self._data.train_images, **asdict(accuracy)})
        self._validated_epoch = epoch
        return accuracy, confusion

    @functools.cached_property
    def _validation(self) -> tuple[Iterator[Batch], int] | None:
        """The batches of the validation, opened when the first one is due, and how many make one pass."""
        opened = self._data.validation_batches(self._data.viewing)
        return opened and (self._shared_batches(opened[0], passes=1), opened[1])

    def _results(self) -> dict:
        last, clock = self._history[-1] if self._history else {}, self._clock
        images = clock.training_steps * self._config.batch_size
        return {
            "arch": self._config.arch,
            "data": self._config.data,
            "epochs": self._samples_seen // self._data.train_images,
            "steps": self._steps,
            "samples_seen": self._samples_seen,
            "top1": last.get("top1"),
            "top5": last.get("top5"),
            "validation_loss": last.get("loss"),
            "best_top1": max((entry["top1"] for entry in self._history), default=None),
            "images_per_second": round(images / clock.training_seconds, 2) if images else None,
            "startup_seconds": round(clock.startup_seconds, 2),
            "training_seconds": round(clock.training_seconds, 2),
            "evaluation_seconds": round(clock.evaluation_seconds, 2),
            "checkpoint_seconds": round(clock.checkpoint_seconds, 2),
            "world_size": self._ranks.world_size,
            "device": self._ranks.device.type,
            "precision": self._precision.name,
            "compiled": self._compiled,
            "resumed": self._resumed,
            "decoder_share": self._decoder_share.share if self._decoder_share else None,
            "stopped": self._stopped,
            "checkpoint": str(self._config.out / checkpoints.LAST),
        }

    # ---- the rest ------------------------------------------------------------------------------------------------

    def _shared_batches(self, batches: Iterator[Batch], *, passes: int) -> SharedBatches:
        """passes: of a step. With shared layers, the forward pass waits for the other ranks: they have to be heard before it."""
        if self._shared:
            return SharedBatches(batches, self._requests, passes=1, hear_at_once=True)
        return SharedBatches(batches, self._requests, passes=passes)

    def _save(self, *, is_best: bool, in_background: bool = False) -> None:
        """Rank 0 writes, once the checkpoint before is written. Where ranks share layers, every rank must call this, since each
        has a part of what is written. in_background: from a copy, while the training goes on; else the file is there now.
        """
        self._last_save, self._saved_steps = time.monotonic(), self._steps
        if self._decoder_share and not in_background:
            self._decoder_share.after_pause()
        self._finish_write()
        model, optimizer = self._model.state_dict(), state_of(self._optimizer, self._model)
        average = self._average.model.state_dict() if self._average else None
        if self._shared:
            with self._clock.saving():
                model, optimizer = self._shared.whole(model), self._shared.whole_optimizer(optimizer)
                average = self._shared.whole(average) if average else None
        if not self._ranks.is_main:
            return
        checkpoint = Checkpoint(
            arch=self._config.arch,
            crop=self._config.crop,
            classes=list(self._data.classes),
            mean_rgb=list(self._data.mean_rgb),
            std_rgb=list(self._config.std_rgb),
            model=model,
            optimizer=optimizer,
            scaler=self._scaler.state_dict(),
            steps=self._steps,
            samples_seen=self._samples_seen,
            history=self._history,
            fingerprint=self._data.fingerprint,
            config=to_dict(self._config),
            world_size=self._ranks.world_size,
            batch_norm=self._config.batch_norm,
            colour_shift=[list(row) for row in self._data.colour_shift],
            ema=average,
            decoder_share=self._decoder_share.found if self._decoder_share else None,
        )
        with self._clock.saving(), self._requests.writing():
            save = self._writer.begin if in_background else checkpoints.save
            save(checkpoint, self._config.out, is_best=is_best, keep=self._config.keep)

    def _finish_write(self) -> None:
        """Wait for the checkpoint that is being written, if one is. Raises what has kept it, or the one before, from the disk."""
        with self._clock.saving(), self._requests.writing():
            self._writer.finish()

    def _open_log(self) -> contextlib.AbstractContextManager[RunLog | None]:
        if not self._ranks.is_main:
            return contextlib.nullcontext()
        return RunLog(
            self._config,
            steps_done=self._steps,
            total_steps=self._total_steps,
            top1=self._history[-1]["top1"] if self._history else None,
            classes=self._data.classes,
            mean_rgb=self._data.mean_rgb,
            gpus=gpus_of_this_machine(self._ranks),
            machine_share=self._ranks.local_world_size / self._ranks.world_size,
        )

    def _share_decoding(self, loader: DaliLoader, timed: TimedBatches) -> DecoderShare:
        """What an earlier part of the run has found stays, so that the run goes on bit-exactly; other ranks seek it again."""
        if self._known_share is not None:
            loader.share = self._known_share
        return DecoderShare(loader, timed, self._data, is_found=self._known_share is not None and self._same_ranks)

    def _last_good(self) -> str:
        with contextlib.suppress(Exception):
            self._finish_write()  # perhaps the first one
        return checkpoints.last_good(self._config.out)

    def _describe(self) -> str:
        config, ranks, data = self._config, self._ranks, self._data
        parameters = sum(weight.numel() for weight in self._model.parameters())
        frozen = sum(weight.numel() for weight in self._model.parameters() if not weight.requires_grad)
        of_them = f", {frozen / 1e6:.1f} M of them frozen" if frozen else ""
        shared = ""
        if self._shared:
            parameters += self._shared.parameters_elsewhere
            shared = f", FC6 and FC7 shared by {self._shared.sharing}"
        place = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "CPU"
        network = f"{config.arch} with batch norm" if config.batch_norm else config.arch
        return (
            f"{network} ({parameters / 1e6:.1f} M parameters{of_them}) on {printable(config.data)}: "
            f"{data.train_images:,} images, {len(data.classes)} classes, crop {config.crop}, {config.crops}\n"
            f"{place}, {self._precision.name}, {'compiled' if self._compiled else 'eager'}; batch {config.batch_size} = "
            f"{ranks.world_size} ranks × {self._passes} passes × {data.micro_batch} images{shared}; "
            f"{self._total_steps:,} steps; {printable(str(config.out))}"
        )


def samples_of_other_data(checkpoint: Checkpoint, train_images: int) -> int:
    """A checkpoint's samples_seen, had its epochs been of a data set of `train_images` images.

    The epochs that were validated stay done; what was seen of the next one counts as seen of it. Files of an earlier version do
    not say how much that is: the next one begins.
    """
    last = checkpoint.history[-1] if checkpoint.history else {"epoch": 0, "samples_seen": 0}
    seen_since = checkpoint.samples_seen - last.get("samples_seen", checkpoint.samples_seen)
    return last["epoch"] * train_images + max(0, min(seen_since, train_images))


def _top1_of_the_best(path: Path) -> float:
    """What best.pt has reached; less than anything where there is none, or none that can be read. Its weights are not read.

    It was saved after the last validation that it knows of. One before may have been better, of a run that lies elsewhere.
    """
    try:
        content: Any = checkpoints.read_file(path, else_is="a checkpoint")
        return float(content["history"][-1]["top1"])
    except (ValueError, LookupError, TypeError):
        return -1.0
