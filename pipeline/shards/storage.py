"""Where prepared data lies: a folder, or an S3-compatible object store. Both are read by ranges, from many threads."""

import collections
import errno
import http.client
import io
import os
import re
import resource
import ssl
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, BinaryIO, Protocol, TypeVar

from common import patience
from common.errors import UserError
from common.files import is_storage_trouble
from common.patience import StorageTrouble, patiently, unreadable
from common.progress import printable, say

S3_SCHEME = "s3://"

_MOST_OPEN_FILES = 256
_MAX_GAP_BYTES = 64 << 10  # reading on over such a gap takes less time than a second request
_MAX_BUFFERS = 1000  # of one request; Linux allows 1024
_BLOCK_BYTES = 8 << 20  # of a file that is copied
_GAP = memoryview(bytearray(_MAX_GAP_BYTES))  # where the bytes between two images go; nobody reads it

# Of an object store: for a connection, and for the next bytes of an answer.
_CONNECT_SECONDS, _ANSWER_SECONDS = 5, 15
_NO_ANSWER = f"no answer within {_ANSWER_SECONDS} s"
_RANGE_NOT_SATISFIABLE = 416
_NOWHERE = "127.0.0.1:0"  # an address at which nobody can listen

T = TypeVar("T")


class Storage(Protocol):
    """Named files that can be read by ranges."""

    url: str
    """The folder, as an absolute path, or the URL, without a slash at its end."""
    threads: int
    """Requests in flight that suit it."""

    def read(self, name: str, offsets: Sequence[int], targets: Sequence[memoryview]) -> set[int]:
        """Fill each target with the bytes of file `name` from its offset on; offsets ascend.

        What lies beyond the end of a file that is shorter is filled with zeros, with a warning: such an image will not be
        decodable, and the run goes on without it. Returns the indices of these targets. Where the storage fails, the file is
        opened anew and read again, for a minute; then, or at once where the file is not there, raises DataSourceError.
        """

    def copy(self, name: str, target: BinaryIO, most_bytes: int) -> None:
        """Write the whole content of file `name` into target. Raises UserError: it cannot be read, or is larger."""

    def sizes(self) -> dict[str, int]:
        """The files that are there, with their sizes in bytes. Raises UserError."""


def open_storage(url: str) -> Storage:
    """The storage of a folder or an s3:// URL. Raises UserError."""
    return S3Storage(url) if url.startswith(S3_SCHEME) else FolderStorage(url)


