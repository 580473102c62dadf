"""What sbatch reads in the head of a script, option by option, as sbatch itself would understand it. Used by reading.py.

The rules were taken from sbatch 22.05 by trying; older ones ignore what follows a stray word, newer ones know more options."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from medgen.sbatch_options import SHORT, SHORT_FLAGS

BLANKS = " \t\v\f\r"
MAGIC = "#SBATCH"
HETEROGENEOUS = {"hetjob", "packjob"}
FOREIGN = re.compile(r"#(PBS|BSUB)(?![A-Za-z])")
COMMENTED_OUT = re.compile(r"\s*#[#\s]*#?\s*SBATCH\b")

NO_VALUE = {
    "consolidate-segments", "contiguous", "help", "hold", "ignore-pbs", "no-requeue", "overcommit", "oversubscribe", "parsable", "quiet", "reboot",
    "requeue", "share", "spread-job", "spread-segments", "stepmgr", "test-only", "usage", "use-min-nodes", "verbose", "version", "wait",
}  # fmt: skip
JOINED_VALUE = {"exclusive", "get-user-env", "nice", "no-kill", "oom-kill-step", "propagate"}  # --nice or --nice=5, never --nice 5
VALUE = {
    "account", "acctg-freq", "array", "batch", "bb", "bbf", "begin", "chdir", "cluster", "cluster-constraint", "clusters", "comment", "constraint",
    "container", "container-id", "context", "core-spec", "cores-per-socket", "cpu-freq", "cpus-per-gpu", "cpus-per-task", "deadline", "delay-boot",
    "dependency", "distribution", "error", "exclude", "export", "export-file", "extra", "extra-node-info", "gid", "gpu-bind", "gpu-freq", "gpus",
    "gpus-per-node", "gpus-per-socket", "gpus-per-task", "gres", "gres-flags", "hint", "input", "job-name", "kill-on-invalid-dep", "licenses",
    "mail-type", "mail-user", "mcs-label", "mem", "mem-bind", "mem-per-cpu", "mem-per-gpu", "mincpus", "network", "nodefile", "nodelist", "nodes",
    "ntasks", "ntasks-per-core", "ntasks-per-gpu", "ntasks-per-node", "ntasks-per-socket", "ntasks-per-tres", "open-mode", "output", "partition",
    "power", "prefer", "priority", "profile", "qos", "reservation", "resv-ports", "segment", "signal", "sockets-per-node", "switches",
    "tasks-per-node", "thread-spec", "threads-per-core", "time", "time-min", "tmp", "tres-bind", "tres-per-task", "uid", "wait-all-nodes", "wckey",
    "workdir", "wrap",
}  # fmt: skip
LONG = NO_VALUE | JOINED_VALUE | VALUE
ONE_THING = {  # several names for one setting: the last of them counts
    "cluster": "clusters", "tasks-per-node": "ntasks-per-node", "workdir": "chdir", "share": "oversubscribe", "exclusive": "oversubscribe",
    "no-requeue": "requeue",
}  # fmt: skip
# what an earlier mention sets is not all taken back by a later one: every mention counts
ADDING = {"cpu-freq", "get-user-env", "gres-flags", "kill-on-invalid-dep", "mail-type", "mem-bind", "signal", "switches", "verbose"}


class DirectiveError(Exception):
    """sbatch refuses the head of the script: `message` says why, `line` where."""

    def __init__(self, line: int, message: str):
        super().__init__(message)
        self.line = line
        self.message = message


@dataclass(frozen=True)
class Directive:
    """One option. `text`: as it is written after `#SBATCH`, quotes included, abbreviated names in full."""

    line: int
    option: str
    value: str | None
    text: str

    @property
    def setting(self) -> str:
        return ONE_THING.get(self.option, self.option)


@dataclass(frozen=True)
class Header:
    """Line numbers start at 1. `command_line`: the first line that is no comment, behind which sbatch reads no directive."""

    effective: list[Directive]
    overridden: list[tuple[Directive, Directive]]  # one that does not count, and the later one that does
    directive_lines: list[int]
    command_line: int | None
    late: list[int]  # lines that look like directives and come too late
    commented_out: list[int]


@dataclass(frozen=True)
class Argument:
    """A word as sbatch cuts it: `value` without quotes, `raw` as written."""

    line: int
    value: str
    raw: str


def read_header(lines: list[str]) -> Header:
    """Raises DirectiveError for what sbatch would refuse, or would read from lines of another batch system."""
    command_line = next((number for number, line in enumerate(lines, 1) if _is_command(line)), None)
    head = range(1, command_line or len(lines) + 1)
    for number, line in enumerate(lines, 1):
        if FOREIGN.match(line) or (line.startswith("#SLURM") and number in head):  # the former count in the whole script
            raise DirectiveError(number, f"sbatch also obeys {line.split()[0]} lines; write it as #SBATCH, or remove it")
    numbers = [number for number in head if lines[number - 1].startswith(MAGIC)]
    directives = list(_options([word for number in numbers for word in _arguments(number, lines[number - 1][len(MAGIC) :])]))
    last = {directive.setting: directive for directive in directives}
    effective = [item for item in directives if item.setting in ADDING or last[item.setting] is item]
    return Header(
        effective=effective,
        overridden=[(item, last[item.setting]) for item in directives if item not in effective],
        directive_lines=numbers,
        command_line=command_line,
        late=[number for number in range(command_line or len(lines), len(lines) + 1) if lines[number - 1].startswith(MAGIC) and number not in numbers],
        commented_out=[number for number in head if number not in numbers and COMMENTED_OUT.match(lines[number - 1])],
    )


def _is_command(line: str) -> bool:
    text = line.strip(BLANKS)
    return bool(text) and not text.startswith("#")


def _arguments(number: int, text: str) -> Iterator[Argument]:
    """Cut what stands after `#SBATCH` as sbatch does: a # ends the line even inside a word, an empty word does so too."""
    position = 0
    while position < len(text):
        while position < len(text) and text[position] in BLANKS:
            position += 1
        start = position
        if text[position : position + 1] == ":":
            raise DirectiveError(number, "sbatch stops at a ':' between options; remove it")
        value, quote, escaped = "", "", False
        while position < len(text) and (quote or text[position] not in BLANKS):
            letter = text[position]
            if escaped:
                value, escaped = value + letter, False
            elif letter == "\\":
                escaped = True
            elif quote and letter == quote:
                quote = ""
            elif not quote and letter in "\"'":
                quote = letter
            elif not quote and letter == "#":
                break
            else:
                value += letter
            position += 1
        if quote:
            raise DirectiveError(number, f"the {quote} is never closed; close it on the same line")
        if not value:
            return
        yield Argument(number, value, text[start:position])
        if text[position : position + 1] == "#":
            return


