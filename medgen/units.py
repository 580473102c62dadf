"""Durations and amounts of memory as people write them. Used by spec.py and site.py."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

DURATION_PART = re.compile(r"(\d{1,9}(?:\.\d+)?)(d|h|m)")
CLOCK = re.compile(r"(?:(\d{1,9})-)?(\d{1,9}):(\d\d)(?::(\d\d))?")
MEMORY = re.compile(r"(\d{1,9}(?:\.\d+)?)\s*([MGT])i?B?", re.IGNORECASE)
SECONDS = re.compile(r"(\d{1,9})\s*(s|m)")


def parse_minutes(value: Any) -> int:
    """`90m`, `12h`, `1d12h`, `1-12:00:00` or `12:00:00` as whole minutes."""
    text = str(value).strip()
    if clock := CLOCK.fullmatch(text):
        days, hours, minutes, seconds = (int(part or 0) for part in clock.groups())
        return max(1, days * 1440 + hours * 60 + minutes + (seconds > 0))
    parts = DURATION_PART.findall(text)
    if isinstance(value, str) and parts and "".join(number + unit for number, unit in parts) == text:
        return max(1, round(sum(float(number) * {"d": 1440, "h": 60, "m": 1}[unit] for number, unit in parts)))
    if isinstance(value, int) and not isinstance(value, bool):  # the resolved form in a run folder
        return value
    raise ValueError(f"not a duration: {text!r}; write 90m, 12h, 1d12h or \"12:00:00\"")


def parse_seconds(value: Any) -> int:
    """`180s`, `3m` or a number of seconds."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = SECONDS.fullmatch(str(value).strip())
    if not match:
        raise ValueError(f"not a number of seconds: {value!r}; write 180s or 3m")
    return int(match.group(1)) * {"s": 1, "m": 60}[match.group(2)]


def parse_memory(value: Any) -> int:
    """`40G` or `500M` as whole mebibytes."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = MEMORY.fullmatch(str(value).strip())
    if not match:
        raise ValueError(f"not an amount of memory: {value!r}; write 40G or 500M")
    return round(float(match.group(1)) * {"M": 1, "G": 1024, "T": 1024**2}[match.group(2).upper()])


Minutes = Annotated[int, BeforeValidator(parse_minutes), Field(gt=0)]
Seconds = Annotated[int, BeforeValidator(parse_seconds), Field(gt=0)]
Mebibytes = Annotated[int, BeforeValidator(parse_memory), Field(gt=0)]