def files_to_keep_open() -> int:
    """Of those that this process may open (ulimit -n), a quarter: DALI, torch and sockets want theirs too."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST_OPEN_FILES if soft == resource.RLIM_INFINITY else max(1, min(_MOST_OPEN_FILES, soft // 4))


class FolderStorage:
    """A folder on a disk or a network mount."""

    threads = 8

    def __init__(self, folder: str) -> None:
        self.url = os.path.abspath(folder)
        self._lock = threading.Lock()
        self._files: collections.OrderedDict[str, io.FileIO] = collections.OrderedDict()
        self._most_files = files_to_keep_open()
        self._patience_seconds = patience.PATIENCE_SECONDS

    def read(self, name: str, offsets: Sequence[int], targets: Sequence[memoryview]) -> set[int]:
        path = os.path.join(self.url, name)
        try:
            return patiently(
                path, self._patience_seconds, lambda: self._attempt(lambda: self._read(name, offsets, targets))
            )
        except StorageTrouble as trouble:
            self._patience_seconds = 0.0  # the run ends: what other threads still want to read must not keep it
            raise unreadable(path, trouble) from trouble

    def copy(self, name: str, target: BinaryIO, most_bytes: int) -> None:
        path = os.path.join(self.url, name)

        def blocks() -> None:
            with open(path, "rb") as file:
                _copy(iter(lambda: file.read(_BLOCK_BYTES), b""), target, most_bytes)

        try:
            patiently(path, patience.PATIENCE_TO_OPEN_SECONDS, lambda: self._attempt(blocks))
        except StorageTrouble as trouble:
            raise UserError(f"{path}: cannot be read ({trouble})") from trouble

    def sizes(self) -> dict[str, int]:
        def listed() -> dict[str, int]:
            with os.scandir(self.url) as entries:
                return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}

        try:
            return patiently(self.url, patience.PATIENCE_TO_OPEN_SECONDS, lambda: self._attempt(listed))
        except StorageTrouble as trouble:
            raise UserError(f"{self.url}: cannot be read ({trouble})") from trouble

    def _attempt(self, action: Callable[[], T]) -> T:
        """Raises StorageTrouble where the system does not let the action read. What is open is closed then: a handle may be
        stale, or too many files open."""
        try:
            return action()
        except OSError as error:
            with self._lock:
                self._files.clear()
            # A file that is gone from a folder that is there will not come back; a folder that is gone is unmounted.
            may_pass = is_storage_trouble(error) or not os.access(self.url, os.X_OK)
            raise StorageTrouble(error.strerror or str(error), may_pass=may_pass) from error

    def _read(self, name: str, offsets: Sequence[int], targets: Sequence[memoryview]) -> set[int]:
        file = self._open(name)
        descriptor, first, beyond = file.fileno(), 0, set()
        while first < len(offsets):
            # Neighbours are read with one system call, straight into their places.
            end = offsets[first] + len(targets[first])
            buffers = [targets[first]]
            last = first + 1
            while last < len(offsets) and 0 <= offsets[last] - end <= _MAX_GAP_BYTES and len(buffers) < _MAX_BUFFERS:
                buffers += [_GAP[: offsets[last] - end], targets[last]]
                end = offsets[last] + len(targets[last])
                last += 1
            if os.preadv(descriptor, buffers, offsets[first]) != end - offsets[first]:
                for n in range(first, last):
                    if not self._read_one(name, descriptor, offsets[n], targets[n]):
                        beyond.add(n)
            first = last
        return beyond

    def _read_one(self, name: str, descriptor: int, offset: int, target: memoryview) -> bool:
        """Whether all of it is there."""
        done = 0
        while done < len(target) and (count := os.preadv(descriptor, [target[done:]], offset + done)):
            done += count
        if done < len(target):
            if os.fstat(descriptor).st_size >= offset + len(target):
                raise OSError(errno.EIO, "it ends before its end")
            _fill_with_zeros(f"{self.url}/{name}", offset, target)
            return False
        return True

    def _open(self, name: str) -> io.FileIO:
        with self._lock:
            if name in self._files:
                self._files.move_to_end(name)
                return self._files[name]
        file = io.FileIO(os.path.join(self.url, name))
        with self._lock:
            self._files[name] = file
            if len(self._files) > self._most_files:
                self._files.popitem(last=False)  # closed when the last thread that reads from it lets go of it
        return file


class S3Storage:
    """A bucket, or a part of one, that speaks S3.

    Credentials, region and endpoint come from the environment, as the AWS tools have it: AWS_ACCESS_KEY_ID,
    AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION, AWS_ENDPOINT_URL (of another provider; http:// is allowed). They
    are given to no other server than that: a redirect is not followed.
    """

    def __init__(self, url: str) -> None:
        try:
            from obstore.exceptions import BaseError
            from obstore.store import S3Store
        except ImportError as error:
            raise UserError(f"--data {url}: needs the package obstore; pip install obstore") from error
        self.url = url.rstrip("/")
        self.threads = max(1, min(64, files_to_keep_open() // 2))  # a request waits some 50 ms for its first byte
        self._patience_seconds = patience.PATIENCE_SECONDS
        self._errors = (BaseError, FileNotFoundError, PermissionError)
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
        endpoint = next(filter(None, map(os.environ.get, names)), "")
        if endpoint and not _is_server(endpoint):
            # Not shown: it may hold a password.
            raise UserError(f"--data {url}: AWS_ENDPOINT_URL is not of the form https://host:port")
        self._server = endpoint or f"https://s3.{region}.amazonaws.com"
        options: dict[str, Any] = {"endpoint": endpoint} if endpoint else {}
        options["client_options"] = {
            "allow_http": endpoint.startswith("http://"),
            "connect_timeout": f"{_CONNECT_SECONDS}s",
            "read_timeout": f"{_ANSWER_SECONDS}s",
            "timeout": "1h",  # of a whole answer, however long: the one for each part of it says whether it comes
            **_no_other_host(self._server, region),
        }
        try:
            self._store = S3Store.from_url(
                self.url,
                region=region,
                # These are not told of; later ones are, by patiently().
                retry_config={
                    "max_retries": 10,
                    "retry_timeout": timedelta(seconds=_ANSWER_SECONDS),
                    "backoff": {
                        "init_backoff": timedelta(seconds=0.1),
                        "max_backoff": timedelta(seconds=5),
                        "base": 2,
                    },
                },
                **options,
            )
        except BaseError as error:
            raise UserError(f"--data {url}: cannot be opened ({_cause(error)})") from error
        _check_no_redirect(self.url, self._server)

    def read(self, name: str, offsets: Sequence[int], targets: Sequence[memoryview]) -> set[int]:
        path = f"{self.url}/{name}"
        try:
            return patiently(
                path, self._patience_seconds, lambda: self._attempt(lambda: self._read(name, offsets, targets))
            )
        except StorageTrouble as trouble:
            self._patience_seconds = 0.0
            raise unreadable(path, trouble) from trouble

    def copy(self, name: str, target: BinaryIO, most_bytes: int) -> None:
        path = f"{self.url}/{name}"

        def chunks() -> None:
            _copy(iter(self._store.get(name).stream(min_chunk_size=_BLOCK_BYTES)), target, most_bytes)

        try:
            patiently(path, patience.PATIENCE_TO_OPEN_SECONDS, lambda: self._attempt(chunks))
        except StorageTrouble as trouble:
            raise UserError(f"{path}: cannot be read ({trouble})") from trouble

    def sizes(self) -> dict[str, int]:
        def listed() -> dict[str, int]:
            return {entry["path"]: entry["size"] for page in self._store.list() for entry in page}

        try:
            return patiently(self.url, patience.PATIENCE_TO_OPEN_SECONDS, lambda: self._attempt(listed))
        except StorageTrouble as trouble:
            raise UserError(f"{self.url}: cannot be read ({trouble})") from trouble

    def _attempt(self, action: Callable[[], T]) -> T:
        """Raises StorageTrouble where the server does not give what the action asks for."""
        try:
            return action()
        except self._errors as error:
            raise StorageTrouble(_cause(error), may_pass=_may_pass(error)) from error

    def _read(self, name: str, offsets: Sequence[int], targets: Sequence[memoryview]) -> set[int]:
        lengths = [len(target) for target in targets]
        try:
            # Near ranges become one request, and all requests are under way at the same time.
            ranges = self._store.get_ranges(name, starts=offsets, lengths=lengths)
        except self._errors as error:
            if _status(error) != _RANGE_NOT_SATISFIABLE:
                raise
            if len(targets) == 1:  # nothing of it is there
                _fill_with_zeros(f"{self.url}/{name}", offsets[0], targets[0])
                return {0}
            return self._read_each(name, offsets, targets)
        except BaseException as error:
            # What obstore 0.12 does where the file ends within ranges that it has made one request.
            if type(error).__name__ != "PanicException" or len(targets) == 1:
                raise
            return self._read_each(name, offsets, targets)
        beyond = set()
        for n, (offset, target, content) in enumerate(zip(offsets, targets, ranges, strict=True)):
            if len(content) == len(target):
                target[:] = memoryview(content)
            else:
                _fill_with_zeros(f"{self.url}/{name}", offset, target)
                beyond.add(n)
        return beyond

    def _read_each(self, name: str, offsets: Sequence[int], targets: Sequence[memoryview]) -> set[int]:
        return {n for n in range(len(targets)) if self._read(name, offsets[n : n + 1], targets[n : n + 1])}


def _is_server(endpoint: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(endpoint)
        return (
            parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and "@" not in parts.netloc
        )
    except ValueError:
        return False


def _no_other_host(server: str, region: str) -> dict[str, str]:
    """Client options with which no other host can be reached than the server, and those that give credentials.

    A redirect would be followed with the session token: only the signature is left out then. There is no option against
    that, but one for a proxy, and one for the hosts that do without it. Where the user's own proxy leads to the server, it has
    to say itself which hosts it lets through.
    """
    parts = urllib.parse.urlsplit(server)
    host = parts.hostname or ""
    if {parts.scheme, "all"} & urllib.request.getproxies().keys() and not urllib.request.proxy_bypass(parts.netloc):
        return {}
    names = ("AWS_METADATA_ENDPOINT", "AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_STS_ENDPOINT", "AWS_ENDPOINT_URL_STS")
    givers = [urllib.parse.urlsplit(os.environ.get(name, "")).hostname for name in names]
    givers += ["169.254.169.254", "fd00:ec2::254", "169.254.170.2", "169.254.170.23", f"sts.{region}.amazonaws.com"]
    if os.environ.get("AWS_S3_EXPRESS"):
        givers += [f"{region}.amazonaws.com"]  # a host for each zone
    return {"proxy_url": f"http://{_NOWHERE}", "proxy_excludes": ",".join(filter(None, (host, *givers)))}


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        return None


def _check_no_redirect(url: str, server: str) -> None:
    """Ask without credentials whether the server is there, and is not one that sends its visitors elsewhere. Raises UserError."""
    bucket, _, folder = url.removeprefix(S3_SCHEME).partition("/")
    path = urllib.parse.quote("/".join(filter(None, (bucket, folder, "index.json"))))
    opener = urllib.request.build_opener(_NoRedirects)

    def ask() -> None:
        try:
            opener.open(f"{server.rstrip('/')}/{path}", timeout=_ANSWER_SECONDS).close()
        except urllib.error.HTTPError as answer:
            place = urllib.parse.urlsplit(answer.headers.get("Location") or "").netloc
            if answer.code // 100 == 3 and place and place != urllib.parse.urlsplit(server).netloc:
                cause = f"the server redirects to {printable(place)}, which is not followed; if that is right, it is the endpoint"
                raise StorageTrouble(cause, may_pass=False) from answer
        except ssl.SSLError:
            pass  # the certificates that obstore trusts may be others
        except TimeoutError as error:
            raise StorageTrouble(_NO_ANSWER, may_pass=True) from error
        except urllib.error.URLError as error:
            if isinstance(error.reason, ssl.SSLError):
                return
            reason = error.reason
            cause = (reason.strerror if isinstance(reason, OSError) else None) or str(reason)
            cause = _NO_ANSWER if isinstance(reason, TimeoutError) else cause
            raise StorageTrouble(cause, may_pass=True) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise StorageTrouble(str(error), may_pass=isinstance(error, OSError)) from error

    try:
        patiently(url, patience.PATIENCE_TO_OPEN_SECONDS, ask)
    except StorageTrouble as trouble:
        raise UserError(f"--data {url}: {server} does not serve it ({trouble})") from trouble


def _copy(blocks: Iterator[bytes], target: BinaryIO, most_bytes: int) -> None:
    target.seek(0)
    target.truncate()
    for block in blocks:
        target.write(block)
        if target.tell() > most_bytes:
            raise StorageTrouble(f"more than {most_bytes:,} bytes, which is too much", may_pass=False)


def _fill_with_zeros(path: str, offset: int, target: memoryview) -> None:
    target[:] = bytes(len(target))
    say(f"warning: {path}: cannot read {len(target):,} bytes from {offset:,} on (beyond the end of the file)")


# ---- what obstore says in its errors -----------------------------------------------------------------------------


def _status(error: Exception) -> int | None:
    """The server's answer, by HTTP's number; None where there was none."""
    found = re.search(r"status code: (\d{3})", str(error))
    return int(found[1]) if found else None


def _may_pass(error: Exception) -> bool:
    status = _status(error)
    if status is None:
        return "HTTP error" in str(error) and _NOWHERE not in str(error)
    return status >= 500 or status in (408, 429)


def _cause(error: Exception) -> str:
    """The reason, first of all in the server's own words. Nothing else of its answer, which may repeat credentials."""
    text = str(error)
    if _NOWHERE in text:
        return "the server redirects to another host, which is not followed"
    said = [re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL) for tag in ("Code", "Message")]
    words = ": ".join(" ".join(found[1].split()) for found in said if found)
    if status := re.search(r"status code: (\d{3}[ \w-]*)", text):
        words = f"{words} ({status[1].strip()})" if words else status[1].strip()
    if not words and re.search("Timeout|TimedOut", text):
        words = _NO_ANSWER
    if not words:
        inner = re.findall(r'(?:message|error): "([^"]+)"', text)
        words = inner[-1] if inner else " ".join(text.partition("Debug source:")[0].split())
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_TOKEN"):
        if secret := os.environ.get(name):
            words = words.replace(secret, "…")
    return printable(words)[:300]
