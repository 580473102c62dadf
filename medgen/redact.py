"""Hides passwords and keys in what is printed, logged as an event or put on a page. Used by document, rundir, launch, watch, report, cli.

A name with KEY, TOKEN, SECRET or PASS as a part of it is enough. What jobs need stays as it is in plan.json and in the scripts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

HIDDEN = "***"
SECRET = re.compile(r"key|token|secret|pass", re.IGNORECASE)
SHOUTED = re.compile(r"[A-Z0-9_.-]+")  # as variables of the environment are written: there the words stand glued together
PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")  # of db_pass, secretKey, access-token
SECRET_PART = re.compile(r"[a-z]*(?:key|token|secret|pass)s?|[a-z]*(?:passw[a-z]*|passphrase|passcode)")
HARMLESS_PARTS = {
    "monkey", "turkey", "donkey", "hockey", "jockey", "whiskey", "hotkey", "compass", "encompass", "bypass", "trespass", "surpass", "overpass", "underpass", "lowpass", "highpass",
    "bandpass", "allpass",
}  # fmt: skip
FAULTS = re.compile(r"(?:Error|Exception|Warning|Interrupt)$")  # `KeyError: 'x'` is Python's word for a fault
PASSWORD = re.compile(r"pass|secret", re.IGNORECASE)  # even of digits alone
HARMLESS_VALUE = re.compile(r"[+-]?\d{1,12}(?:\.\d*)?(?:e[+-]?\d+)?[kKMGB%]?[.\]]*|true|false|yes|no|null|none", re.IGNORECASE)
# quoted parts, escaped characters and plain ones, as bash joins them to one word
VALUE = re.compile(r"(?:\"(?:\\.|[^\"\\])*\"|'[^']*'|\\.|[^\s\"'\\;&|(){}<>,])+")
IN_URL = re.compile(r"(\b[a-z][a-z0-9+.-]{0,20}://[^/\s:@'\"]{0,200}):[^/\s@'\"]{1,200}@", re.IGNORECASE)
ASSIGNED = re.compile(r"(?<![\w.-])(?P<name>[\w.-]+)[\"']?\s?=(?!=)\s?")
OPTION = re.compile(r"(?<![\w.-])(?P<name>--?\w[\w.-]*)\s+(?!-)")
# `NAME: value` where YAML, JSON and headers have it; not `a.b.key: words`, which is how problems of a spec are told
PLACE = r"(?:^[ \t]*(?:- +)?|[{,(\[]\s*)"
QUOTED_KEY = re.compile(rf"{PLACE}[\"'](?P<name>[\w.-]+)[\"']\s*:\s*", re.MULTILINE)
QUOTED_BOTH = re.compile(r"[\"'](?P<name>[\w.-]+)[\"']\s*:\s*(?=[\"'])")
PLAIN_KEY = re.compile(rf"(?:{PLACE}|[\"'])(?P<name>[\w-]+):[ \t]+", re.MULTILINE)
# anywhere else a word after a colon is prose, unless it looks like no word
IN_PROSE = re.compile(r"(?<![\w./-])(?P<name>[\w-]+):[ \t]+(?=[^\s\d]*\d)")
LEAST_CHARACTERS_IN_PROSE = 6
WHOLE_ENV = re.compile(r"((?:stages\.)?[a-z0-9_]+\.env=).*", re.DOTALL)


def is_secret(name: object) -> bool:
    if not isinstance(name, str) or SECRET.search(name) is None or FAULTS.search(name):
        return False
    parts = {part.lower() for part in PART.findall(name)}
    return SHOUTED.fullmatch(name) is not None or any(SECRET_PART.fullmatch(part) for part in parts - HARMLESS_PARTS)


def text(words: str) -> str:
    """Values of secret names and passwords in addresses replaced by ***."""
    if not SECRET.search(words) and "://" not in words:
        return words
    words = IN_URL.sub(rf"\1:{HIDDEN}@", words)
    for pattern in (ASSIGNED, OPTION, QUOTED_KEY, QUOTED_BOTH, PLAIN_KEY):
        words = _without_secrets(pattern, words)
    return _without_secrets(IN_PROSE, words, LEAST_CHARACTERS_IN_PROSE)


def _without_secrets(pattern: re.Pattern[str], words: str, least_characters: int = 1) -> str:
    """What stands behind a harmless name is looked at again: `env=API_KEY=x`."""
    shown, place = [], 0
    while (found := pattern.search(words, place)) is not None:
        shown.append(words[place : found.end()])
        place = found.end()
        value = VALUE.match(words, place) if is_secret(found["name"]) else None
        if value is not None and len(value[0]) >= least_characters and not _is_harmless(found["name"], value[0]):
            shown.append(HIDDEN)
            place = value.end()
    return "".join([*shown, words[place:]])


def _is_harmless(name: str, found: str) -> bool:
    """`tokens=512` is no secret."""
    return HARMLESS_VALUE.fullmatch(found) is not None and PASSWORD.search(name) is None


def value(record: Any) -> Any:
    """A JSON value: texts under secret names hidden, all other texts as `text` shows them."""
    if isinstance(record, dict):
        return {key: _hidden(item) if is_secret(key) else value(item) for key, item in record.items()}
    if isinstance(record, list | tuple):
        return [value(item) for item in record]
    return text(record) if isinstance(record, str) else record


def _hidden(record: Any) -> Any:
    """Numbers and truth values are no secrets: `attention_key_channels: 8` stays."""
    if isinstance(record, dict):
        return {key: _hidden(item) for key, item in record.items()}
    if isinstance(record, list | tuple):
        return [_hidden(item) for item in record]
    return HIDDEN if isinstance(record, str) else record


def arguments(words: Sequence[str]) -> list[str]:
    """A command line. The whole of `-o stages.x.env={...}` is hidden: its names stand inside the value."""
    shown, before = [], ""
    for word in words:
        hide = before.startswith("-") and is_secret(before) and "=" not in before
        shown.append(HIDDEN if hide else WHOLE_ENV.sub(rf"\1{HIDDEN}", _assignment(word)))
        before = word
    return shown


def _assignment(word: str) -> str:
    """`a.b.API_KEY=any words at all`: here the value ends where the word ends."""
    name, equals, _ = word.partition("=")
    return f"{name}={HIDDEN}" if equals and is_secret(name) and re.fullmatch(r"[\w.-]+", name) else text(word)
