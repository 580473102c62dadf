"""The options of sbatch as they stand in `#SBATCH` lines: names, values, what an option replaces. Used by plan.py and launch/."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from medgen.errors import InputError
from medgen.names import CONTROL, printable

# the short forms of sbatch(1), 20.11 to 24.11; those that take no value are in FLAGS
SHORT = {
    "A": "account", "a": "array", "B": "extra-node-info", "C": "constraint", "c": "cpus-per-task", "D": "chdir", "d": "dependency",
    "e": "error", "F": "nodefile", "G": "gpus", "h": "help", "H": "hold", "I": "immediate", "i": "input", "J": "job-name",
    "k": "no-kill", "L": "licenses", "M": "clusters", "m": "distribution", "N": "nodes", "n": "ntasks", "O": "overcommit",
    "o": "output", "p": "partition", "Q": "quiet", "q": "qos", "S": "core-spec", "s": "oversubscribe", "t": "time",
    "V": "version", "v": "verbose", "w": "nodelist", "W": "wait", "x": "exclude", "b": "begin",
}  # fmt: skip
SHORT_FLAGS = set("hHkOQsVvW")
# long options without a value, or whose value must be joined by "="
LONG_FLAGS = {
    "contiguous", "exclusive", "get-user-env", "help", "hold", "ignore-pbs", "immediate", "kill-on-invalid-dep", "no-kill", "no-requeue",
    "overcommit", "oversubscribe", "parsable", "propagate", "quiet", "reboot", "requeue", "share", "spread-job", "test-only", "usage",
    "use-min-nodes", "verbose", "version", "wait", "wait-all-nodes", "x11", "nice",
}  # fmt: skip
LONGEST_NUMBER = 12  # digits; int() refuses thousands of them
SAME_MEANING = {"share": "oversubscribe", "no-requeue": "requeue", "workdir": "chdir"}


def directive_line(option: str) -> str:
    """`#SBATCH <option>`. Raises InputError where a newline in it would begin another directive, or a command."""
    if CONTROL.search(option):
        raise InputError(f"#SBATCH {printable(option)}: a line of sbatch options holds no control characters; look for a newline in the spec or site profile")
    return f"#SBATCH {option}"


def options_of(line: str) -> list[tuple[str, str | None]]:
    """(long name, value) of every option in the text after `#SBATCH`; a value may stand apart. Raises ValueError for open quotes."""
    words = shlex.split(line, comments=True)
    options: list[tuple[str, str | None]] = []
    while words:
        word = words.pop(0)
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            apart = not equals and name not in LONG_FLAGS and words and not words[0].startswith("-")
            options.append((name, words.pop(0) if apart else value if equals else None))
        elif word.startswith("-") and len(word) > 1:
            name = SHORT.get(word[1], word[1])
            if word[1] in SHORT_FLAGS:
                options.append((name, None))
            elif len(word) > 2:
                options.append((name, word[2:].removeprefix("=")))
            else:
                options.append((name, words.pop(0) if words else None))
    return options


def names_of(line: str) -> set[str]:
    """What the line decides; two spellings of one thing have one name."""
    return {SAME_MEANING.get(name, name) for name, _ in options_of(line)}


def decided(lines: list[str]) -> set[str]:
    return {name for line in lines for name in names_of(line)}


def without(lines: list[str], names: set[str]) -> list[str]:
    """The lines that decide nothing of `names`."""
    return [line for line in lines if not names_of(line) & names]


@dataclass(frozen=True)
class Amounts:
    """What lines of options ask for, None where they do not say or not in one number."""

    time_minutes: int | None = None
    nodes: int | None = None
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    mem_mebibytes: int | None = None


def amounts(lines: list[str]) -> Amounts:
    """For planning; the last of several counts."""
    said = {SAME_MEANING.get(name, name): value or "" for line in lines for name, value in options_of(line)}
    nodes = _whole(said.get("nodes", ""))
    gpus = re.fullmatch(r"gpu(?::[A-Za-z]\w*)?(?::(\d{1,9}))?", said.get("gres", ""))
    per_node = int(gpus.group(1) or 1) if gpus else _whole(said.get("gpus-per-node", "").rpartition(":")[2])
    in_all = _whole(said.get("gpus", "").rpartition(":")[2])
    memory = re.fullmatch(r"(\d{1,12})([MGT]?)B?", said.get("mem", ""), flags=re.IGNORECASE)
    return Amounts(
        time_minutes=minutes(said.get("time", "")),
        nodes=nodes,
        gpus_per_node=per_node if per_node is not None else in_all if (nodes or 1) == 1 else None,
        cpus_per_task=_whole(said.get("cpus-per-task", "")),
        mem_mebibytes=int(memory.group(1)) * {"": 1, "M": 1, "G": 1024, "T": 1024**2}[memory.group(2).upper()] or None if memory else None,
    )


def minutes(value: str) -> int | None:
    """A time limit as Slurm reads it, in whole minutes rounded up; None for no limit and for what is no time.

    `30` is minutes, `30:00` minutes and seconds, `1-12` days and hours."""
    match = re.fullmatch(r"(?:(\d{1,9})-)?(\d{1,9})(?::(\d{1,9}))?(?::(\d{1,9}))?", value.strip())
    if match is None:
        return None
    days, *clock = match.groups()
    first, second, third = (int(part or 0) for part in clock)
    if days is not None:
        seconds = int(days) * 86400 + first * 3600 + second * 60 + third
    elif clock[2] is not None:
        seconds = first * 3600 + second * 60 + third
    else:
        seconds = first * 60 + second
    return -(-seconds // 60) or None


def _whole(value: str) -> int | None:
    return int(value) or None if value.isdecimal() and len(value) <= LONGEST_NUMBER else None
