"""A script file becomes a draft: its effective directives, its statements, and what sbatch would say. Used by verb.py.

Every later step takes a draft and returns one in which some lines have moved out of `body` to a better place."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from medgen.launch.importing import directives, shell
from medgen.launch.importing.directives import Directive, DirectiveError
from medgen.launch.importing.shell import Statement

SHELLS = {"sh", "bash", "dash"}
LARGEST_BYTES = 4 * 2**20  # what Slurm itself takes
NAME_FREE = re.compile(r"[^A-Za-z0-9_-]+")
NAME_LENGTH = 60
SETTINGS_OF_SHELL = "aefhkuvxBCET"
# options about sbatch itself: in a script that medgen submits they would only disturb
ABOUT_SBATCH = {"wait", "parsable", "test-only", "quiet", "verbose", "usage", "help", "version", "ignore-pbs", "wrap"}
LOGS = {"output", "error", "open-mode"}
LOGIN_SHELL = """\
# as the first line of the script asked for a login shell (-l)
if [ -r /etc/profile ]; then . /etc/profile; fi
for startup in ~/.bash_profile ~/.bash_login ~/.profile; do if [ -r "$startup" ]; then . "$startup"; break; fi; done"""


class ScriptError(Exception):
    """This file cannot become a spec; the message begins with its path and line."""


@dataclass(frozen=True)
class Note:
    """Something to tell about a line of the script (None: about all of it)."""

    line: int | None
    text: str


@dataclass(frozen=True)
class Moved:
    """Lines of the script that do not stand in `run`, and where they went."""

    line: int
    text: str
    where: str


@dataclass(frozen=True)
class Draft:
    """A spec in the making. `summary`: what was understood, in a few words each. `login`: its set-up needs a login shell."""

    path: Path
    name: str
    directives: tuple[Directive, ...]
    body: tuple[Statement, ...]
    moved: tuple[Moved, ...] = ()
    hints: tuple[Note, ...] = ()
    summary: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    foreach: tuple[str, ...] = ()
    parallel: int | None = None
    segments: int = 1
    prefer: str | None = None
    login: bool = False

    def directive(self, option: str) -> Directive | None:
        return next((item for item in self.directives if item.option == option), None)

    def moved_line(self, line: int, text: str, where: str) -> Draft:
        """As it is, and the list of moved lines longer by one."""
        return replace(self, moved=(*self.moved, Moved(line, text, where)))

    def move(self, statement: Statement, where: str) -> Draft:
        """Without the statement in `run`; it will be listed with where it went."""
        body = tuple(item for item in self.body if item is not statement)
        return replace(self, body=body).moved_line(statement.first, statement.text, where)

    def move_directive(self, directive: Directive, where: str) -> Draft:
        kept = tuple(item for item in self.directives if item is not directive)
        return replace(self, directives=kept).moved_line(directive.line, f"{directives.MAGIC} {directive.text}", where)

    def put(self, old: Statement, text: str) -> Draft:
        """With other text in the place of a statement."""
        new = [replace(item, first=old.first, last=old.last) for item in shell.split(text)]
        return replace(self, body=tuple(part for item in self.body for part in (new if item is old else [item])))

    def first(self, text: str) -> Draft:
        """With text before everything else in `run`."""
        return replace(self, body=(*(replace(item, first=0, last=0) for item in shell.split(text)), *self.body))

    def hint(self, line: int | None, text: str) -> Draft:
        return replace(self, hints=(*self.hints, Note(line, text)))

    def understood(self, words: str) -> Draft:
        return replace(self, summary=(*self.summary, words))

    @property
    def run(self) -> str:
        """The text for bash; where lines have gone, one empty line stands for several."""
        pairs = zip(self.body, [None, *self.body], strict=False)
        kept = [statement.text for statement, before in pairs if statement.kind != "blank" or (before is not None and before.kind != "blank")]
        return "\n".join(kept).strip("\n") + "\n"


def read_script(path: Path) -> Draft:
    """Raises ScriptError for what is no shell script, what sbatch would refuse, and a script without any command."""
    text, hints = _text(path)
    lines = text.split("\n")
    interpreter = _interpreter(path, lines[0])
    try:
        header = directives.read_header(lines)
    except DirectiveError as error:
        raise ScriptError(f"{path}:{error.line}: {error.message}") from None
    if header.command_line is None:
        raise ScriptError(f"{path}: there is no command in it, only comments and directives")
    taken = {*header.directive_lines, *header.commented_out, *([1] if lines[0].startswith("#!") else [])}
    statements = [statement for statement in shell.split(text) if not (statement.kind == "comment" and statement.first in taken)]
    comments = {statement.first for statement in statements if statement.kind == "comment"}
    moved = [Moved(number, lines[number - 1], "was commented out") for number in header.commented_out]
    moved += [Moved(item.line, f"{directives.MAGIC} {item.text}", f"did not count: line {later.line} says {later.text}") for item, later in header.overridden]
    hints += [Note(number, f"sbatch ignores it: line {header.command_line} is a command; a comment in run") for number in header.late if number in comments]
    count = len(header.effective)
    draft = Draft(
        path=path, name="", directives=tuple(header.effective), body=tuple(statements), moved=tuple(moved), hints=tuple(hints),
        summary=(f"{count} directive{'s' * (count != 1)}",),
    )  # fmt: skip
    return _without_what_medgen_does(_with_name(_as_its_shell(draft, lines[0], interpreter)))


def _text(path: Path) -> tuple[str, list[Note]]:
    """The file as text with plain newlines, and what sbatch would not have liked about it."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ScriptError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ScriptError(f"{path}: a folder; name the scripts in it, for example {path}/*.slurm") from None
    except OSError as error:
        raise ScriptError(f"{path}: cannot be read: {error.strerror or error}") from None
    if b"\0" in content or len(content) > LARGEST_BYTES:
        why = "it is larger than the 4 MiB that Slurm takes" if len(content) > LARGEST_BYTES else "it holds binary data"
        raise ScriptError(f"{path}: not a job script: {why}")
    if not content.strip():
        raise ScriptError(f"{path}: the file is empty")
    hints = []
    if content.startswith(b"\xef\xbb\xbf"):
        content = content[3:]
        hints.append(Note(1, "sbatch refuses the file: it begins with a byte order mark, left out here"))
    if b"\r\n" in content:
        content = content.replace(b"\r\n", b"\n")
        hints.append(Note(None, "sbatch refuses the file: its lines end as on Windows (\\r\\n), here they do not"))
    try:
        return content.decode(), hints
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return content.decode("latin-1"), [*hints, Note(line, "not UTF-8; read as Latin-1, check names with accents")]


def _interpreter(path: Path, first_line: str) -> list[str]:
    """The words of the #! line: the shell, then its options. Raises ScriptError for another language."""
    if not first_line.startswith("#!"):
        return []
    words = first_line[2:].split()
    if words and Path(words[0]).name == "env":
        words = [word for word in words[1:] if word != "-S"]
    if words and Path(words[0]).name not in SHELLS:
        raise ScriptError(f"{path}:1: written for {words[0]}, but run: is text for bash; write a command stage with `run: {Path(words[0]).name} {path}`")
    return words


def _as_its_shell(draft: Draft, first_line: str, interpreter: list[str]) -> Draft:
    """What the #! line asks of its shell, asked in `run` instead."""
    if not first_line.startswith("#!"):
        return draft.hint(1, "no #! line: sbatch refuses the script; run as bash here")
    letters = "".join(word[1:] for word in interpreter[1:] if word.startswith("-") and not word.startswith("--"))
    settings = "".join(letter for letter in letters if letter in SETTINGS_OF_SHELL)
    login = "l" in letters or "--login" in interpreter
    draft = replace(draft.moved_line(1, first_line, "run is text for bash"), login=login)
    if settings:
        draft = draft.first(f"set -{settings}  # from {first_line}")
    return draft.first(LOGIN_SHELL) if login else draft


def _with_name(draft: Draft) -> Draft:
    given = draft.directive("job-name")
    wanted = given.value if given is not None and given.value else draft.path.stem
    name = NAME_FREE.sub("-", wanted).strip("-_")[:NAME_LENGTH] or "job"
    draft = replace(draft, name=name)
    if given is None:
        return draft
    return draft.move_directive(given, "name" if name == wanted else f"name: {name} (letters, digits, _ and - only)")


def _without_what_medgen_does(draft: Draft) -> Draft:
    for directive in draft.directives:
        if directive.option in LOGS:
            draft = draft.move_directive(directive, "logs/ of the run (medgen watch shows them)")
        elif directive.option in ABOUT_SBATCH:
            draft = draft.move_directive(directive, "left out: it is about the sbatch command, which medgen calls")
        elif directive.option == "hold":
            draft = draft.move_directive(directive, "left out: medgen holds and releases jobs itself")
        elif directive.option == "chdir":
            draft = draft.move_directive(directive, "run").first(f"cd {shlex.quote(directive.value or '')} || exit\nexport SLURM_SUBMIT_DIR=$PWD")
        elif directive.option == "input":
            draft = draft.move_directive(directive, "left out").hint(directive.line, "give the command its input itself: < file")
        elif directive.option == "dependency":
            draft = draft.hint(directive.line, "kept, but jobs of other days are gone and names differ now; use needs: between stages")
    return draft