def _options(words: list[Argument]) -> Iterator[Directive]:
    """The options that the words make, by the rules of getopt_long: a value may stand in the next word, even on the next line."""
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word.value.lower() in HETEROGENEOUS:
            raise DirectiveError(word.line, "a job of several parts (hetjob) has no counterpart in a spec; make a stage of each part")
        if word.value.startswith("--") and len(word.value) > 2:
            yield _long(word, rest)
        elif word.value.startswith("-") and len(word.value) > 1 and word.value != "--":
            yield from _short(word, rest)
        else:
            raise DirectiveError(word.line, f"{word.raw!r} is no option: newer sbatch refuses the script, older ones ignore every directive after it; correct it")


def _long(word: Argument, rest: list[Argument]) -> Directive:
    written, equals, value = word.value[2:].partition("=")
    name = _full_name(word.line, written)
    raw = f"--{name}{word.raw.partition('=')[1]}{word.raw.partition('=')[2]}" if name != written else word.raw
    if equals or name in NO_VALUE or name in JOINED_VALUE:
        if equals and name in NO_VALUE and name != "requeue":  # 25.05 knows --requeue=expedite
            raise DirectiveError(word.line, f"--{name} takes no value, got {word.raw!r}")
        return Directive(word.line, name, value if equals else None, raw)
    if name not in VALUE and (not rest or rest[0].value.startswith("-")):  # an option we do not know
        return Directive(word.line, name, None, raw)
    return _with_next(word.line, name, raw, rest)


def _full_name(line: int, written: str) -> str:
    """The option that an abbreviation means. An unknown name may be one of a newer Slurm and stays."""
    if written in LONG:
        return written
    meant = sorted(name for name in LONG if name.startswith(written))
    if len({ONE_THING.get(name, name) for name in meant}) > 1:
        raise DirectiveError(line, f"--{written} may be {', '.join('--' + name for name in meant)}; write the whole name")
    return meant[0] if meant else written


def _short(word: Argument, rest: list[Argument]) -> Iterator[Directive]:
    """-t 10, -t10, or several flags in one word: -sHn 4."""
    letters = word.value[1:]
    for position, letter in enumerate(letters):
        if letter not in SHORT:
            raise DirectiveError(word.line, f"sbatch has no option -{letter} (in {word.raw!r}); correct it")
        following = letters[position + 1 :]
        if letter == "k" and following:
            yield Directive(word.line, "no-kill", following, f"-k{following}")
            return
        if letter in SHORT_FLAGS:
            yield Directive(word.line, SHORT[letter], None, f"-{letter}")
            continue
        if following:
            yield Directive(word.line, SHORT[letter], following, word.raw if position == 0 else f"-{letter}{_quoted(following)}")
        else:
            yield _with_next(word.line, SHORT[letter], word.raw if position == 0 else f"-{letter}", rest)
        return


def _with_next(line: int, name: str, raw: str, rest: list[Argument]) -> Directive:
    if not rest:
        raise DirectiveError(line, f"{raw} needs a value")
    value = rest.pop(0)
    return Directive(line, name, value.value, f"{raw} {value.raw}")


def _quoted(value: str) -> str:
    """A value so that sbatch reads it back: only what is in double quotes may hold blanks and #."""
    if not re.search(r"[\s#\"'\\]", value):
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
