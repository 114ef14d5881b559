import dataclasses
import itertools
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from common.errors import UserError
from engine.config import Config, check_numbers, parse_args, read_recipe, save_config
from engine.evaluation.flags import FeatureFlags

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VGG_DATA", raising=False)
    return tmp_path


def test_defaults_are_the_papers():
    config = parse_args(["--data", "imagenet"])
    paper = {
        "arch": "D",
        "crop": 224,
        "train_scale": "256",
        "batch_size": 256,
        "epochs": 74,
        "lr": 0.01,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "dropout": 0.5,
        "schedule": "plateau",
    }
    assert {name: getattr(config, name) for name in paper} == paper
    assert config.out == Path("runs/D-imagenet")


IMAGENET = {
    "out": Path("runs/D-imagenet"), "resume": "auto", "recipe": None, "seed": 0, "epochs": 74, "steps": None,
    "arch": "D", "batch_norm": False, "dropout": 0.5, "init": "xavier", "init_from": None, "weights": None,
    "freeze": "none", "head_epochs": 0.0, "weight_decay_on": "all", "head_lr_factor": 1.0,
    "data": "imagenet", "train_scale": "256", "crop": 224, "crop_mode": "paper", "crop_area": "0.08-1",
    "crop_aspect": "3/4-4/3", "validation_scale": None, "std": "1,1,1", "order": "global", "window_shards": 16,
    "max_bad_images": None, "allow_changed_data": False,
    "batch_size": 256, "micro_batch": None, "lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4,
    "label_smoothing": 0.0, "mixup": 0.0, "cutmix": 0.0, "ema": 0.0,
    "schedule": "plateau", "plateau_epochs": 5, "step_epochs": 30, "warmup_epochs": 5.0,
    "device": "auto", "precision": "auto", "compile": "auto", "compile_mode": "default", "fuse": "none", "parallel": "auto",
    "fc_ranks": None, "collective_minutes": 15.0, "lost_seconds": 60.0, "grad_compression": "none",
    "pad_channels": False, "deterministic": False, "decoder": "auto", "hw_decoder_load": 0.65, "threads": None, "prefetch": 2,
    "read_threads": None, "read_ahead": 8, "checkpoint_minutes": 30.0, "keep": 2, "log_every": 20, "wandb": False,
    "profile_memory": False, "inspect": None, "dry_run": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("data", "others"),
    [
        ("imagenet", {}),
        (
            "digits",
            {
                "train_scale": "36", "crop": 32, "batch_size": 32, "epochs": 14, "schedule": "cosine", "step_epochs": 3,
                "warmup_epochs": 1.0,
            },
        ),
        ("synthetic", {"lr": 1e-4}),
    ],
)  # fmt: skip
def test_every_default_is_what_recipes_and_readers_count_on(data, others):
    expected = {**IMAGENET, "data": data, "out": Path(f"runs/D-{data}"), **others}
    assert dataclasses.asdict(parse_args(["--data", data])) == expected


def test_digits_brings_its_own_defaults_and_flags_override_them():
    config = parse_args(["--data", "digits", "--arch", "A"])
    assert (config.crop, config.scale, config.out) == (32, (36, 36), Path("runs/A-digits"))
    assert parse_args(["--data", "digits", "--crop", "64", "--train-scale", "70"]).crop == 64


def test_data_defaults_to_the_environment_then_imagenet_then_digits(elsewhere, monkeypatch):
    assert parse_args([]).data == "digits"
    (elsewhere / "data/imagenet").mkdir(parents=True)
    assert parse_args([]).data == "data/imagenet"
    monkeypatch.setenv("VGG_DATA", "/somewhere/else")
    assert parse_args([]).data == "/somewhere/else"
    assert parse_args([]).out == Path("runs/D-else")


def test_dashes_and_underscores():
    assert parse_args(["--batch_size", "8", "--weight-decay=0.1"]) == parse_args(
        ["--batch-size=8", "--weight_decay", "0.1"]
    )


