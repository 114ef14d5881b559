"""Prepared data in a bucket, from moto's server, which speaks S3: the same run as from a folder."""

import io
import itertools
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from common.errors import TrainingError, UserError
from pipeline import prepare
from pipeline.plan import TrainPlan
from pipeline.prepared import open_prepared
from pipeline.storage import open_storage
from tests.images import photo_folder
from tests.runs import free_port, results_of, run
from tests.test_shards import make_loader

FLAGS = ["--arch", "A", "--crop", "32", "--train-scale", "64", "--batch-size", "6", "--schedule", "step"]
FLAGS += ["--lr", "0.001", "--log-every", "1", "--epochs", "1"]
URL = "s3://images/imagenet/64"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    photos = photo_folder(tmp_path_factory.mktemp("photos"), train=24, val=9)
    destination = tmp_path_factory.mktemp("prepared") / "64"
    assert prepare.main([str(photos), str(destination), "--short-side", "64", "--shard-images", "5"]) == 0
    return destination


@pytest.fixture(scope="module")
def bucket(folder):
    """The prepared folder, copied into a bucket of a server on this machine."""
    import obstore
    from obstore.store import S3Store

    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "anyone",
        "AWS_SECRET_ACCESS_KEY": "anything",
    }
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            break
        except OSError:
            assert time.monotonic() < deadline, "moto's server does not answer"
            time.sleep(0.1)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}/images", method="PUT")).close()
        store = S3Store.from_url(
            URL, endpoint=environment["AWS_ENDPOINT_URL"], region="us-east-1", client_options={"allow_http": True}
        )
        for path in folder.iterdir():
            obstore.put(store, path.name, path)
        yield store
    server.kill()
    server.wait()


def batches(data: str, window_shards: int | None) -> list[torch.Tensor]:
    """The images of a first epoch and a half."""
    table = open_prepared(data).train
    plan = TrainPlan(table=table, batch_size=6, crop=32, scale=(64, 64), seed=0, window_shards=window_shards)
    return [images for images, _ in itertools.islice(make_loader(plan), 6)]


@pytest.mark.parametrize("window_shards", [None, 2])
def test_batches_from_a_bucket_are_those_from_the_folder(folder, bucket, window_shards):
    for here, there in zip(batches(str(folder), window_shards), batches(URL, window_shards), strict=True):
        assert torch.equal(here, there)


def test_two_ranks_train_from_a_bucket(bucket, tmp_path):
    done = run(*FLAGS, "--data", URL, "--steps", "2", "--out", str(tmp_path / "bucket"), ranks=2)
    assert results_of(done)["steps"] == 2


def test_ranges_that_reach_beyond_the_end_are_zeros(bucket, folder, capsys):
    storage, name = open_storage(URL), "train-000000.tar"
    size = storage.sizes()[name]
    assert size == (folder / name).stat().st_size
    targets = [bytearray(b"x" * 600), bytearray(b"x" * 600)]
    storage.read(name, [0, size - 100], [memoryview(target) for target in targets])
    assert targets[0] == (folder / name).read_bytes()[:600]
    assert targets[1] == bytes(600)
    assert "beyond the end" in capsys.readouterr().err


def test_a_shard_that_is_missing_is_named(bucket):
    with pytest.raises(TrainingError, match=r"s3://images/imagenet/64/train-000009.tar: cannot be read"):
        open_storage(URL).read("train-000009.tar", [0], [memoryview(bytearray(10))])


def test_damage_in_the_bucket_is_found_at_the_start(bucket, folder):
    import obstore

    content = (folder / "val-000001.tar").read_bytes()
    obstore.put(bucket, "val-000001.tar", content[:-512])
    with pytest.raises(UserError, match=r"val-000001.tar has .* bytes instead of"):
        open_prepared(URL)
    obstore.delete(bucket, "val-000001.tar")
    with pytest.raises(UserError, match=r"val-000001.tar is missing"):
        open_prepared(URL)
    obstore.put(bucket, "val-000001.tar", content)
    assert len(open_prepared(URL).val) == 9


@pytest.mark.parametrize("url", ["s3://images/elsewhere", "s3://no-such-bucket/x", "s3://"])
def test_a_wrong_url_is_said_in_a_sentence(bucket, tmp_path, capsys, url):
    assert train.main([*FLAGS, "--data", url, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("error: ")
    assert url in error


def test_the_index_is_kept_in_the_cache(bucket):
    data = open_prepared(URL)
    assert os.environ["XDG_CACHE_HOME"] in str(data.folder)
    before = {path: path.stat().st_mtime_ns for path in data.folder.iterdir()}
    again = open_prepared(URL)
    assert {path: path.stat().st_mtime_ns for path in again.folder.iterdir()} == before
    assert np.array_equal(again.train.read(np.arange(24)).source, data.train.read(np.arange(24)).source)
    assert json.dumps(again.classes) == json.dumps(data.classes)


@pytest.fixture
def hostile(bucket, folder, tmp_path, monkeypatch):
    """Replaces index.json and the table of train in the bucket, and gives a cache folder that has not seen it yet."""
    import obstore

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "deep/cache"))
    (table,) = folder.glob("train-*.npy")

    def put(description: dict | None = None, rows: np.ndarray | None = None) -> None:
        if description is not None:
            obstore.put(bucket, "index.json", json.dumps(description).encode())
        if rows is not None:
            content = io.BytesIO()
            np.save(content, rows)
            obstore.put(bucket, table.name, content.getvalue())

    put.description = json.loads((folder / "index.json").read_text())  # type: ignore[attr-defined]
    put.rows = np.load(table)  # type: ignore[attr-defined]
    yield put
    put(put.description, put.rows)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["/{place}/planted.py", "../../../planted.py", "planted.npy"])
def test_a_bucket_cannot_have_a_file_written_elsewhere(bucket, hostile, tmp_path, name):
    import obstore

    name = name.format(place=tmp_path)
    obstore.put(bucket, "planted.npy", b"anything")
    hostile({**hostile.description, "tables": {"train": name, "val": name}})
    with pytest.raises(UserError, match=r"its index is damaged \(index.json: tables of other names\)"):
        open_prepared(URL)
    assert not list(tmp_path.rglob("planted*"))


def changed(rows: np.ndarray, field: str, value: int) -> np.ndarray:
    rows = rows.copy()
    rows[3][field] = value
    return rows


TAMPERED = {
    "another label": (lambda rows: changed(rows, "label", 1 - rows[3]["label"]), "not those of its fingerprint"),
    "a label too large": (lambda rows: changed(rows, "label", 99), "a label beyond the 2 classes"),
    "beyond the shard": (lambda rows: changed(rows, "offset", 10**9), "does not lie within its shard"),
    "another shard": (lambda rows: changed(rows, "shard", 1), "another shard than its place"),
    "too few rows": (lambda rows: rows[:-1], "rows of another kind"),
    "too many rows": (lambda rows: np.concatenate([rows] * 900), "too much"),
    "another dtype": (lambda rows: np.zeros(24), "rows of another kind"),
}


@pytest.mark.parametrize(("tamper", "message"), TAMPERED.values(), ids=TAMPERED)
def test_a_tables_content_is_checked_while_it_is_copied(hostile, tmp_path, tamper, message):
    hostile(rows=tamper(hostile.rows))
    with pytest.raises(UserError, match=message):
        open_prepared(URL)
    assert not list(tmp_path.rglob("*.npy")), "nothing is kept of what was refused"
    hostile(rows=hostile.rows)
    assert len(open_prepared(URL).train) == 24
