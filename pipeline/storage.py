"""Where prepared data lies: a folder, or an S3-compatible object store. Both are read by ranges, from many threads."""

import collections
import io
import os
import shutil
import threading
from collections.abc import Sequence
from typing import Any, BinaryIO, Protocol

from common.errors import TrainingError, UserError
from common.progress import say

S3_SCHEME = "s3://"

_MAX_OPEN_FILES = 256  # of the 1024 that most systems allow a process
_MAX_GAP_BYTES = 64 << 10  # reading on over such a gap takes less time than a second request
_MAX_BUFFERS = 1000  # of one request; Linux allows 1024
_BEYOND_END = "beyond the end of the file"
_GAP = memoryview(bytearray(_MAX_GAP_BYTES))  # where the bytes between two images go; nobody reads it


class Storage(Protocol):
    """Named files that can be read by ranges."""

    url: str
    """The folder, as an absolute path, or the URL, without a slash at its end."""
    threads: int
    """Requests in flight that suit it."""

    def read(self, name: str, offsets: Sequence[int], targets: Sequence[memoryview]) -> None:
        """Fill each target with the bytes of file `name` from its offset on; offsets ascend.

        What lies in an unreadable place or beyond the end is filled with zeros, with a warning: such an image will not be
        decodable, and the run goes on without it. Raises TrainingError where the file as a whole cannot be read.
        """

    def copy(self, name: str, target: BinaryIO) -> None:
        """Write the whole content of file `name` into target. Raises UserError."""

    def sizes(self) -> dict[str, int]:
        """The files that are there, with their sizes in bytes. Raises UserError."""


def open_storage(url: str) -> Storage:
    """The storage of a folder or an s3:// URL. Raises UserError."""
    return S3Storage(url) if url.startswith(S3_SCHEME) else FolderStorage(url)


class FolderStorage:
    """A folder on a disk or a network mount."""

    threads = 8

    def __init__(self, folder: str) -> None:
        self.url = os.path.abspath(folder)
        self._lock = threading.Lock()
        self._files: collections.OrderedDict[str, io.FileIO] = collections.OrderedDict()

    def read(self, name: str, offsets: Sequence[int], targets: Sequence[memoryview]) -> None:
        file = self._open(name)
        descriptor, first = file.fileno(), 0
        while first < len(offsets):
            # Neighbours are read with one system call, straight into their places.
            end = offsets[first] + len(targets[first])
            buffers = [targets[first]]
            last = first + 1
            while last < len(offsets) and 0 <= offsets[last] - end <= _MAX_GAP_BYTES and len(buffers) < _MAX_BUFFERS:
                buffers += [_GAP[: offsets[last] - end], targets[last]]
                end = offsets[last] + len(targets[last])
                last += 1
            try:
                complete = os.preadv(descriptor, buffers, offsets[first]) == end - offsets[first]
            except OSError:
                complete = False
            if not complete:
                for offset, target in zip(offsets[first:last], targets[first:last], strict=True):
                    self._read_one(name, descriptor, offset, target)
            first = last

    def copy(self, name: str, target: BinaryIO) -> None:
        try:
            with open(os.path.join(self.url, name), "rb") as file:
                shutil.copyfileobj(file, target)
        except OSError as error:
            raise UserError(f"{self.url}/{name}: cannot be read ({error.strerror})") from error

    def sizes(self) -> dict[str, int]:
        try:
            with os.scandir(self.url) as entries:
                return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        except OSError as error:
            raise UserError(f"{self.url}: cannot be read ({error.strerror})") from error

    def _read_one(self, name: str, descriptor: int, offset: int, target: memoryview) -> None:
        done, cause = 0, _BEYOND_END
        try:
            while done < len(target) and (count := os.preadv(descriptor, [target[done:]], offset + done)):
                done += count
        except OSError as error:
            cause = str(error.strerror)
        if done < len(target):
            _fill_with_zeros(f"{self.url}/{name}", offset, target, cause)

    def _open(self, name: str) -> io.FileIO:
        with self._lock:
            if name in self._files:
                self._files.move_to_end(name)
                return self._files[name]
        try:
            file = io.FileIO(os.path.join(self.url, name))
        except OSError as error:
            raise TrainingError(_unreadable(f"{self.url}/{name}", error.strerror)) from error
        with self._lock:
            self._files[name] = file
            if len(self._files) > _MAX_OPEN_FILES:
                self._files.popitem(last=False)  # closed when the last thread that reads from it lets go of it
        return file


class S3Storage:
    """A bucket, or a part of one, that speaks S3.

    Credentials, region and endpoint come from the environment, as the AWS tools have it: AWS_ACCESS_KEY_ID,
    AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION, AWS_ENDPOINT_URL (of another provider; http:// is allowed).
    """

    threads = 64  # a request waits some 50 ms for its first byte

    def __init__(self, url: str) -> None:
        try:
            from obstore.exceptions import BaseError
            from obstore.store import S3Store
        except ImportError as error:
            raise UserError(f"--data {url}: needs the package obstore; pip install obstore") from error
        self.url = url.rstrip("/")
        self._errors = (BaseError, FileNotFoundError, PermissionError)
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
        options: dict[str, Any] = {"endpoint": endpoint} if endpoint else {}
        options["region"] = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        options["client_options"] = {"allow_http": endpoint.startswith("http://")}
        try:
            self._store = S3Store.from_url(self.url, **options)
        except BaseError as error:
            raise UserError(f"--data {url}: cannot be opened ({_one_line(error)})") from error

    def read(self, name: str, offsets: Sequence[int], targets: Sequence[memoryview]) -> None:
        lengths = [len(target) for target in targets]
        try:
            # Near ranges become one request, and all requests are under way at the same time.
            ranges = self._store.get_ranges(name, starts=offsets, lengths=lengths)
        except self._errors as error:
            raise TrainingError(_unreadable(f"{self.url}/{name}", _one_line(error))) from error
        for offset, target, content in zip(offsets, targets, ranges, strict=True):
            if len(content) == len(target):
                target[:] = memoryview(content)
            else:
                _fill_with_zeros(f"{self.url}/{name}", offset, target, _BEYOND_END)

    def copy(self, name: str, target: BinaryIO) -> None:
        try:
            for chunk in self._store.get(name).stream(min_chunk_size=8 << 20):
                target.write(chunk)
        except self._errors as error:
            raise UserError(f"{self.url}/{name}: cannot be read ({_one_line(error)})") from error

    def sizes(self) -> dict[str, int]:
        try:
            return {entry["path"]: entry["size"] for page in self._store.list() for entry in page}
        except self._errors as error:
            raise UserError(f"{self.url}: cannot be read ({_one_line(error)})") from error


def _fill_with_zeros(path: str, offset: int, target: memoryview, cause: str) -> None:
    target[:] = bytes(len(target))
    say(f"warning: {path}: cannot read {len(target):,} bytes from {offset:,} on ({cause})")


def _unreadable(path: str, cause: object) -> str:
    return (
        f"{path}: cannot be read ({cause}); once it can, start the same command again to go on from the last checkpoint"
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
