"""What can be seen of a run while it goes on: its log, the dashboards, the GPUs' curves."""

import io
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from common.errors import UserError
from common.ranks import ranks_of_this_run
from engine.config import parse_args
from engine.evaluation.accuracy import Accuracy, evaluate
from engine.monitoring import runlog
from engine.monitoring.confusion_matrix import draw_confusion
from engine.monitoring.pictures import as_pictures, grid
from engine.monitoring.runlog import RunLog
from engine.precision import Precision
from engine.training.clock import TimedBatches
from pipeline.dali.loader import Batch
from tests.support.launch import SMALL
from tests.support.nvml_stub import ROOT, compile_stub, environment

WANDB = '''
"""What this project uses of wandb; writes down what it is given."""
import json, os, pathlib

class errors:
    class Error(Exception):
        pass

class Image:
    def __init__(self, picture):
        self.shape = picture.shape

class Run:
    def __init__(self, folder, id):
        self.id, self._file = id, open(pathlib.Path(folder) / "wandb.jsonl", "a")

    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "step")

    def log(self, figures):
        print(json.dumps(figures, default=lambda image: image.shape), file=self._file, flush=True)

    def finish(self, exit_code):
        self.log({"exit_code": exit_code})

def init(*, dir, name, id, resume, config):
    if "WANDB_STUB_FAILS" in os.environ:
        raise errors.Error("no key\\nwas found")
    assert resume == "allow" and config["arch"] == "A" and "torch" not in str(type(config["lr"]))
    return Run(dir, id or "made-up-id")
'''


def open_log(out: Path, *flags: str, steps_done: int = 0, top1: float | None = None) -> RunLog:
    out.mkdir(exist_ok=True)
    return RunLog(
        parse_args([*SMALL, "--out", str(out), *flags]),
        steps_done=steps_done,
        total_steps=20,
        top1=top1,
        classes=["cat", "dog"],
        mean_rgb=(120.0, 110.0, 100.0),
        gpus=[],
    )


def log_a_step(log: RunLog, step: int, memory: float | None = None) -> None:
    log.advance()
    log.train(
        step=step, epoch=step / 10, loss=2.0, lr=0.01, images_per_second=1234.0, data_wait=0.25, gpu_memory_gib=memory
    )


def test_tensorboard_gets_figures_pictures_and_the_configuration(tmp_path):
    images = torch.randn(5, 4, 8, 8) * 50
    confusion = torch.tensor([[3, 1], [0, 2]])
    with open_log(tmp_path) as log:
        log_a_step(log, 1, memory=3.5)
        log.images(step=1, images=images)
        log.validation(
            step=1, epoch=1, accuracy=Accuracy(loss=1.0, top1=5 / 6, top5=1.0, images=6, lost=0), confusion=confusion
        )
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Scalars("train/gpu_memory_gib")[0].value == 3.5
    assert events.Scalars("validation/top1")[0].value == pytest.approx(5 / 6)
    (shown,) = events.Images("train/images")
    assert (shown.width, shown.height) == (5 * 10 + 3 * 10 - 2, 8)  # eight places of eight pixels, two between them
    assert len(events.Images("validation/confusion")) == 1
    text = events.Tensors("configuration/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| batch_size | 12 |" in text


def test_pictures_are_what_a_loader_started_from():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 4, 3), dtype=np.uint8)
    mean = (123.68, 116.779, 103.939)
    images = torch.from_numpy(pixels - np.asarray(mean, dtype=np.float32)).permute(0, 3, 1, 2)
    ones, std = (1.0, 1.0, 1.0), (58.0, 2.0, 57.0)
    assert np.array_equal(as_pictures(images, mean, ones), pixels)
    assert np.array_equal(as_pictures(torch.cat((images, torch.zeros(3, 1, 5, 4)), dim=1), mean, ones), pixels)
    assert np.array_equal(as_pictures(images / torch.tensor(std).view(3, 1, 1), mean, std), pixels)
    brighter = as_pictures(images + 20, mean, ones)
    assert np.array_equal(brighter, np.minimum(pixels.astype(int) + 20, 255))  # a colour shift stays
    sheet = grid(pixels, 2)
    assert sheet.shape == (12, 10, 3)
    assert np.array_equal(sheet[7:, :4], pixels[2])
    assert (sheet[7:, 6:] == 255).all()


def test_lines_say_everything_and_how_long_it_takes(tmp_path, capsys, monkeypatch):
    clock = iter([100.0, 130.0])
    monkeypatch.setattr(runlog.time, "monotonic", lambda: next(clock))
    with open_log(tmp_path, steps_done=4, top1=0.5) as log:
        log.advance()  # step 5, at 100 s
        for _ in range(3):
            log.advance()
        log.train(
            step=8, epoch=0.8, loss=2, lr=0.01, images_per_second=1234, data_wait=0.25, gpu_memory_gib=21.32
        )  # at 130 s: 10 s a step, twelve are left
    line = "step 8/20  epoch 0.80  loss 2.000  top-1 50.0%  1,234 images/s  data wait 25%  lr 1.0e-02  memory 21.3 GiB  ETA 02:00"
    assert capsys.readouterr().err.splitlines()[-1] == line


