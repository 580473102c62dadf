"""Values of a file taken as they stand there: `true` is no number and a number in quotes is text. Used by spec_base.py, for every setting.

pydantic would turn one into the other without a word: `micro_batch: true` would be a batch of 1."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BeforeValidator


def problem(value: Any, annotation: Any, metadata: Sequence[Any] = ()) -> str | None:
    """Why a value is not of the kind that is asked for, in words; None if it is, or if the type has a reader of its own.

    `metadata`: what pydantic has taken out of an outermost Annotated."""
    allowed = {*_kinds(annotation), *_readers(metadata)}
    if BeforeValidator in allowed:
        return None
    items = value if isinstance(value, list | tuple) else [value]
    return next((told for item in items if (told := _problem_of_one(item, allowed)) is not None), None)


def _problem_of_one(value: Any, allowed: set[Any]) -> str | None:
    numbers = allowed & {int, float}
    if isinstance(value, bool):
        return f"write a number, got {str(value).lower()}" if numbers and bool not in allowed else None
    if isinstance(value, int) and bool in allowed and not numbers:
        return f"write true or false, got {value}"
    if not isinstance(value, str) or str in allowed or value in allowed:
        return None
    if bool in allowed and not numbers:
        return f"write true or false, got {value!r}"
    return f"write {value} without quotes: this is text" if numbers and _reads_as_number(value) else None


def _reads_as_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _readers(metadata: Sequence[Any]) -> Iterator[Any]:
    yield from (BeforeValidator for item in metadata if isinstance(item, BeforeValidator))


def _kinds(annotation: Any) -> Iterator[Any]:
    """The types in an annotation, at any depth, and the texts that it lists; BeforeValidator where it has one."""
    if get_origin(annotation) is Literal:
        yield from (value if isinstance(value, str) else type(value) for value in get_args(annotation))
    elif get_origin(annotation) is Annotated:
        inner, *metadata = get_args(annotation)
        yield from _readers(metadata)
        yield from _kinds(inner)
    elif get_args(annotation):
        for inner in get_args(annotation):
            yield from _kinds(inner)
    else:
        yield annotation
