"""One connection from every rank to rank 0, which the system closes when a process ends, however it ends. Held by dist.joined_ranks.

So every rank knows within a second that another one has died, even while it computes, reads, saves or hangs in a collective."""

from __future__ import annotations

import contextlib
import secrets
import selectors
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

KEY = "medgen/lifeline"
CONNECT_SECONDS = 60.0
POLL_SECONDS = 0.2
BYE = b"bye\n"

Gone = Callable[[int], None]  # told which rank has ended before its time, from a thread


class Store(Protocol):
    """The part of torch's store that is used here."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...


class _End:
    """One end of a connection: what has come in, line by line."""

    def __init__(self, connection: socket.socket, rank: int | None):
        self.connection, self.rank = connection, rank  # None: it has not said who it is
        self._received = b""

    def lines(self) -> tuple[list[bytes], bool]:
        """What has come, and whether the other process has ended. Any other OSError is the network's trouble, not a death."""
        try:
            received = self.connection.recv(4096)
        except TimeoutError:
            return [], False
        except ConnectionResetError:
            received = b""
        self._received += received
        *complete, self._received = self._received.split(b"\n")
        return complete, not received

    def send(self, line: bytes) -> None:
        with contextlib.suppress(OSError):
            self.connection.sendall(line)


@contextmanager
def held(rank: int, world_size: int, store: Store, master: tuple[str, int], gone: Gone) -> Iterator[Callable[[], None]]:
    """Hold the lines while the ranks work together; yields what to call before leaving in peace.

    `master`: where the store is. Without a connection the work goes on as well: silence is noticed later."""
    try:
        watch: _Centre | _Member = _Centre(world_size, store, master, gone) if rank == 0 else _Member(rank, store, gone)
    except OSError as error:
        if rank == 0:
            store.set(KEY, "")  # the others ask for it
        print(f"rank {rank}: no line to the other ranks ({error}): it will be noticed later if one of them dies", file=sys.stderr, flush=True)
        yield lambda: None
        return
    thread = threading.Thread(target=watch.run, daemon=True)
    thread.start()
    try:
        yield watch.leave
    finally:
        watch.stopped.set()
        thread.join(2 * POLL_SECONDS)
        watch.close()


class _Centre:
    """Rank 0's end of all lines. It passes on who has died."""

    def __init__(self, world_size: int, store: Store, master: tuple[str, int], gone: Gone):
        self.stopped = threading.Event()
        self._gone, self._others = gone, world_size - 1
        self._token = secrets.token_hex(8)
        dual = socket.has_dualstack_ipv6()
        self._listener = socket.create_server(("", 0), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual, backlog=world_size)
        self._ends: list[_End] = []
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        store.set(KEY, f"{_reachable_address(master)} {self._listener.getsockname()[1]} {self._token}")

    def run(self) -> None:
        while not self.stopped.is_set():
            for key, _ in self._selector.select(POLL_SECONDS):
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    self._hear(key.data)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            connection, _ = self._listener.accept()
            end = _End(connection, None)
            self._ends.append(end)
            self._selector.register(connection, selectors.EVENT_READ, end)

    def _hear(self, end: _End) -> None:
        try:
            lines, ended = end.lines()
        except OSError:
            lines, ended, end.rank = [], True, None
        for line in lines:
            words = line.decode(errors="replace").split()
            if end.rank is None and len(words) == 2 and words[0] == self._token and words[1].isdigit():
                end.rank = int(words[1])
            elif end.rank is None or line + b"\n" == BYE:  # a stranger, or one that leaves in peace
                ended, end.rank = True, None
        if ended:
            self._selector.unregister(end.connection)
            self._ends.remove(end)
            end.connection.close()
            if end.rank is not None:
                self._tell(b"gone %d\n" % end.rank)
                self._gone(end.rank)

    def _tell(self, line: bytes) -> None:
        for end in self._ends:
            end.send(line)

    def leave(self) -> None:
        self._tell(BYE)

    def close(self) -> None:
        self._selector.close()
        for connection in (self._listener, *(end.connection for end in self._ends)):
            connection.close()


class _Member:
    """Another rank's end of its line."""

    def __init__(self, rank: int, store: Store, gone: Gone):
        self.stopped = threading.Event()
        self._gone = gone
        known = store.get(KEY).decode().split()
        if not known:
            raise OSError("rank 0 could not offer one")
        address, port, token = known
        connection = socket.create_connection((address, int(port)), timeout=CONNECT_SECONDS)
        connection.settimeout(POLL_SECONDS)
        self._end = _End(connection, 0)
        self._end.send(f"{token} {rank}\n".encode())

    def run(self) -> None:
        while not self.stopped.is_set():
            try:
                lines, ended = self._end.lines()
            except OSError:
                return
            if BYE.rstrip() in lines:
                return
            for line in lines:
                self._gone(int(line.split()[1]))
            if ended:
                self._gone(0)
                return

    def leave(self) -> None:
        self._end.send(BYE)

    def close(self) -> None:
        self._end.connection.close()


def _reachable_address(master: tuple[str, int]) -> str:
    """Of this machine, for the others: as the store's machine sees it, or the store's own name if that is this one."""
    with socket.create_connection(master, timeout=CONNECT_SECONDS) as probe:
        here, there = probe.getsockname()[0], probe.getpeername()[0]
    return master[0] if here == there else str(here)
