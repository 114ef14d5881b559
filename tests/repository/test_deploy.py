"""What starts the trainer elsewhere: as far as it can be checked without Docker and Kubernetes."""

import os
import runpy
import shutil
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[2]
missing = runpy.run_path(str(ROOT / "deploy/check_versions.py"))["missing"]


@pytest.fixture(scope="module")
def jobset() -> dict:
    return yaml.safe_load((ROOT / "deploy/jobset.yaml").read_text())


def test_the_jobs_fit_kubernetes_schema(jobset):
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    for job in jobset["spec"]["replicatedJobs"]:
        as_job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"]}, **job["template"]}
        kubernetes_validate.validate(as_job, "1.31", strict=True)
        as_job["spec"]["paralelism"] = 2
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(as_job, "1.31", strict=True)


def test_the_jobset_names_its_first_pod_and_its_machines(jobset):
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    name = jobset["metadata"]["name"]
    assert environment["HOST"] == f"{name}-{job['name']}-0-0.{name}"  # JobSet's rule for the names of pods
    assert int(environment["NODES"]) == spec["parallelism"] == spec["completions"]
    assert (ROOT / container["command"][0]).is_file()
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in spec["template"]["spec"]["volumes"]}


def test_what_git_ignores_stays_out_of_images():
    """Caches and runs of the folder in which an image is built: gigabytes, and the packages of another Python."""
    ignored = (ROOT / ".gitignore").read_text().split()
    as_docker_writes_it = {line.strip("/") if line.startswith("/") else f"**/{line.strip('/')}" for line in ignored}
    assert as_docker_writes_it | {".git"} == set((ROOT / ".dockerignore").read_text().split())


def test_make_demo_in_the_image_installs_nothing(tmp_path):
    """The image has the packages, and its users may have no network: a second torch would take 6 GB."""
    lines = (ROOT / "deploy/Dockerfile.pip").read_text().splitlines()
    (prepare,) = [line.removeprefix("RUN ") for line in lines if line.startswith("RUN ") and " venv " in line]
    for name in ("Makefile", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(prepare, shell=True, check=True, cwd=tmp_path, env=os.environ | {"PATH": path})
    command = ["make", "--no-print-directory", "--dry-run", "demo"]
    done = subprocess.run(command, check=True, cwd=tmp_path, capture_output=True, text=True)
    (recipe,) = done.stdout.splitlines()
    assert recipe.startswith(".venv/bin/python train.py ")


def test_what_is_installed_here_is_what_is_asked_for():
    done = subprocess.run([sys.executable, ROOT / "deploy/check_versions.py"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_old_or_absent_package_is_named():
    assert missing("pytest>=1.0  # fine\n# a comment\n") == []
    (old,) = missing("pytest>=999")
    assert old.startswith("pytest>=999 is needed: pytest ")
    assert missing("no-such-package>=1") == ["no-such-package>=1 is needed: no-such-package is not installed"]


def test_requirements_say_where_the_module_pynvml_comes_from():
    """PyPI has a package of that name too, which is deprecated."""
    assert "nvidia-ml-py" in packages_distributions()["pynvml"]
    before, _ = (ROOT / "requirements.txt").read_text().split("nvidia-ml-py>=")
    assert "pynvml" in before.splitlines()[-1]
