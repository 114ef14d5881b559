"""Machines that are gone without a word: power cut, link down. Their kernels close no connection, and whoever waits for them in a
collective operation waits until its time limit, which has to be long, since a rank may be writing a checkpoint.

What tells the two apart is the other machine's kernel: it acknowledges what it gets, however busy the process is. So a thread
looks at the TCP connections to other ranks, as the kernel sees them (tcp(7), TCP_INFO), and has those probed in which nothing is
under way (keepalive). Where one had no answer for too long, all connections to that machine are closed. The operation that waits
then fails, as if the other process had been killed. gloo does not always hear of it in the middle of a message: where the main
thread stays where it is for half of the time again, the process ends.

TCP's own limits do not serve. TCP_USER_TIMEOUT also ends connections to a rank that is alive and reads nothing for a while.
Keepalive's probes do not count where this machine's own link is down, and stop where data are under way.
"""

import fcntl
import os
import socket
import stat
import struct
import sys
import termios
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress

from common.errors import LostRankError
from common.progress import say

_TCP_INFO = struct.Struct("8B13I")  # as far as it is of use: linux/tcp.h
_RETRANSMITS, _LAST_ANSWER = 2, 8 + 12  # how often in a row; milliseconds since the last acknowledgement
_PROBES = 12
"""More than there is time for: the kernel is to ask, and not to close."""


class LostPeers:
    """A context manager: inside it, connections to machines of which nothing is heard any more are closed."""

    def __init__(self, addresses: Collection[str], seconds: float) -> None:
        """addresses: of all ranks. seconds: without an answer, after which a machine is lost."""
        self._addresses, self._seconds = set(addresses), seconds
        self._lost: set[str] = set()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="lost peers", daemon=True)

    def __enter__(self) -> "LostPeers":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        place, since = _place_of_main_thread(), time.monotonic()
        while not self._done.wait(self._seconds / 12):
            for connection in _connections():
                with suppress(OSError):  # closed meanwhile
                    self._look_at(connection)
            now = _place_of_main_thread()
            if not self._lost or now != place:
                place, since = now, time.monotonic()
            elif time.monotonic() - since > self._seconds / 2:
                lost = ", ".join(sorted(self._lost))
                say(
                    f"warning: the connections to {lost} are closed, which the run does not hear: start the same command again"
                )
                os._exit(LostRankError.exit_code)

    def _look_at(self, connection: socket.socket) -> None:
        peer = _plain(connection.getpeername())
        if peer not in self._addresses:
            return
        was_probed = self._have_probed(connection)
        info = _TCP_INFO.unpack(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size))
        # Where the other one does not read, data wait here, and the kernel asks ever more rarely whether there is room: no loss.
        asks = info[_RETRANSMITS] or (was_probed and not _waiting_bytes(connection))
        if asks and info[_LAST_ANSWER] > 1e3 * self._seconds and peer not in self._lost:
            say(f"warning: {peer} has not answered for {self._seconds:g} s: taken to be lost")
            self._lost.add(peer)
        if peer in self._lost:
            connection.shutdown(socket.SHUT_RDWR)

    def _have_probed(self, connection: socket.socket) -> bool:
        """A third of the time in silence, then probes. Returns whether that had been said before."""
        if connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE):
            return True
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, round(self._seconds / 3)))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, round(self._seconds / 6)))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return False


def _waiting_bytes(connection: socket.socket) -> int:
    """That this end has to send, or that have not been acknowledged."""
    return int.from_bytes(fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(4)), sys.byteorder)


def _place_of_main_thread() -> tuple[int, int]:
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    return id(frame), frame.f_lasti


def own_addresses() -> list[str]:
    """Those under which this process is connected to others."""
    found = set()
    for connection in _connections():
        with suppress(OSError):
            found.add(_plain(connection.getsockname()))
    return sorted(found)


def _plain(address: tuple) -> str:
    """One and the same for IPv4, whichever kind of socket it has."""
    return address[0].removeprefix("::ffff:")


def _connections() -> Iterator[socket.socket]:
    """This process's TCP connections, each by a descriptor of its own that is closed when the next one is asked for."""
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError), _duplicate(int(name)) as connection:
            if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM:
                connection.getpeername()
                yield connection


@contextmanager
def _duplicate(descriptor: int) -> Iterator[socket.socket]:
    if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
        raise OSError
    with socket.socket(fileno=os.dup(descriptor)) as connection:
        yield connection
