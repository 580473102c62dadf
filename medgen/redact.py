"""Hides passwords and keys in what is printed, logged as an event or put on a page. Used by document, rundir, launch, watch, report, cli.

A name that holds KEY, TOKEN, SECRET or PASS is enough. What jobs need stays as it is in plan.json and in the scripts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

HIDDEN = "***"
SECRET = re.compile(r"key|token|secret|pass", re.IGNORECASE)
WORD = r"[\w.-]*(?:key|token|secret|pass)[\w.-]*"
# quoted parts, escaped characters and plain ones, as bash joins them to one word
VALUE = r"(?:\"(?:\\.|[^\"\\])*\"|'[^']*'|\\.|[^\s\"'\\;&|(){}<>,])+"
IN_URL = re.compile(r"(\b[a-z][a-z0-9+.-]{0,20}://[^/\s:@'\"]{0,200}):[^/\s@'\"]{1,200}@", re.IGNORECASE)
ASSIGNED = re.compile(rf"(?<![\w.-])({WORD}[\"']?\s?=(?!=)\s?)({VALUE})", re.IGNORECASE)
OPTION = re.compile(rf"(?<![\w.-])(--?{WORD}\s+)(?!-)({VALUE})", re.IGNORECASE)
# `NAME: value` as YAML, JSON and headers have it; not `a.b.key: words`, which is how problems of a spec are told
QUOTED_KEY = re.compile(rf"([\"']{WORD}[\"']\s*:\s*)({VALUE})", re.IGNORECASE)
UPPER_KEY = re.compile(rf"(?<![\w.-])([A-Z0-9_]*(?:KEY|TOKEN|SECRET|PASS)[A-Z0-9_]*:\s+)({VALUE})")
LOWER_KEY = re.compile(rf"(?<![\w.-])((?:\w*_)?(?:api_?key|token|secret|password|passwd):\s+)({VALUE})", re.IGNORECASE)
WHOLE_ENV = re.compile(r"((?:stages\.)?[a-z0-9_]+\.env=).*", re.DOTALL)


def is_secret(name: object) -> bool:
    return isinstance(name, str) and SECRET.search(name) is not None


def text(words: str) -> str:
    """Values of secret names and passwords in addresses replaced by ***."""
    if not SECRET.search(words) and "://" not in words:
        return words
    words = IN_URL.sub(rf"\1:{HIDDEN}@", words)
    for pattern in (ASSIGNED, OPTION, QUOTED_KEY, UPPER_KEY, LOWER_KEY):
        words = pattern.sub(rf"\1{HIDDEN}", words)
    return words


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
