"""What `pip install .` gives: the loaders, in packages that come whole, and nothing that is in the way of other modules."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.documented import copy_of_the_project
from tests.support.repository import ROOT, files

PACKAGES = ("common", "pipeline")

USE = """
import cProfile, json, sys
import pipeline.dataset.manifest
assert not {"torch", "nvidia.dali"} & set(sys.modules), "the loaders are imported when they are asked for"
from pipeline import TrainLoader, ValidationLoader
train = TrainLoader("digits", batch_size=8, crop=32, scale=(36, 36))
images, labels = next(iter(train))
print(json.dumps([pipeline.__file__, *images.shape, len(labels), len(ValidationLoader("digits", batch_size=100, crop=32))]))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, since setuptools leaves its own folders beside the sources; without the network."""
    folder = tmp_path_factory.mktemp("installation")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    command += ["--wheel-dir", str(folder), str(copy_of_the_project(folder))]
    subprocess.run(command, check=True, cwd=folder)
    (found,) = folder.glob("*.whl")
    return found


def test_the_wheel_has_these_packages_whole(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == {str(path.relative_to(ROOT)) for path in files(*PACKAGES)}


def test_a_loop_elsewhere_finds_the_loaders(wheel, tmp_path):
    installed, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    zipfile.ZipFile(wheel).extractall(installed)
    elsewhere.mkdir()
    command = [sys.executable, "-c", f"import sys\nsys.path.insert(0, {str(installed)!r})\n{USE}"]
    done = subprocess.run(command, cwd=elsewhere, check=True, capture_output=True, text=True)
    place, *shapes = json.loads(done.stdout)
    assert Path(place).is_relative_to(installed)
    assert shapes == [8, 3, 32, 32, 8, 4]
