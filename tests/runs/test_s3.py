"""Prepared data in a bucket, from moto's server, which speaks S3: the same run as from a folder."""

import io
import itertools
import json
import os
import re
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
from common import patience
from common.errors import DataSourceError, TrainingError, UserError
from pipeline.plan.training import TrainPlan
from pipeline.preparation import packing
from pipeline.shards import storage
from pipeline.shards.index import open_prepared
from pipeline.shards.storage import S3Storage, open_storage
from tests.pipeline.test_shards import make_loader
from tests.support import s3_servers
from tests.support.images import photo_folder
from tests.support.launch import free_port, results_of, run

FLAGS = ["--arch", "A", "--crop", "32", "--train-scale", "64", "--batch-size", "6", "--schedule", "step"]
FLAGS += ["--lr", "0.001", "--log-every", "1", "--epochs", "1"]
URL = "s3://images/imagenet/64"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    photos = photo_folder(tmp_path_factory.mktemp("photos"), train=24, val=9)
    destination = tmp_path_factory.mktemp("prepared") / "64"
    assert packing.main([str(photos), str(destination), "--short-side", "64", "--shard-images", "5"]) == 0
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


def test_windows_from_a_bucket_are_those_from_the_folder(bucket, tmp_path, monkeypatch):
    """Of images that are kept as pixels; one is cut in the bucket, and lost there."""
    import obstore
    from obstore.store import S3Store

    photos, folder, url = photo_folder(tmp_path / "photos", train=24, val=9), tmp_path / "raw", "s3://images/raw"
    flags = ["--short-side", "64", "--shard-images", "5", "--format", "raw"]
    assert packing.main([str(photos), str(folder), *flags]) == 0
    store = S3Store.from_url(
        url, endpoint=os.environ["AWS_ENDPOINT_URL"], region="us-east-1", client_options={"allow_http": True}
    )
    for path in folder.iterdir():
        obstore.put(store, path.name, path)
    for window_shards in (None, 2):
        for here, there in zip(batches(str(folder), window_shards), batches(url, window_shards), strict=True):
            assert torch.equal(here, there)
    table = open_prepared(url).train
    content = (folder / "train-000000.tar").read_bytes()
    obstore.put(store, "train-000000.tar", content[: table.read(np.array([4])).source[0, 1] + 1000])
    plan, lost = TrainPlan(table=table, batch_size=6, crop=32, scale=(64, 64), seed=0), set()

    def lose(samples, dead, reasons):
        lost.update(samples.rows.tolist())
        plan.lose(samples, dead)

    for _ in zip(range(12), make_loader(plan, lose=lose), strict=False):
        pass
    assert lost == {4}


@pytest.mark.slow
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


# ---- servers that do not behave ----------------------------------------------------------------------------------