@pytest.mark.parametrize(
    ("flags", "choice"),
    [
        ([], "auto"),
        (["--compile"], "on"),
        (["--compile", "--lr", "1"], "on"),
        (["--no-compile"], "off"),
        (["--no_compile"], "off"),
        (["--compile", "auto"], "auto"),
    ],
)
def test_compile_is_a_flag_with_three_states(flags, choice):
    assert parse_args(flags).compile == choice


@pytest.mark.parametrize(
    ("scale", "train", "validation"), [("256", (256, 256), 256), ("384", (384, 384), 384), ("256-512", (256, 512), 384)]
)
def test_scales(scale, train, validation):
    config = parse_args(["--data", "x", "--train-scale", scale])
    assert (config.scale, config.test_scale) == (train, validation)
    assert parse_args(["--data", "x", "--train-scale", scale, "--validation-scale", "288"]).test_scale == 288


RANDOM_RESIZED = ["--data", "x", "--crop-mode", "random-resized"]


def test_random_resized_crops_are_torchvisions_by_default():
    config = parse_args(RANDOM_RESIZED)
    assert config.area == (0.08, 1.0)
    assert config.aspect == (3 / 4, 4 / 3)
    assert config.test_scale == 256
    own = parse_args([*RANDOM_RESIZED, "--crop-area", "0.35-1", "--crop-aspect", "1", "--validation-scale", "288"])
    assert (own.area, own.aspect, own.test_scale) == ((0.35, 1.0), (1.0, 1.0), 288)