def test_a_terminal_gets_a_bar_and_a_line_of_figures(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with open_log(tmp_path, top1=0.25) as log:
        log_a_step(log, 1)
        log_a_step(log, 2)
    text = screen.getvalue()
    assert "epoch 0.20   10 %" in text
    assert "2/20 steps  ETA 00:00" in text
    assert "loss 2.000  top-1 25.0%  1,234 images/s  data wait 25%  lr 1.0e-02" in text


def test_wandb_gets_the_same_and_goes_on_in_the_same_run(tmp_path, monkeypatch):
    (tmp_path / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "out"
    with open_log(out, "--wandb") as log:
        log_a_step(log, 1)
        log.images(step=1, images=torch.zeros(2, 3, 8, 8))
    assert (out / "wandb-id").read_text() == "made-up-id"
    (out / "wandb-id").write_text("the same")
    log = open_log(out, "--wandb", steps_done=1)
    log.__enter__()
    log.__exit__(ZeroDivisionError, None, None)
    assert (out / "wandb-id").read_text() == "the same"
    logged = [json.loads(line) for line in (out / "wandb.jsonl").read_text().splitlines()]
    assert logged[0]["step"] == 1
    assert logged[0]["train/loss"] == 2.0
    assert logged[1] == {"step": 1, "train/images": [8, 78, 3]}
    assert logged[2] == {"exit_code": 0}
    assert logged[-1] == {"exit_code": 1}
    monkeypatch.setenv("WANDB_STUB_FAILS", "1")
    with pytest.raises(UserError, match=r"--wandb: it cannot start \(no key was found\); run wandb login"):
        open_log(out, "--wandb")
    del sys.modules["wandb"]


def test_wandb_is_asked_for_where_it_is_not_installed(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()  # as its runs leave it: no package
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(p for p in sys.path if not (Path(p) / "wandb").exists())])
    with pytest.raises(UserError, match="wandb is not installed here; pip install wandb"):
        parse_args([*SMALL, "--wandb"])


class Taken(nn.Module):
    """A network that says of each image what its first pixel is."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.one_hot(images[:, 0, 0, 0].long(), 3).float()


def test_confusion_counts_each_image_once():
    generator = torch.Generator().manual_seed(0)
    labels, taken = (torch.randint(3, (4, 6), generator=generator) for _ in range(2))
    labels[3, 3:], labels[0, 0] = -1, -2  # padding, and one that cannot be decoded
    batches = iter(
        [(t.float()[:, None, None, None].expand(6, 3, 2, 2), label) for t, label in zip(taken, labels, strict=True)]
    )
    confusion = torch.zeros(3, 3, dtype=torch.int64)
    with ranks_of_this_run("cpu") as ranks:
        accuracy = evaluate(Taken(), batches, 4, ranks=ranks, precision=Precision("fp32", "cpu"), confusion=confusion)
    expected = np.zeros((3, 3), dtype=int)
    for label, prediction in zip(labels.flatten().tolist(), taken.flatten().tolist(), strict=True):
        if label >= 0:
            expected[label, prediction] += 1
    assert confusion.tolist() == expected.tolist()
    assert accuracy
    assert accuracy.top1 == np.trace(expected) / 21
    picture = draw_confusion(confusion.numpy(), ["a", "b", "a name that is far too long to be shown $^$"])
    assert picture.dtype == np.uint8
    assert picture.shape[2] == 3


def test_the_first_images_are_kept_once():
    def batches():
        while True:
            yield torch.full((4, 3, 2, 2), 7.0), torch.zeros(4, dtype=torch.int64)

    timed = TimedBatches(batches(), images_to_keep=3)
    assert timed.take_images() is None
    first: Batch = next(timed)
    first[0].zero_()  # the loader uses its buffer again
    next(timed)
    images = timed.take_images()
    assert images is not None
    assert images.shape == (3, 3, 2, 2)
    assert (images == 7).all()
    assert timed.take_images() is None


def gpu_curves(env: dict[str, str], gpus: str = "None") -> dict:
    """Means, and under "watts" what take_watts() says."""
    code = f"""
import json, time
from engine.monitoring.gpu_curves import GpuCurves
curves = GpuCurves({gpus}, interval_seconds=0.02)
curves.start()
deadline = time.monotonic() + 10
while curves._thread.is_alive() and not curves._read and time.monotonic() < deadline:
    time.sleep(0.01)
time.sleep(0.3); means = curves.take_means()
watts = curves.take_watts(); curves.stop()
print(json.dumps({{**means, "watts": watts and round(watts, -1)}}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert not done.stderr
    return json.loads(done.stdout)


def test_gpu_curves_over_a_stub_of_nvml(tmp_path):
    stub = compile_stub(tmp_path)
    assert gpu_curves(environment(stub, GPUS="2")) == {
        "gpu0/power_watts": 300,
        "gpu0/sm_utilisation_percent": 90,
        "gpu0/memory_used_gib": 5,
        "gpu1/power_watts": 600,
        "gpu1/sm_utilisation_percent": 91,
        "gpu1/memory_used_gib": 6,
        "watts": 900,
    }
    second = "['2000abcd-0000-0000-0000-000000000000']"  # as torch says it
    of_second = gpu_curves(environment(stub, GPUS="2"), second)
    assert of_second["gpu0/power_watts"] == of_second["watts"] == 600
    lost = gpu_curves(environment(stub, GPUS="2", FAULTS="nvmlDeviceGetPowerUsage=15"))  # NVML_ERROR_GPU_IS_LOST
    assert lost == {"watts": None}
    without = gpu_curves(environment(stub, FAULTS="nvmlDeviceGetPowerUsage=3"))
    assert sorted(without) == ["gpu0/memory_used_gib", "gpu0/sm_utilisation_percent", "watts"]


def test_power_is_that_of_all_gpus_or_none(tmp_path):
    stub = compile_stub(tmp_path)
    first, second = (f"{number}000abcd-0000-0000-0000-000000000000" for number in (1, 2))
    without = environment(stub, GPUS="2", FAULTS="nvmlDeviceGetTotalEnergyConsumption=3")
    assert gpu_curves(without, f"['{first}']")["watts"] is None, "no counter"
    assert gpu_curves(environment(stub), f"['{first}', '{second}']")["watts"] is None, "one cannot be read"
    assert gpu_curves(environment(stub, MIG="1"), f"['{first}']")["watts"] is None, "its neighbours' are counted, too"


def images_per_joule(env: dict[str, str], gpus: str) -> list[float | None]:
    """Of 600 images a second, half of them this machine's: right after the start, later, right after a validation, and later."""
    code = f"""
import functools, json, sys, time
from pathlib import Path
from engine.config import parse_args
from engine.evaluation.accuracy import Accuracy
from engine.monitoring import runlog
from engine.monitoring.run_files import read_records

runlog.GpuCurves = functools.partial(runlog.GpuCurves, interval_seconds=0.1)
out = Path(sys.argv[1])
config = parse_args(["--data", "digits", "--out", str(out)])
with runlog.RunLog(
    config, steps_done=0, total_steps=9, top1=None, classes="ab", mean_rgb=(0, 0, 0), gpus={gpus}, machine_share=0.5
) as log:
    def line(step):
        log.train(step=step, epoch=0.1, loss=1, lr=1, images_per_second=600, data_wait=0, gpu_memory_gib=1, mfu=0.25)
    deadline = time.monotonic() + 10
    while not log._gpu_curves._last and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.5)
    log.advance()
    line(1)
    time.sleep(0.8)
    line(2)
    time.sleep(0.3)
    log.validation(step=2, epoch=1, accuracy=Accuracy(loss=1, top1=0.5, top5=1, images=4, lost=0), confusion=None)
    line(3)
    time.sleep(0.8)
    line(4)
lines = [record for record in read_records(out / "metrics.jsonl") if record["kind"] == "train"]
print(json.dumps([line.get("images_per_joule") for line in lines]))
"""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-c", code, out]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert "MFU 25.0%  data wait" in done.stderr
    assert ("images/J" in done.stderr) == (done.stdout.strip() != "[null, null, null, null]")
    return json.loads(done.stdout)


@pytest.mark.seconds
def test_images_per_joule_are_those_of_this_machine_s_gpus(tmp_path):
    """300 and 600 W: 300 images a second for 900 J. What the GPUs draw at the start and in a validation does not count."""
    stub = compile_stub(tmp_path)
    both = "['1000abcd-0000-0000-0000-000000000000', '2000abcd-0000-0000-0000-000000000000']"
    first, later, after, last = images_per_joule(environment(stub, GPUS="2"), both)
    assert first is after is None
    assert [later, last] == pytest.approx([300 / 900] * 2, rel=0.02)
    assert images_per_joule(environment(stub), "None") == [None] * 4, "of a run on a CPU"


def test_without_a_driver_there_are_no_gpu_curves(tmp_path):
    stub = compile_stub(tmp_path)
    assert gpu_curves(environment(stub, FAULTS="nvmlInitWithFlags=9")) == {"watts": None}
