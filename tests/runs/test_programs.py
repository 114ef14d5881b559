"""How every program starts, speaks and ends (common/process.py): Ctrl-C, its streams, its launcher, its home, its cores."""

import json
import os
import pwd
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from common import files, process
from common.errors import TrainingError, UserError
from common.process import read_launch, run_program, usable_cores, visible
from common.progress import say, show
from tests.support.images import photo_folder
from tests.support.launch import SMALL, environment, free_port, start, wait_for
from tests.support.repository import ROOT, main_elsewhere, programs
from tests.support.repository import files as sources

PROGRAMS = programs()
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def command(program: Path, *flags: str) -> list[str]:
    if len(program.parts) > 1 and program.parts[0] != "profile":  # of a package
        return [sys.executable, "-m", ".".join(program.with_suffix("").parts), *flags]
    return [sys.executable, str(ROOT / program), *flags]


def script(folder: Path, body: str, *before: str) -> list[str]:
    """A command that runs a program with this body, as all of them are made."""
    lines = ["from common.start import begin", "begin()", *before, "from common import process", "def work():"]
    lines += [f"    {line}" for line in body.splitlines()]
    lines += ["process.end(lambda: process.run_program(work))"]
    (folder / "program.py").write_text("\n".join(lines))
    return [sys.executable, str(folder / "program.py")]


def run(arguments: list[str], **options) -> subprocess.CompletedProcess:
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment(), **options}
    return subprocess.run(arguments, cwd=ROOT, timeout=100, check=False, text=True, **options)


# ---- all programs ------------------------------------------------------------------------------------------------


def test_every_program_begins_and_ends_as_all_do():
    with_main = [
        path.relative_to(ROOT)
        for path in sources("*.py", ":!tests", ":!deploy", ":!docs")
        if "\nif __name__ ==" in path.read_text()
    ]
    assert sorted(with_main) == PROGRAMS
    assert len(PROGRAMS) > 20
    for program in PROGRAMS:
        # python -m benchmarks.NAME imports that package first.
        first = Path("benchmarks/__init__.py") if program.parts[0] == "benchmarks" else program
        source = (ROOT / first).read_text()
        assert "from common.start import begin\n\n    begin()" in source, program
        main = main_elsewhere(program)
        body = (ROOT / f"{main.replace('.', '/')}.py").read_text() if main else source
        assert "run_program(" in body, program
        assert first == program or re.search("^@program$|run_program", (ROOT / program).read_text(), re.M), program
        head = source[: source.index("    begin()")]
        for line in head.splitlines():
            assert not line.startswith(("import torch", "import numpy", "from engine", "from pipeline")), program


@pytest.fixture(scope="module")
def interrupting(tmp_path_factory) -> dict[str, str]:
    """An environment in which Ctrl-C comes while the first library is imported that is not Python's own, or tarfile."""
    folder = tmp_path_factory.mktemp("stubs")
    for name in ("numpy", "torch", "tyro", "yaml", "matplotlib", "rich", "scipy", "msgspec", "tarfile"):
        (folder / f"{name}.py").write_text(
            "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(5)\n"
        )
    return {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}"}


@pytest.mark.parametrize("program", PROGRAMS, ids=str)
def test_ctrl_c_while_a_program_imports_is_one_line(program, interrupting):
    done = run(command(program), env=interrupting)
    assert done.returncode == 130, done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("interrupted")


# ---- Ctrl-C ------------------------------------------------------------------------------------------------------


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1)


def test_ctrl_c_is_130_and_what_helps(capsys):
    def work() -> int:
        interrupt()
        return 0

    assert run_program(work, interrupted=lambda: "interrupted; again") == 130
    assert capsys.readouterr().err == "interrupted; again\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_that_a_library_makes_an_error_of_stays_ctrl_c(capsys):
    """DALI does so with what its callbacks raise, torch.save with what its writers do."""

    def work() -> int:
        try:
            interrupt()
        except KeyboardInterrupt:
            raise TrainingError("cannot write a checkpoint (unexpected pos)") from None
        return 0

    assert run_program(work) == 130
    assert capsys.readouterr().err == "interrupted\n"


IN_C = """
import ctypes
lock = ctypes.create_string_buffer(64)
libc = ctypes.CDLL(None)
libc.pthread_mutex_lock(lock)
print("waiting", flush=True)
libc.pthread_mutex_lock(lock)
"""
SWALLOWED = """
import time
print("waiting", flush=True)
while True:
    try:
        time.sleep(100)
    except KeyboardInterrupt:
        pass
"""
IN_A_DESTRUCTOR = """
import time
class Loud:
    def __del__(self):
        print("waiting", flush=True)
        time.sleep(1)
while True:
    Loud()
"""


