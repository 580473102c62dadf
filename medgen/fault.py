"""Faults on demand: MEDGEN_FAULT makes a process kill, stop or spoil itself at a named place. Called at those places, for tests.

    MEDGEN_FAULT="site=ckpt.write,nth=2,action=kill9;site=step,stage=train,rank=1,step=5,action=stop"

Nothing is armed without the variable: then each place costs one `if`."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from medgen.errors import InputError
from medgen.world import rank_from_environment

VARIABLE = "MEDGEN_FAULT"
LOG_VARIABLE = "MEDGEN_FAULT_LOG"  # a file that gets a line per fault: how a test knows that it happened
SITES = (
    "start", "rdzv", "step", "validate", "ckpt.write", "ckpt.commit", "ckpt.load", "shard.write", "shard.commit", "outcome.write",
    "submit.after_sbatch", "submit.before_record",
)  # fmt: skip
FILTERS = ("rank", "attempt", "shard", "step", "nth")
ACTIONS = "kill9, stop, term, sleep:SECONDS, raise, oom, hold:MEBIBYTES, enospc, nan, truncate:PERCENT, exit:CODE"


class InjectedFault(RuntimeError):
    """What `action=raise` raises: like any defect, it is not told in advance."""


@dataclass
class Fault:
    """One fault and how often its place has been passed. A filter that is None fits everything."""

    site: str
    action: str
    argument: float
    stage: str | None = None
    filters: dict[str, int] = field(default_factory=dict)
    passed: int = 0


@dataclass
class Here:
    """Which task this process works on; task.py says it."""

    stage: str = ""
    shard: int = 0
    attempt: int = 0


def parse(text: str) -> list[Fault]:
    """Raises InputError that names what is wrong."""
    return [_parse_one(part) for part in text.split(";") if part.strip()]


def _parse_one(text: str) -> Fault:
    words: dict[str, str] = {}
    for word in text.split(","):
        key, separator, value = (part.strip() for part in word.partition("="))
        if not separator or key not in ("site", "action", "stage", *FILTERS) or key in words:
            raise InputError(f"{VARIABLE}: {word.strip()!r}: write site=..., action=... and, once each, any of stage=, {'=, '.join(FILTERS)}=")
        words[key] = value
    if words.get("site") not in SITES:
        raise InputError(f"{VARIABLE}: site={words.get('site')}: it is one of: {', '.join(SITES)}")
    action, _, argument = words.get("action", "").partition(":")
    needs_argument = action in ("sleep", "hold", "truncate", "exit")
    if action not in [known.partition(":")[0] for known in ACTIONS.split(", ")] or needs_argument != bool(argument):
        raise InputError(f"{VARIABLE}: action={words.get('action')}: it is one of: {ACTIONS}")
    limits = {"exit": (0, 255), "sleep": (0, 86400), "hold": (0, 2**20), "truncate": (0, 100)}
    if action in ("nan", "truncate") and words["site"] not in {"nan": ("step",), "truncate": ("ckpt.write", "shard.write")}[action]:
        raise InputError(f"{VARIABLE}: action={action} does nothing at site={words['site']}: nan is for step, truncate for ckpt.write and shard.write")
    try:
        if needs_argument and not limits[action][0] <= float(argument) <= limits[action][1]:
            raise InputError(f"{VARIABLE}: action={words['action']}: what follows lies between {limits[action][0]} and {limits[action][1]}")
        filters = {name: int(words[name]) for name in FILTERS if name in words}
        return Fault(words["site"], action, float(argument or 0), words.get("stage"), filters)
    except ValueError:
        raise InputError(f"{VARIABLE}: {text.strip()}: {', '.join(FILTERS)} and what follows the action are numbers") from None


def _from_environment() -> list[Fault]:
    try:
        return parse(os.environ.get(VARIABLE, ""))
    except InputError as error:  # at import: nobody is there yet to catch it
        print(f"medgen: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


_faults = _from_environment()
_log = os.environ.get(LOG_VARIABLE)  # now: around sbatch there is no such variable
ARMED = bool(_faults)
here = Here()
_held: list[bytes] = []  # what `hold` took


def at(site: str, path: Path | None = None, step: int | None = None) -> str | None:
    """Do what is armed for this place, now. Returns the action if the place itself must do it (`nan`), else None.

    `path`: the file that `truncate` shortens; `step`: of the training."""
    rank = rank_from_environment()[0]
    for fault in _faults:
        facts = {"rank": rank, "attempt": here.attempt, "shard": here.shard, "step": step}
        if fault.site != site or fault.stage not in (None, here.stage) or any(facts[name] != value for name, value in fault.filters.items() if name != "nth"):
            continue
        fault.passed += 1
        if fault.passed != fault.filters.get("nth", 1):
            continue
        _tell(f"{site} {fault.action} stage={here.stage} shard={here.shard} rank={rank} attempt={here.attempt} step={step} pid={os.getpid()}")
        _do(fault, path)
        return fault.action
    return None


def _tell(line: str) -> None:
    print(f"{VARIABLE}: {line}", file=sys.stderr, flush=True)
    if _log is not None:
        with open(_log, "a") as log:
            log.write(line + "\n")


def _do(fault: Fault, path: Path | None) -> None:
    match fault.action:
        case "kill9":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "term":
            os.kill(os.getpid(), signal.SIGTERM)
        case "sleep":
            time.sleep(fault.argument)
        case "raise":
            raise InjectedFault(f"at {fault.site}")
        case "oom":
            raise MemoryError(f"at {fault.site}")
        case "hold":
            _held.append(b"x" * int(fault.argument * 2**20))  # written to, so that it is really there
        case "enospc":
            raise OSError(28, os.strerror(28), str(path or ""))
        case "exit":
            os._exit(int(fault.argument))
        case "truncate" if path is not None:
            os.truncate(path, int(path.stat().st_size * fault.argument / 100))
