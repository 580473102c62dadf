"""Single words of a bash script: what they mean without running anything. Used by shell.py and the modules that move lines."""

from __future__ import annotations

import re

PLAIN_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
NOT_LITERAL = re.compile(r"[$`*?\[\]{}~!]")


def unquoted(word: str) -> str:
    """The word without its quotes and backslashes; nothing is substituted."""
    return re.sub(r"\\(.)|['\"]", lambda match: match.group(1) or "", word, flags=re.DOTALL)


def literal(word: str) -> str | None:
    """The value of a word that always means the same; None if it holds anything that bash would replace."""
    value, position = "", 0
    while position < len(word):
        letter = word[position]
        if letter == "'":
            stop = word.find("'", position + 1)
            if stop < 0:
                return None
            value, position = value + word[position + 1 : stop], stop + 1
        elif letter == '"':
            match = re.compile(r'"((?:[^"\\$`]|\\.)*)"', re.DOTALL).match(word, position)
            if match is None:
                return None
            value += re.sub(r'\\([\\"$`])|\\\n', lambda found: found.group(1) or "", match.group(1))
            position = match.end()
        elif letter == "\\":
            following = word[position + 1 : position + 2]
            value, position = value + following.replace("\n", ""), position + 2
        elif NOT_LITERAL.match(letter):
            return None
        else:
            value, position = value + letter, position + 1
    return value


def assignment(word: str) -> tuple[str, str] | None:
    """(name, value as written) of NAME=value."""
    match = PLAIN_ASSIGNMENT.fullmatch(word)
    return (match.group(1), match.group(2)) if match else None


def names_in(text: str) -> set[str]:
    """Everything in a piece of shell text that could be the name of a variable."""
    return set(re.findall(r"[A-Za-z_]\w*", text))
