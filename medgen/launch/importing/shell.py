"""Where the statements of a bash script begin and end, and the words of simple ones. Used by the other modules of importing.

It follows quotes, here-documents and nested keywords, and nothing more; what it cannot follow is one opaque statement."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from medgen.launch.importing.words import unquoted

Kind = Literal["blank", "comment", "simple", "compound", "opaque"]

BLANKS = " \t"
ENDS_WORD = " \t\n;&|<>()"
OPERATORS = (
    ";;&", "&>>", "<<<", "<<-", ";;", ";&", "&&", "||", "|&", "&>", "<<", ">>", "<&", ">&", "<>", ">|", "<(", ">(", ";", "&", "|", "<", ">", "(", ")",
)  # fmt: skip
REDIRECTIONS = {"&>>", "<<<", "<<-", "&>", "<<", ">>", "<&", ">&", "<>", ">|", "<", ">"}
CONTINUING = {"&&", "||", "|", "|&"}  # a line may not end here
CLOSED_BY = {"if": "fi", "for": "done", "select": "done", "while": "done", "until": "done", "{": "}"}
STILL_A_COMMAND = {"then", "else", "elif", "do", "!", "time", "coproc"}
ASSIGNMENT = re.compile(r"[A-Za-z_]\w*(\[[^]]*\])?\+?=")


class Lost(Exception):
    """The text is not what this module can follow."""


@dataclass(frozen=True)
class Token:
    """A word or an operator, as written."""

    text: str
    operator: bool


@dataclass(frozen=True)
class Statement:
    """Whole lines, numbered from 1. `tokens` are empty unless the statement is simple: no keyword, no subshell, no function.

    `called`: what stands where a command stands, also inside loops and conditions; not what a function's body calls."""

    first: int
    last: int
    text: str
    kind: Kind
    tokens: tuple[Token, ...] = ()
    called: tuple[str, ...] = ()

    @property
    def lines(self) -> list[str]:
        return self.text.split("\n")

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command of a simple statement; redirections are left out. Empty for anything else."""
        found: list[list[str]] = [[]]
        after_redirection = False
        for token in self.tokens:
            if token.operator:
                after_redirection = token.text in REDIRECTIONS
                if not after_redirection:
                    found.append([])
            elif after_redirection:
                after_redirection = False
            else:
                found[-1].append(token.text)
        return [words for words in found if words]

    @property
    def operators(self) -> list[str]:
        """What stands between and behind the commands: && || | ; &, and redirections."""
        return [token.text for token in self.tokens if token.operator]


def split(text: str, first_line: int = 1) -> list[Statement]:
    """The statements of `text` in order; their texts joined by newlines are `text` again."""
    lines = text.split("\n")
    statements: list[Statement] = []
    number = 0
    while number < len(lines):
        stripped = lines[number].strip()
        if not stripped or stripped.startswith("#"):
            statement = Statement(1, 1, lines[number], "comment" if stripped else "blank")
        else:
            statement = _scan(lines[number:])
        count = statement.last
        statements.append(replace(statement, first=first_line + number, last=first_line + number + count - 1))
        number += count
    return statements


def _scan(lines: list[str]) -> Statement:
    """The statement at the start of these lines; its lines are numbered from 1."""
    scanner = _Scanner("\n".join(lines) + "\n")
    try:
        scanner.statement()
    except (Lost, IndexError, ValueError):
        return Statement(1, len(lines), "\n".join(lines), "opaque")
    count = scanner.text.count("\n", 0, scanner.position)
    text = "\n".join(lines[:count])
    if scanner.compound:
        only_defines = scanner.function and text.rstrip().endswith(("}", ")"))
        return Statement(1, count, text, "compound", called=() if only_defines else tuple(scanner.called))
    return Statement(1, count, text, "simple", tuple(scanner.tokens), tuple(scanner.called))


class _Scanner:
    """Reads one statement; `position` is behind its newline afterwards."""

    def __init__(self, text: str):
        self.text = text
        self.position = 0
        self.tokens: list[Token] = []
        self.open: list[str] = []  # what must still come: fi done esac } )
        self.in_pattern = False  # of the innermost case
        self.at_command = True  # the next word is a command or a keyword
        self.compound = False
        self.function = False
        self.called: list[str] = []
        self.here_documents: list[tuple[str, bool]] = []  # the word that ends it, and whether tabs before it are removed

    def statement(self) -> None:
        """Raises Lost or IndexError where the text ends too early or makes no sense here."""
        while True:
            letter = self.text[self.position]
            if letter in BLANKS:
                self.position += 1
            elif self.text.startswith("\\\n", self.position):
                self.position += 2
            elif letter == "#":
                self.position = self.text.index("\n", self.position)
            elif letter == "\n":
                self.position += 1
                self._skip_here_documents()
                last = self.tokens[-1] if self.tokens else None
                if not self.open and not (last and last.operator and last.text in CONTINUING):
                    return
                self.at_command = True
            elif operator := self._operator():
                self._take_operator(operator)
            else:
                self._take_word(self._word())

    def _operator(self) -> str | None:
        return next((operator for operator in OPERATORS if self.text.startswith(operator, self.position)), None)

    def _take_operator(self, operator: str) -> None:
        if operator in ("<(", ">("):
            return self._take_word(self._word())
        if operator == "(":
            return self._take_parenthesis()
        if operator in REDIRECTIONS and self.tokens and self.tokens[-1].text.isdecimal() and self.text[self.position - 1].isdecimal():
            self.tokens.pop()  # the 2 of 2>
        self.position += len(operator)
        self.tokens.append(Token(operator, operator=True))
        if operator == ")":
            if self.in_pattern and self.open[-1:] == ["esac"]:
                self.in_pattern = False
                self.at_command = True
            else:
                self._close(")")
        elif operator.startswith(";;") or operator == ";&":
            if self.open[-1:] != ["esac"]:
                raise Lost
            self.in_pattern = True
        elif operator in ("<<", "<<-"):
            self._here_document(operator == "<<-")
        elif operator in REDIRECTIONS:
            self._skip_blanks()
            self.tokens.append(Token(self._word(), operator=False))
        elif not self.in_pattern:
            self.at_command = True
        return None

    def _take_parenthesis(self) -> None:
        self.compound = True
        if self.in_pattern:
            self.position += 1
        elif not self.at_command:
            raise Lost
        elif self.text.startswith("((", self.position):
            self._parentheses()
            self.at_command = False
        else:
            self.position += 1
            self.open.append(")")

    def _take_word(self, word: str) -> None:
        self.tokens.append(Token(word, operator=False))
        if self.in_pattern and self.open[-1:] == ["esac"]:
            if word == "esac":
                self.in_pattern = False
                self._close("esac")
            return
        if not self.at_command or ASSIGNMENT.match(word):
            return
        if word in STILL_A_COMMAND:
            self.compound = self.compound or word not in ("time", "!")
            return
        self.at_command = False
        self.called.append(word)
        if word in CLOSED_BY:
            self.compound = True
            self.open.append(CLOSED_BY[word])
            self.at_command = word not in ("for", "select")
            if not self.at_command:
                self._skip_blanks()
                if self.text.startswith("((", self.position):
                    self._parentheses()
        elif word in ("fi", "done", "esac", "}"):
            self._close(word)
        elif word == "case":
            self._case()
        elif word == "[[":
            self._double_bracket()
        elif word == "function":
            self._skip_blanks()
            self._word()
            self._function_body()
        elif re.match(r"[ \t]*\([ \t]*\)", self.text[self.position : self.position + 40]):
            self._function_body()

    def _close(self, word: str) -> None:
        self.compound = True
        if self.open[-1:] != [word]:
            raise Lost
        self.open.pop()
        self.at_command = False

    def _case(self) -> None:
        self.compound = True
        self._skip_blanks()
        self._word()
        self._skip_space()
        if self._word() != "in":
            raise Lost
        self.open.append("esac")
        self.in_pattern = True

    def _function_body(self) -> None:
        """Behind a function's name; the body may begin on the next line."""
        self.compound = True
        self.function = self.function or not self.open
        if brackets := re.compile(r"[ \t]*\([ \t]*\)").match(self.text, self.position):
            self.position = brackets.end()
        self._skip_space()
        self.at_command = True

    def _double_bracket(self) -> None:
        while True:
            self._skip_space()
            if self.text[self.position] in "()<>&|;":
                self.position += 1
                continue
            word = self._word()
            self.tokens.append(Token(word, operator=False))
            if word == "]]":
                return

    def _skip_blanks(self) -> None:
        while self.text[self.position] in BLANKS or self.text.startswith("\\\n", self.position):
            self.position += 2 if self.text[self.position] == "\\" else 1

    def _skip_space(self) -> None:
        """Blanks, newlines and comments."""
        while True:
            self._skip_blanks()
            if self.text[self.position] == "#":
                self.position = self.text.index("\n", self.position)
            elif self.text[self.position] == "\n":
                self.position += 1
            else:
                return

    def _here_document(self, tabs: bool) -> None:
        self._skip_blanks()
        word = self._word()
        self.tokens.append(Token(word, operator=False))
        self.here_documents.append((unquoted(word), tabs))

    def _skip_here_documents(self) -> None:
        for end, tabs in self.here_documents:
            while True:
                stop = self.text.index("\n", self.position) if self.position < len(self.text) else -1
                if stop < 0:
                    raise Lost
                line = self.text[self.position : stop]
                self.position = stop + 1
                if (line.lstrip("\t") if tabs else line) == end:
                    break
        self.here_documents = []

    def _word(self) -> str:
        """One word as written, with everything that is quoted or substituted in it."""
        start = self.position
        while True:
            letter = self.text[self.position]
            if letter in "<>" and self.position == start and self.text[self.position + 1] == "(":
                self.position += 1
                self._parentheses()
            elif letter == "(" and self._opens_inside_word(start):
                self._parentheses()
            elif letter in ENDS_WORD:
                break
            else:
                self._piece()
        if self.position == start:
            raise Lost
        return self.text[start : self.position]

    def _opens_inside_word(self, start: int) -> bool:
        """An array's values, or an extended glob."""
        written = self.text[start : self.position]
        return bool(ASSIGNMENT.fullmatch(written)) or written[-1:] in tuple("?*+@!")

    def _piece(self) -> None:
        """One letter of a word, or a whole quoted or substituted part."""
        letter = self.text[self.position]
        following = self.text[self.position + 1]
        if letter == "\\":
            self.position += 2
        elif letter == "'":
            self.position = self._find("'", self.position + 1)
        elif letter == "$" and following == "'":
            self.position += 2
            while self.text[self.position] != "'":
                self.position += 2 if self.text[self.position] == "\\" else 1
            self.position += 1
        elif letter == '"':
            self._double_quotes()
        elif letter == "`":
            self._backquotes()
        elif letter == "$" and following in "({":
            self.position += 1
            self._parentheses() if following == "(" else self._braces()
        else:
            self.position += 1

    def _find(self, letter: str, start: int) -> int:
        found = self.text.find(letter, start)
        if found < 0:
            raise Lost
        return found + 1

    def _double_quotes(self) -> None:
        self.position += 1
        while self.text[self.position] != '"':
            if self.text[self.position] in "\\`$":
                self._piece_in_quotes()
            else:
                self.position += 1
        self.position += 1

    def _piece_in_quotes(self) -> None:
        if self.text[self.position] == "$" and self.text[self.position + 1] not in "({":
            self.position += 1
        else:
            self._piece()

    def _backquotes(self) -> None:
        self.position += 1
        while self.text[self.position] != "`":
            self.position += 2 if self.text[self.position] == "\\" else 1
        self.position += 1

    def _braces(self) -> None:
        self.position += 1
        while self.text[self.position] != "}":
            self._piece()
        self.position += 1

    def _parentheses(self) -> None:
        """From an opening parenthesis to behind its closing one: a substitution, a calculation or an array."""
        self.position += 1
        while self.text[self.position] != ")":
            letter = self.text[self.position]
            if letter == "(":
                self._parentheses()
            elif letter == "#" and self.text[self.position - 1] in " \t\n(;":
                self.position = self.text.index("\n", self.position)
            else:
                self._piece()
        self.position += 1


def everything_called(text: str) -> set[str]:
    """The commands that a text calls, also inside `$(...)` and backquotes; not what a function's body calls.

    Raises Lost where the text cannot be followed."""
    names: set[str] = set()
    for statement in split(text):
        if statement.kind == "opaque":
            raise Lost
        names |= set(statement.called)
        if statement.kind == "simple" or statement.called:
            for inner in _substitutions(statement.text):
                names |= everything_called(inner)
    return names


def _substitutions(text: str) -> list[str]:
    """What stands in every `$(...)`, `<(...)` and pair of backquotes; of nested ones the outer."""
    found, position = [], 0
    for match in re.finditer(r"[$<>]\((?!\()|`", text):
        if match.start() < position:
            continue
        scanner = _Scanner(f"{text}\n")
        scanner.position = match.end() - 1
        try:
            scanner._backquotes() if match.group() == "`" else scanner._parentheses()
        except IndexError:
            raise Lost from None
        position = scanner.position
        found.append(text[match.end() : position - 1])
    return found
