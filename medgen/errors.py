"""The errors and exit codes of medgen; raised everywhere, turned into text and a status by cli.py.

Exit codes: 0 done, 1 a stage failed, 2 the input was wrong, 3 interrupted (run it again to go on),
4 not finished yet (only `watch --once`)."""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    DONE = 0
    FAILED = 1
    BAD_INPUT = 2
    INTERRUPTED = 3
    UNFINISHED = 4


class MedgenError(Exception):
    """A failure that is told in one message, without a traceback."""

    exit_code: Exit = Exit.FAILED


class InputError(MedgenError):
    """The user's spec, data or command line is wrong: the message says where and what to do."""

    exit_code = Exit.BAD_INPUT


class Interrupted(MedgenError):
    """Stopped by a signal after saving; running the same command again goes on from there."""

    exit_code = Exit.INTERRUPTED