@pytest.mark.parametrize(("flags", "scale"), [(["--crop", "288"], 329), (["--data", "digits"], 36)])
def test_without_a_training_scale_validation_keeps_torchvisions_share_of_the_image(flags, scale):
    """256 pixels for 224; the default training scale, which has no meaning, may be less than the crop."""
    assert parse_args([*RANDOM_RESIZED, *flags]).test_scale == scale


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--arch", "F"], "invalid choice 'F' for argument '--arch'"),
        (["--crop", "100"], "--crop 100: must be a multiple of 32"),
        (["--crop", "0"], "multiple of 32"),
        (["--lr", "fast"], "--lr"),
        (["--lr", "nan"], "--lr nan: must be a finite number"),
        (["--epochs", "9" * 400], r"--epochs: must be in \(-2\^63, 2\^63\)"),
        (["--learning-rate", "1"], "Unrecognized options: --learning-rate"),
        (["--train-scale", "large"], "--train-scale large: give one number"),
        (["--train-scale", "512-256"], "must not exceed"),
        (["--crop", "288", "--data", "x"], "must be at least the crop, 288"),
        (["--validation-scale", "200", "--data", "x"], "--validation-scale 200: must be at least the crop, 224"),
        (
            [*RANDOM_RESIZED, "--train-scale", "256-512"],
            "--train-scale 256-512: --crop-mode random-resized has no scale; leave one of the two out",
        ),
        (["--crop-area", "0.2-1"], "--crop-area 0.2-1: needs --crop-mode random-resized"),
        (["--crop-aspect", "1"], "--crop-aspect 1: needs --crop-mode random-resized"),
        ([*RANDOM_RESIZED, "--crop-area", "large"], "--crop-area large, --crop-aspect 3/4-4/3: give ranges, as 0.08-1"),
        ([*RANDOM_RESIZED, "--crop-area", "0-1"], r"--crop-area 0-1: must be in \(0, 1\]"),
        ([*RANDOM_RESIZED, "--crop-area", "0.5-2"], r"--crop-area 0.5-2: must be in \(0, 1\]"),
        ([*RANDOM_RESIZED, "--crop-area", "0.5-0.1"], "--crop-area 0.5-0.1: the first number must not exceed"),
        ([*RANDOM_RESIZED, "--crop-aspect", "1/0"], r"--crop-aspect 1/0: must be in \[0.01, 100\]"),
        ([*RANDOM_RESIZED, "--crop-aspect", "1-inf"], r"--crop-aspect 1-inf: must be in \[0.01, 100\]"),
        ([*RANDOM_RESIZED, "--crop-aspect", "4/3-3/4"], "--crop-aspect 4/3-3/4: the first number must not exceed"),
        (
            ["--std", "58,57"],
            "--std 58,57: give a number for each of red, green and blue, with commas, as 58.395,57.12",
        ),
        (["--std", "a,b,c"], "--std a,b,c: give a number for each"),
        (["--std", "0.229,0.224,0.225"], r"--std 0.229,0.224,0.225: must be in \[1, 255\], as pixels are in 0–255"),
        (["--std", "58,nan,57"], r"--std 58,nan,57: must be in \[1, 255\]"),
        (["--batch-size", "0"], "at least 1"),
        (["--steps", "0"], "at least 1"),
        (["--dropout", "1"], r"in \[0, 1\)"),
        (["--label-smoothing", "1"], r"--label-smoothing 1.0: must be in \[0, 1\)"),
        (["--mixup", "-0.1"], r"--mixup -0.1: must be in \[0, 100\]"),
        (["--mixup", "101"], r"--mixup 101.0: must be in \[0, 100\]"),
        (["--cutmix", "101"], r"--cutmix 101.0: must be in \[0, 100\]"),
        (["--ema", "1"], r"--ema 1.0: must be in \[0, 1\)"),
        (["--weights", "a.pt", "--init-from", "b.pt"], "--weights and --init-from: give one of them"),
        (["--inspect", "4", "--dry-run"], "--inspect and --dry-run: give one of them"),
        (["--freeze", "classifier"], "invalid choice 'classifier' for argument '--freeze'"),
        (
            ["--freeze", "features"],
            "--freeze and --head-epochs keep layers as a run starts with them; say with --weights",
        ),
        (["--head-epochs", "1", "--init-from", "a.pt"], "--freeze and --head-epochs keep layers as a run starts with"),
        (["--head-epochs", "-1", "--weights", "a.pt"], "--head-epochs -1.0: must not be negative"),
        (["--head-lr-factor", "0"], "--head-lr-factor 0.0: must be above 0"),
        (["--seed", "-1"], "--seed"),
        (["--threads", "1000000"], r"--threads 1000000: must be in \[1, 1024\]"),
        (["--read-threads", "1000000"], r"--read-threads 1000000: must be in \[1, 1024\]"),
        (["--prefetch", "100000000"], r"--prefetch 100000000: must be in \[1, 1024\]"),
        (["--collective-minutes", "1e300"], r"--collective-minutes 1e\+300: must be in \(0, 100000\]"),
        (["--lost-seconds", "1e300"], r"--lost-seconds 1e\+300: must be in \[1, 100000\]"),
        (["--hw-decoder-load", "1.5"], r"--hw-decoder-load 1.5: must be in \[0, 1\]"),
        (["--recipe", "none.yaml"], "--recipe none.yaml: cannot be read"),
    ],
)
def test_wrong_flags_are_named_in_one_sentence(flags, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_args(flags)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize(
    "flags", [Config(), FeatureFlags(checkpoint="x", data="x", output=Path("x"))], ids=["train", "features"]
)
def test_numbers_are_finite(flags, value):
    """Of all flags, whatever their other limits are; but --checkpoint-minutes inf is none within an epoch."""
    numbers = [field.name for field in dataclasses.fields(flags) if isinstance(getattr(flags, field.name), float)]
    assert numbers
    for name in numbers:
        changed = dataclasses.replace(flags, **{name: float(value)})
        if (name, value) == ("checkpoint_minutes", "inf"):
            check_numbers(changed)
        else:
            with pytest.raises(UserError, match=f"--{name.replace('_', '-')} {value}: must be a finite number"):
                check_numbers(changed)


def test_recipe_gives_defaults_that_flags_override(elsewhere):
    recipe = elsewhere / "recipe.yaml"
    recipe.write_text(
        "arch: E\ndata: digits\nlr: 1e-3\nbatch-size: 8\nweight_decay: 0.1\ncompile: on\ndeterministic: true\n"
    )
    config = parse_args(["--recipe", str(recipe), "--batch-size", "16"])
    assert (config.arch, config.lr, config.weight_decay, config.compile) == ("E", 1e-3, 0.1, "on")
    assert config.deterministic
    assert config.batch_size == 16
    assert config.crop == 32, "the recipe's data set brings its defaults"
    assert config.out == Path("runs/E-digits")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arhc: A", "unknown key arhc"),
        ("recipe: other.yaml", "unknown key recipe"),
        ("arch: F", "invalid choice 'F'"),
        ("crop: wide", "--crop"),
        ("- arch", "must be lines of the form"),
        ("arch: [", "must be lines of the form"),
        ('arch: "A', "not YAML"),
        ("", "must be lines of the form"),
        ("epochs: 1:30", "--epochs"),
        ("steps: " + "1" * 5000, "--steps"),
        ("lr: -1", "--lr -1.0: must be above 0"),
    ],
)
def test_wrong_recipes_are_refused(elsewhere, text, message):
    (elsewhere / "recipe.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        parse_args(["--recipe", "recipe.yaml"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# only this", "it is empty"),
        ("lr: 0.1\nseed: 1\nlr: 0.2", "line 3 gives lr again"),
        ("micro-batch: 8\nmicro_batch: 4", "micro-batch is given twice"),
        ("lr: 0.1\n---\nlr: 0.2", "a second document begins at line 2"),
        ("lr: &a 0.1", "line 1 has an alias or an anchor"),
        ("lr: *a", "line 1 has an alias or an anchor"),
        ("lr: !!float 1", "line 1 has a tag"),
        ("seed: 1\ndata: !!python/object/apply:os.getcwd []", "line 2 has a tag"),
        ("seed: 1\nlr: [0.1]", "line 2 is not of that form"),
        ("lr: {of: 0.1}", "line 1 is not of that form"),
        ("? [a]\n: 1", "line 1 is not of that form"),
        ("<<: 3", "unknown key <<"),
        ('"a\\eb": 1', r"unknown key a\\x1bb;"),
        ("data: a\0b", "not YAML"),
        ('data: "a\\0b"', "line 1 has characters that no flag can have"),
        ('data: "a\\uD800"', "line 1 has characters that no flag can have"),
        ("wandb: 3", "wandb must be true or false"),
        ("#" * 100_000, "it has more than 64 kB"),
    ],
)
def test_recipes_that_are_no_flat_table(elsewhere, text, message):
    (elsewhere / "recipe.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_recipe(Path("recipe.yaml"))
    assert "\n" not in str(caught.value)


_NINE_TIMES = "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in itertools.pairwise("abcdefghijklmnop"))
HUGE_YAML = {
    "aliases of aliases": f"a: &a [{','.join('x' * 9)}]\n{_NINE_TIMES}",
    "lists in lists": "[" * 60_000,
    "lists in a value": "lr: " + "[" * 60_000,
    "tables in tables": "{a: " * 15_000,
    "dashes": "- " * 30_000,
    "question marks": "? " * 30_000,
}


@pytest.mark.parametrize("text", HUGE_YAML.values(), ids=HUGE_YAML)
def test_little_yaml_that_means_much_is_refused_at_once(elsewhere, text):
    """It would take minutes and all memory, or more depth than Python's stack has."""
    (elsewhere / "recipe.yaml").write_text(text)
    started = time.process_time()
    with pytest.raises(UserError, match="must be lines of the form"):
        read_recipe(Path("recipe.yaml"))
    assert time.process_time() - started < 2  # 0.1 s


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("seed: 010", ["--seed=010"]),
        ("lr: 1e-3", ["--lr=1e-3"]),
        ("out: 1.10", ["--out=1.10"]),
        ("out: 2001-12-14t21:59:43.10-05:00", ["--out=2001-12-14t21:59:43.10-05:00"]),
        ("data: no", ["--data=no"]),
        ("data: --no-compile", ["--data=--no-compile"]),
        ("steps: null\nthreads:\nmicro_batch: ~", []),
        ("compile: on", ["--compile=on"]),
        ("compile: true", ["--compile=on"]),
        ("wandb: off", ["--no-wandb"]),
        ("{lr: 0.1, seed: 3}", ["--lr=0.1", "--seed=3"]),
        ("\ufefflr: 0.1\r\n", ["--lr=0.1"]),
        ('data: "a\\udcffb"', ["--data=a\udcffb"]),
    ],
)
def test_values_of_a_recipe_stand_as_on_the_command_line(elsewhere, text, flags):
    """YAML 1.1 takes 010 for 8, 1.10 for 1.1, `no` for false, and some texts for times."""
    (elsewhere / "recipe.yaml").write_bytes(text.encode())
    assert read_recipe(Path("recipe.yaml")) == flags