@pytest.mark.parametrize("body", [IN_C, SWALLOWED, IN_A_DESTRUCTOR], ids=["in C", "swallowed", "in a destructor"])
def test_ctrl_c_ends_who_does_not_hear_it(tmp_path, body):
    arguments = script(tmp_path, body + "\nreturn 0", "import common.process as p; p._SECONDS_TO_UNWIND = 0.5")
    child = subprocess.Popen(arguments, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout
    assert child.stdout.readline() == "waiting\n"
    time.sleep(0.3)  # it is where it waits
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=20)
    assert (child.returncode, said) == (130, "interrupted\n")


def test_the_third_ctrl_c_ends_who_handles_it_otherwise_and_does_not_come_to_it(tmp_path):
    """As a training that wants to save first, while it waits for other ranks in C++."""
    own = "import signal\nsignal.signal(signal.SIGINT, lambda *_: None)"
    arguments = script(tmp_path, own + IN_C + "\nreturn 0", "import common.process as p; p._SECONDS_OF_ONE = 0.2")
    child = subprocess.Popen(arguments, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout
    assert child.stdout.readline() == "waiting\n"
    time.sleep(0.3)
    for _ in range(2):
        child.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert child.poll() is None
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=20)
    assert (child.returncode, said) == (130, "interrupted\n")


def test_ctrl_c_stays_ignored_where_it_was(tmp_path):
    """As behind nohup, or in a script's background."""
    arguments = script(tmp_path, "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nprint('on')\nreturn 0")
    done = run(["bash", "-c", f'trap "" INT; exec {arguments[0]} {arguments[1]}'])
    assert (done.returncode, done.stdout) == (0, "on\n")


def test_ctrl_c_while_libraries_clean_up_ends_without_a_traceback():
    program = (
        "import atexit, time; from common.process import end; "
        "atexit.register(lambda: (print('cleaning', flush=True), time.sleep(60))); end(lambda: 0)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout
        assert running.stdout.readline() == "cleaning\n"
        running.send_signal(signal.SIGINT)
        assert running.communicate(timeout=30)[1] == ""
        assert running.returncode == -signal.SIGINT


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.5, 1, 2, 4, 8])
def test_ctrl_c_at_any_moment_of_a_training(tmp_path, seconds):
    child = start(*SMALL, "--steps", "500", "--checkpoint-minutes", "0", "--out", str(tmp_path))
    time.sleep(seconds)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("interrupted")
    assert said.count("interrupted") == 1


@pytest.mark.slow
def test_ctrl_c_says_what_helps(tmp_path):
    def interrupted(*flags: str) -> str:
        child = start(*SMALL, "--steps", "500", "--out", str(tmp_path), *flags)
        wait_for(child, "step ")
        child.send_signal(signal.SIGINT)
        return child.communicate(timeout=60)[1].splitlines()[-1]

    again = "interrupted; start the same command again to go on from the last checkpoint"
    assert interrupted() == again  # it saves first
    assert interrupted("--resume", str(tmp_path / "last.pt")).endswith(
        "--resume auto to go on from the last checkpoint"
    )


# ---- streams -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def latin_1(tmp_path_factory) -> Path:
    """Images in folders that are named in Latin-1, as a zip from Windows has them."""
    folder = photo_folder(tmp_path_factory.mktemp("data") / os.fsdecode(b"caf\xe9"), train=2, val=2)
    for split in ("train", "val"):
        (folder / split / "class0").rename(folder / split / os.fsdecode(b"th\xe9"))
    assert run([sys.executable, "-m", "pipeline.manifest", str(folder)]).returncode == 0
    return folder


@pytest.mark.parametrize(
    ("redirection", "code", "said"),
    [
        (
            ">&-",
            1,
            "error: stdout cannot be written (it was closed): what was to be printed there is lost, files are not",
        ),
        (">/dev/full", 1, "error: stdout cannot be written (No space left on device): what was to be printed"),
        ("2>&-", 0, ""),
        ("2>/dev/full", 0, ""),
        ("<&- >&- 2>&-", 1, ""),
        ("| true", 0, ""),
    ],
)
def test_streams_that_are_closed_or_full(latin_1, redirection, code, said):
    line = f'set -o pipefail; "$PY" -m pipeline.manifest "$DATA" {redirection}'
    done = run(["bash", "-c", line], env={**environment(), "PY": sys.executable, "DATA": str(latin_1)})
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert said in done.stderr
    if code == 0 and "|" not in redirection:
        assert json.loads(done.stdout.splitlines()[-1])["train"] == 2


