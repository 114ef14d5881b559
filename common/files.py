"""Files that are written whole or not at all, and where this project keeps its own."""

import contextlib
import errno
import os
import re
import secrets
import stat
import tempfile
import tokenize
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO

from common.errors import UserError

# What the system says of a disk, a network or this process; reading again may help, and no file's content is at fault.
_STORAGE_TROUBLE = {
    errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ENOMEDIUM, errno.EUCLEAN, errno.EBADMSG,
    errno.EREMOTEIO, errno.ENOLINK, errno.ECOMM, errno.EPROTO, errno.ENOTCONN, errno.ESHUTDOWN, errno.ETIMEDOUT,
    errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.ECONNRESET,
    errno.ECONNABORTED, errno.ECONNREFUSED, errno.EKEYEXPIRED, errno.EKEYREVOKED, errno.ENOKEY, errno.ECANCELED,
    errno.EAGAIN, errno.EBUSY, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ENOLCK,
}  # fmt: skip

DAMAGED_FILE = (
    OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, OverflowError, SyntaxError, tokenize.TokenError,
    RecursionError, MemoryError,
)  # fmt: skip
"""What reading a JSON file, or one of NumPy's, can raise where anybody may have written anything into it."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new binary file that takes its name, and the old file's place, only when it is complete and on the disk.

    On any exception the temporary file is removed and what was at `path` stays as it was. Raises OSError.
    """
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    # mkstemp's 0600 would shut out the user's group; and to read the umask is to set it, for the other threads too.
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(descriptor, "w+b") as file:
            yield file
            file.flush()
            os.fsync(descriptor)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    sync_folder(path.parent)


@contextlib.contextmanager
def writing_to(path: Path, flag: str = "--out") -> Iterator[None]:
    """For the files of a path that a flag names: an OSError becomes the UserError that says which flag to change."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); choose another {flag}") from error


def half_written(names: str) -> str:
    """A regular expression for what replacing() leaves of files whose names match this one, where it is killed."""
    return rf"\.(?:{names})\.\w+\.tmp"


def link_over(source: Path, target: Path) -> None:
    """Make `target` a second name of the file `source`, replacing what was there, without a moment of neither.

    Where the file system has no hard links, `source` is copied. Raises OSError.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        with replacing(target) as file, open(source, "rb") as original:
            while block := original.read(16 << 20):
                file.write(block)
        return
    try:
        os.replace(temporary, target)
    except OSError:
        temporary.unlink()
        raise
    sync_folder(target.parent)


def open_own(path: Path, flags: int) -> int:
    """A descriptor of a file that is changed in place, made where it is not there; inherited by no other program.

    Raises OSError, also where the path is a link, or no file: what is behind it is not ours to change.
    """
    try:
        descriptor = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "it is a link, and nothing is written through one", str(path)) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return descriptor


def remove_own(folder: Path, names: str, *, but: Collection[str] = ()) -> None:
    """Remove the files whose whole names match a regular expression, but for some.

    Only regular files: what lies behind a link is not ours. Somebody else may remove them meanwhile. Raises OSError.
    """
    pattern = re.compile(names)
    with os.scandir(folder) as entries:
        found = [
            entry.path
            for entry in entries
            if pattern.fullmatch(entry.name) and entry.name not in but and entry.is_file(follow_symlinks=False)
        ]
    for path in found:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def sync_folder(folder: Path) -> None:
    """Put a folder's names on the disk, so that a rename survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some network file systems refuse to sync a folder; the rename itself has happened
    finally:
        os.close(descriptor)


def is_storage_trouble(error: OSError) -> bool:
    """Whether reading failed for the storage (a network gone, a disk that fails) or for this process (too many open files).

    Otherwise it failed for the file alone: it is gone, may not be read, or is a folder.
    """
    return error.errno in _STORAGE_TROUBLE


def cache_folder() -> Path:
    """The folder for what this project keeps outside the data folders: $XDG_CACHE_HOME/vgg-dali, else ~/.cache/vgg-dali.

    Without a home that can be written (a container's user, a batch system): one of this user's own in the temporary folder.
    Raises UserError: there is none either.
    """
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen) / "vgg-dali"
    with contextlib.suppress(RuntimeError):  # no home
        folder = Path.home() / ".cache/vgg-dali"
        there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        if os.access(there, os.W_OK | os.X_OK):
            return folder
    return private_folder()


def private_folder() -> Path:
    """A folder in the temporary folder that only this user can write to. Raises UserError.

    Others may write to the temporary folder too, and know this one's name: one that they have made is not used.
    """
    try:
        folder = Path(tempfile.gettempdir()) / f"vgg-dali-{os.getuid()}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        status = os.lstat(folder)
    except OSError as error:
        raise UserError(
            f"there is no home folder that can be written, nor a temporary one ({error.strerror}); "
            "set XDG_CACHE_HOME to a folder of yours"
        ) from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise UserError(f"{folder}: somebody else can write to it; set XDG_CACHE_HOME to a folder of yours")
    return folder