@pytest.mark.parametrize("path", ["/", "/dev/zero", "none.yaml", "latin"])
def test_what_is_no_file_of_text_is_no_recipe(elsewhere, path):
    (elsewhere / "latin").write_bytes(b"data: \xe4")
    with pytest.raises(UserError, match=r"cannot be read|it has more than 64 kB"):
        read_recipe(Path(path))


def test_saved_configuration_is_a_recipe_that_gives_the_same(elsewhere):
    config = parse_args(
        ["--data", "digits", "--arch", "B", "--lr", "0.003", "--compile", "--deterministic", "--steps", "7"]
    )
    save_config(config, elsewhere / "config.yaml")
    assert set(yaml.safe_load((elsewhere / "config.yaml").read_text())) == {
        field.name for field in dataclasses.fields(Config) if field.name != "recipe"
    }
    again = parse_args(["--recipe", "config.yaml"])
    assert dataclasses.replace(again, recipe=None) == config


@pytest.mark.parametrize("data", ["digits", "x"])
def test_a_saved_configuration_with_random_resized_crops_is_a_recipe_too(elsewhere, data):
    """It has a training scale, which nobody gave."""
    config = parse_args([*RANDOM_RESIZED, "--data", data, "--crop-aspect", "0.5-2", "--std", "58.395,57.12,57.375"])
    save_config(config, elsewhere / "config.yaml")
    assert dataclasses.replace(parse_args(["--recipe", "config.yaml"]), recipe=None) == config


