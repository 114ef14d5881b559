"""The stub of libnvidia-ml.so.1, compiled, and programs run with it in place of the driver's."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def compile_stub(folder: Path, without: tuple[str, ...] = ()) -> Path:
    """Compile nvml_stub.c into the folder, less some functions. Returns the folder. Skips the test without a compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler (gcc or cc) for the stub of libnvidia-ml.so.1")
    hidden = [f"-D{function}=hidden_{function}" for function in without]
    target = ["-o", str(folder / "libnvidia-ml.so.1")]
    source = str(ROOT / "tests/support/nvml_stub.c")
    subprocess.run([compiler, "-shared", "-fPIC", *hidden, *target, source, "-lm"], check=True)
    return folder


def environment(stub: Path, **settings: str) -> dict[str, str]:
    """This process's, with the stub first among libraries and NVML_STUB_<setting>=value; without CUDA_VISIBLE_DEVICES."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("CUDA_", "NVML_STUB_"))}
    libraries = os.pathsep.join([str(stub), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])])
    return {**kept, "LD_LIBRARY_PATH": libraries} | {f"NVML_STUB_{name}": value for name, value in settings.items()}


def run_python(code: str, env: dict[str, str], *, binding_without: tuple[str, ...] = ()) -> dict:
    """Run code that prints a line of JSON, last; what it says. The code finds our modules, NvmlSampler, sleep and now.

    binding_without: functions and constants that nvidia-ml-py lacks in this run, as an older version does.
    """
    older = f"import pynvml\nfor name in {binding_without}: delattr(pynvml, name)\n" if binding_without else ""
    begin = f"{older}import json, os, sys\nfrom time import perf_counter as now, sleep\nfrom perf.telemetry import NvmlSampler\n"
    done = subprocess.run(
        [sys.executable, "-c", begin + code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    return json.loads(done.stdout.splitlines()[-1], parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
