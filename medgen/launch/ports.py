"""Job numbers for local tasks, chosen so that the rendezvous port a script derives from them is free."""

from __future__ import annotations

import itertools
import os
import socket

from medgen.launch.script import FIRST_PORT, PORTS

_NUMBERS = itertools.count(os.getpid() * 7)  # two runs on one machine start far apart


def job_id_with_free_port() -> int:
    for number in itertools.islice(_NUMBERS, PORTS):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", FIRST_PORT + number % PORTS))
            except OSError:
                continue
            return number
    raise OSError(f"no free port in {FIRST_PORT}-{FIRST_PORT + PORTS - 1} on this machine")