def test_help_comes_at_once_and_describes_every_flag():
    started = time.perf_counter()
    command = [sys.executable, str(ROOT / "train.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert time.perf_counter() - started < 2  # 0.2 s when the machine is idle; with torch imported it would be 4 s
    for field in dataclasses.fields(Config):
        assert f"--{field.name.replace('_', '-')}" in done.stdout


@pytest.mark.parametrize("program", ["train.py", "evaluate.py", "features.py", "export.py", "predict.py"])
def test_help_fits_a_terminal_of_80_columns(program):
    done = subprocess.run([sys.executable, ROOT / program, "--help"], capture_output=True, text=True, check=True)
    assert max(len(line) for line in done.stdout.splitlines() if not line.startswith("usage: ")) <= 80


def test_help_shows_the_flags_in_groups():
    done = subprocess.run([sys.executable, ROOT / "train.py", "--help"], capture_output=True, text=True, check=True)
    titles = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("╭─")]
    assert titles == ["options", "run", "network", "image", "training", "computing", "loading", "recording"]


def test_help_into_a_pipe_that_closes_is_no_error():
    command = f"set -o pipefail; {sys.executable} {ROOT / 'train.py'} --help | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: train.py")


def test_the_shell_can_complete_flags_and_their_values():
    command = [sys.executable, str(ROOT / "train.py"), "--tyro-print-completion", "bash"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--train-scale" in done.stdout
    assert "max-autotune-no-cudagraphs" in done.stdout
    subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=True)