def test_a_closed_stderr_is_not_a_file_that_is_opened_later(tmp_path):
    arguments = script(
        tmp_path, f"import os\nfile = open({str(tmp_path / 'data')!r}, 'w')\nos.write(2, b'noise')\nreturn 0"
    )
    assert run(["bash", "-c", f"{arguments[0]} {arguments[1]} 2>&-"]).returncode == 0
    assert (tmp_path / "data").read_text() == ""


def test_a_stdout_that_does_not_block_loses_nothing():
    """As some terminals and parents make theirs: what it has no room for was dropped."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def read() -> bytes:
        time.sleep(0.2)  # until then, the pipe is full
        with os.fdopen(reading, "rb") as reader:
            return reader.read()

    with ThreadPoolExecutor(1) as pool:
        received = pool.submit(read)
        stream = process._text(writing, None)
        stream.write("x" * 1_000_000)
        stream.flush()
        os.close(writing)
        assert len(received.result()) == 1_000_000


def test_the_exit_code_outlives_a_reader_that_leaves(tmp_path):
    arguments = script(
        tmp_path, "import time\ntime.sleep(0.5)\nprint('x' * 100000)\nprint('{}', flush=True)\nreturn 75"
    )
    done = run(["bash", "-c", f"{arguments[0]} {arguments[1]} | true; echo ${{PIPESTATUS[0]}}"])
    assert (done.stdout, done.stderr) == ("75\n", "")


@pytest.mark.parametrize("encoding", ["ascii", "utf-8:strict"])
def test_names_in_no_encoding_are_printed(tmp_path, encoding):
    body = r"""
from common.progress import show
show('th\udce9')
print('caf\udce9 \xe9')
process.sys.stderr.write('\udce9')
return 0
"""
    done = run(script(tmp_path, body), env={**environment(), "PYTHONIOENCODING": encoding})
    own = "\\xe9" if encoding == "ascii" else "é"
    assert (done.returncode, done.stdout, done.stderr) == (0, f"th\\udce9\ncaf\\udce9 {own}\n", "\\udce9")


def test_results_with_names_in_no_encoding_parse_back(latin_1):
    done = run(
        [sys.executable, "-m", "pipeline.manifest", str(latin_1)],
        env={**environment(), "PYTHONIOENCODING": "utf-8:strict"},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["data"] == str(latin_1)


@pytest.mark.parametrize("columns", ["1", "abc"])
def test_narrow_terminals_end(columns):
    """tyro's frames did not come to an end in one column."""
    done = run([sys.executable, "train.py", "--nonsense"], env={**environment(), "COLUMNS": columns})
    assert done.returncode == 2
    assert done.stderr == "error: Unrecognized options: --nonsense; train.py --help lists the flags\n"


# ---- sentences ---------------------------------------------------------------------------------------------------

HOSTILE = "a\x1b[2J\r\x07\n\u202e\u2028" + os.fsdecode(b"\xff")


def test_errors_are_one_line_of_printable_characters(capsys):
    def work() -> int:
        raise UserError(f"class {HOSTILE}: é is fine")

    assert run_program(work) == 2
    error = capsys.readouterr().err
    assert error == "error: class a\\x1b[2J\\r\\x07\\n\\u202e\\u2028\\udcff: é is fine\n"
    assert visible(HOSTILE).isprintable()


def test_lines_for_people_hold_no_control_characters(capsys):
    say(f"one {HOSTILE}")
    show(f"two {HOSTILE}")
    printed = capsys.readouterr()
    for text in (printed.err, printed.out):
        assert text.replace("\n", "").isprintable()
        assert "\\x1b[2J" in text


@pytest.mark.parametrize(
    ("action", "code", "words"),
    [
        (lambda folder: open(folder / ("a" * 300)), 2, "File name too long"),  # noqa: SIM115
        (lambda folder: (folder / "file" / "below").mkdir(), 2, "file/below: Not a directory"),
        (lambda folder: (folder / "circle").read_text(), 2, "circle: Too many levels of symbolic links"),
        (lambda folder: open("/dev/full", "w").write("x" * 100_000), 1, "No space left on device (in test_programs.py"),  # noqa: SIM115
        (lambda folder: bytearray(1 << 62), 1, "this machine's memory is used up"),
    ],
)
def test_errors_of_files_and_memory_are_sentences(tmp_path, capsys, action, code, words):
    (tmp_path / "file").touch()
    (tmp_path / "circle").symlink_to("circle")
    assert run_program(lambda: action(tmp_path)) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert words in error