@pytest.fixture
def credentials(monkeypatch):
    """Of somebody, and patience for a test."""
    for name, value in (
        ("ACCESS_KEY_ID", "THE-KEY"),
        ("SECRET_ACCESS_KEY", "THE-SECRET"),
        ("SESSION_TOKEN", "THE-TOKEN"),
    ):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setattr(patience, "PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr(patience, "PATIENCE_TO_OPEN_SECONDS", 0.5)
    monkeypatch.setattr(storage, "_ANSWER_SECONDS", 1)
    monkeypatch.setattr(patience, "_warned_at", -100.0)

    def at(url: str) -> S3Storage:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        return S3Storage("s3://bucket/data")

    return at


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_redirect_is_named_and_gets_no_credentials(credentials, host):
    with s3_servers.server(lambda _: s3_servers.content(b"{}"), host) as (other, asked_there):
        with s3_servers.server(lambda path: (307, {"Location": f"{other}{path}"}, b"")) as (url, asked_here):
            with pytest.raises(
                UserError, match=rf"does not serve it \(the server redirects to {other[7:]}, which is not"
            ):
                credentials(url)
    assert not asked_there
    assert all("THE-TOKEN" not in str(headers) and "THE-KEY" not in str(headers) for headers in asked_here)


def test_a_server_that_begins_to_redirect_in_mid_run_sends_no_credentials_elsewhere(credentials):
    redirects: list[str] = []

    def answer(path: str) -> s3_servers.Answer:
        if redirects:
            return 307, {"Location": f"{redirects[0]}{path}"}, b""
        return s3_servers.error(403, "AccessDenied", "Access Denied")

    with s3_servers.server(lambda _: s3_servers.content(b"x" * 10), "localhost") as (other, asked_there):
        with s3_servers.server(answer) as (url, _):
            opened = credentials(url)
            redirects.append(other)
            with pytest.raises(DataSourceError, match=r"the server redirects to another host, which is not followed"):
                opened.read("train-000000.tar", [0], [memoryview(bytearray(10))])
    assert not asked_there


REFUSALS = {
    403: ("AccessDenied", "Access Denied", "AccessDenied: Access Denied (403 Forbidden)"),
    400: (
        "ExpiredToken",
        "The provided token has expired.",
        "ExpiredToken: The provided token has expired. (400 Bad Request)",
    ),
    401: ("InvalidToken", "No THE-TOKEN here.", "InvalidToken: No … here. (401 Unauthorized)"),
    404: (
        "NoSuchKey",
        "The specified key does not exist.",
        "NoSuchKey: The specified key does not exist. (404 Not Found)",
    ),
}


@pytest.mark.parametrize("status", REFUSALS)
def test_the_servers_reason_comes_first_and_credentials_not_at_all(credentials, capsys, status):
    """In mid-run, as where a token expires: without a second try, since it will be refused for ever."""
    code, message, expected = REFUSALS[status]
    with s3_servers.server(lambda _: s3_servers.error(status, code, message)) as (url, asked):
        opened = credentials(url)
        before = len(asked)
        with pytest.raises(
            DataSourceError, match=re.escape(f"train-000000.tar: cannot be read ({expected}); once it can")
        ):
            opened.read("train-000000.tar", [0], [memoryview(bytearray(10))])
        assert len(asked) == before + 1
        for action in (opened.sizes, lambda: opened.copy("index.json", io.BytesIO(), 1000)):
            with pytest.raises(UserError, match=re.escape(f"cannot be read ({expected})")) as error:
                action()
            assert "THE-" not in str(error.value)
    assert capsys.readouterr().err == ""


def test_a_silent_server_is_waited_for_with_a_word_and_not_for_long(credentials, capsys):
    started = time.monotonic()
    with s3_servers.server(lambda _: None) as (url, _):
        with pytest.raises(UserError, match=r"does not serve it \(no answer within 15 s\)"):
            credentials(url)
    assert time.monotonic() - started < 10
    assert "s3://bucket/data: cannot be read (no answer within 15 s); trying again for up to" in capsys.readouterr().err


def test_a_server_that_falls_silent_in_mid_run(credentials, capsys):
    silent: list[bool] = []
    with s3_servers.server(lambda _: None if silent else s3_servers.content(b"x")) as (url, _):
        opened = credentials(url)
        silent.append(True)
        started = time.monotonic()
        with pytest.raises(
            DataSourceError, match=r"train-000000.tar: cannot be read \(no answer within 15 s\); once it can"
        ):
            opened.read("train-000000.tar", [0], [memoryview(bytearray(10))])
    assert time.monotonic() - started < 20
    assert "cannot be read (no answer within 15 s); trying again" in capsys.readouterr().err


def test_a_server_that_is_overloaded_for_a_moment_is_asked_again(credentials):
    answers = [s3_servers.error(503, "SlowDown", "Please reduce your request rate."), s3_servers.content(b"y" * 10)]
    with s3_servers.server(lambda _: answers.pop(0) if len(answers) > 1 else answers[0]) as (url, _):
        opened = credentials(url)
        target = io.BytesIO()
        opened.copy("index.json", target, 100)
    assert target.getvalue() == b"y" * 10


@pytest.mark.parametrize(
    "endpoint", ["localhost:9000", "ftp://host", "http://", "http://[", "http://user:THE-SECRET@host"]
)
def test_an_endpoint_that_is_none_is_said_at_once(credentials, endpoint):
    with pytest.raises(UserError, match=r"AWS_ENDPOINT_URL is not of the form https://host:port") as error:
        credentials(endpoint)
    assert "THE-SECRET" not in str(error.value)


def test_a_server_that_is_not_there_is_named_with_the_reason(credentials, capsys):
    with pytest.raises(UserError, match=r"http://127.0.0.1:9 does not serve it \(Connection refused\)"):
        credentials("http://127.0.0.1:9")
    assert "cannot be read (Connection refused); trying again" in capsys.readouterr().err