def test_limits_of_memory_and_threads_are_sentences(capsys, monkeypatch):
    """ulimit -v, under which torch's libraries do not load, and ulimit -u, under which no thread starts, not even the first."""

    def import_torch() -> int:
        raise ImportError("libtorch_cpu.so: failed to map segment from shared object")

    assert run_program(import_torch) == 1
    assert "no more memory or threads (libtorch_cpu.so: failed to map segment" in capsys.readouterr().err

    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    assert run_program(lambda: 0) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: the system gives this process no more memory or threads (can't start new thread)")
    assert error.count("\n") == 1


@pytest.mark.parametrize("below", ["file/below", "a" * 300])
def test_a_destination_that_cannot_be_made_is_the_users(tmp_path, capsys, below):
    from pipeline.preparation.packing import main

    data = photo_folder(tmp_path / "data", train=1, val=1)
    (tmp_path / "file").touch()
    assert main([str(data), str(tmp_path / below)]) == 2
    assert ": cannot be written (" in capsys.readouterr().err


def test_faults_of_a_program_keep_their_traceback():
    with pytest.raises(KeyError):
        run_program(lambda: dict[str, int]()["x"])


# ---- launchers ---------------------------------------------------------------------------------------------------

WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def given(monkeypatch, variables: dict[str, str]) -> None:
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "launch"),
    [
        ({}, None),
        (WHOLE, (1, 2, 0, 1)),
        ({**WHOLE, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, (1, 2, 1, 2)),
        ({**WHOLE, "LOCAL_RANK": "1"}, (1, 2, 1, 1)),
        ({"RANK": ""}, None),
        ({"RANK": "0"}, None),
        ({"WORLD_SIZE": "1"}, None),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, None),
        ({"LOCAL_RANK": "3"}, None),
        ({"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, None),
    ],
)
def test_launchers_are_understood(monkeypatch, variables, launch):
    given(monkeypatch, variables)
    assert read_launch() == launch


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 in the environment, without RANK, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "3"}, "or unset RANK"),
        ({"RANK": "x"}, "or unset RANK"),
        ({**WHOLE, "RANK": ""}, "without RANK:"),
        ({**WHOLE, "MASTER_PORT": ""}, "without MASTER_PORT:"),
        ({**WHOLE, "RANK": "2"}, "RANK=2 but WORLD_SIZE=2"),
        ({**WHOLE, "RANK": "-1"}, "RANK=-1: must be a whole number from 0 on"),
        ({**WHOLE, "WORLD_SIZE": "9" * 20}, "WORLD_SIZE=99999999999999999999: must be a whole number"),
        ({**WHOLE, "WORLD_SIZE": "two"}, "WORLD_SIZE=two: must be a whole number from 1 on"),
        ({**WHOLE, "LOCAL_RANK": "1.5"}, "LOCAL_RANK=1.5: must be a whole number from 0 on"),
        ({**WHOLE, "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "the ranks of a machine count from 0"),
        ({**WHOLE, "LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE=3, WORLD_SIZE=2: the ranks of a machine"),
        ({**WHOLE, "MASTER_PORT": "70000"}, "MASTER_PORT=70000: must be in 1–65535"),
    ],
)
def test_half_a_launcher_is_refused(monkeypatch, capsys, variables, words):
    given(monkeypatch, variables)
    monkeypatch.setattr(process, "_SECONDS_FOR_RANK_0", 0.0)
    assert run_program(lambda: bool(read_launch())) == 2
    assert words in capsys.readouterr().err


def test_left_overs_of_one_process_are_ignored_with_a_warning(monkeypatch, capsys):
    from common.ranks import ranks_of_this_run

    given(monkeypatch, {"RANK": "0", "LOCAL_RANK": "5", "LOCAL_WORLD_SIZE": "64"})
    with ranks_of_this_run("cpu") as ranks:
        assert (ranks.rank, ranks.local_rank, ranks.world_size, ranks.cpu_share) == (0, 0, 1, usable_cores())
    assert "warning: ignoring RANK, LOCAL_RANK, LOCAL_WORLD_SIZE in the environment" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK=1 but 1 GPUs on this machine"),
        ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, "2 processes on this machine but 1 GPUs"),
    ],
)
def test_a_rank_without_a_gpu_of_its_own_is_refused(monkeypatch, variables, words):
    from common.ranks import ranks_of_this_run

    given(monkeypatch, WHOLE | variables)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.set_device", lambda number: pytest.fail(f"chooses GPU {number}"))
    with pytest.raises(UserError, match=words), ranks_of_this_run("cuda"):
        pass


RANK = """
import sys
import torch, torch.distributed as dist
from common.errors import TrainingError
from common.ranks import on_rank_0, ranks_of_this_run
process._SECONDS_FOR_RANK_0 = 2.0
def full():
    raise OSError(28, "No space left on device", "/full")
with ranks_of_this_run("cpu") as ranks:
    if sys.argv[1] == "in rank 0's turn":
        on_rank_0(ranks, full)
    elif ranks.rank == 1:
        raise TrainingError("the true sentence")
    dist.all_reduce(torch.ones(1))
return 0
"""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("of rank 1", ["error: the ranks have lost each other (", "error: the true sentence"]),
        pytest.param(
            "in rank 0's turn",
            ["error: /full: No space left on device", "error: rank 0 has failed (OSError: "],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_an_error_of_one_rank_ends_the_other_soon(tmp_path, error, said):
    """It is told although the other one is inside a collective operation, and the other one does not wait for its time limit."""
    arguments, port, began = script(tmp_path, RANK), str(free_port()), time.monotonic()
    ranks = [
        subprocess.Popen(
            [*arguments, error],
            env={
                **environment(),
                "WORLD_SIZE": "2",
                "RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = [rank.communicate(timeout=100)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1]
    for text, beginning in zip(told, said, strict=True):
        lines = [line for line in text.splitlines() if line.startswith("error")]
        assert len(lines) == 1
        assert lines[0].startswith(beginning)
        assert "Traceback" not in text
    assert time.monotonic() - began < 90


# ---- the machine -------------------------------------------------------------------------------------------------


def test_a_user_without_name_and_home_gets_one(monkeypatch, tmp_path):
    def unknown(number: int) -> None:
        raise KeyError(number)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path))
    for name in ("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def work() -> int:
        import getpass

        assert getpass.getuser() == f"uid-{os.getuid()}"
        assert files.cache_folder() == Path.home() / ".cache/vgg-dali"
        assert Path.home().parent == tmp_path
        assert Path.home().stat().st_mode & 0o777 == 0o700
        return 0

    assert run_program(work) == 0


def test_a_home_that_cannot_be_written_is_done_without(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert files.cache_folder() == tmp_path / "home/.cache/vgg-dali"
    assert not (tmp_path / "home").exists(), "asking writes nothing"
    monkeypatch.setattr(files.os, "access", lambda path, mode: False)  # root may write anywhere
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path))
    assert files.cache_folder() == tmp_path / f"vgg-dali-{os.getuid()}"


def test_a_folder_that_somebody_else_has_put_there_is_not_used(monkeypatch, tmp_path):
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path))
    planted = tmp_path / f"vgg-dali-{os.getuid()}"
    planted.symlink_to(tmp_path)
    with pytest.raises(UserError, match="somebody else"):
        files.private_folder()
    planted.unlink()
    planted.mkdir()
    planted.chmod(0o777)
    with pytest.raises(UserError, match="somebody else"):
        files.private_folder()
    planted.chmod(0o700)
    assert files.private_folder() == planted


@pytest.mark.parametrize(
    ("groups", "limits", "cores"),
    [
        ("0::/a/b\n", {}, 8),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000"}, 8),
        ("0::/a/b\n", {"a/b/cpu.max": "300000 100000"}, 3),
        ("0::/a/b\n", {"a/b/cpu.max": "300000 100000", "a/cpu.max": "150000 100000"}, 2),
        ("0::/a/b\n", {"a/cpu.max": "10000 100000"}, 1),
        ("0::/host/path\n", {"cpu.max": "200000 100000"}, 2),  # a container, in which its own group is the root
        ("0::/../../x\n", {"cpu.max": "200000 100000"}, 2),
        ("4:cpu,cpuacct:/a\n1:name=systemd:/b\n", {"cpu,cpuacct/a/cpu.cfs_quota_us": "250000"}, 3),
        ("4:cpu:/a\n", {"cpu/cpu.cfs_quota_us": "-1"}, 8),
        ("4:memory:/a\n", {"cpu/a/cpu.cfs_quota_us": "100000"}, 8),
        ("nonsense\n", {"cpu.max": "100000 100000"}, 8),
    ],
)
def test_cores_are_those_of_the_control_groups_too(monkeypatch, tmp_path, groups, limits, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(groups)
    for name, text in limits.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
        if path.name == "cpu.cfs_quota_us":
            (path.parent / "cpu.cfs_period_us").write_text("100000\n")
    assert usable_cores(tmp_path) == cores


def test_cores_without_control_groups(tmp_path):
    assert usable_cores(tmp_path) == len(os.sched_getaffinity(0))
