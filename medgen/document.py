"""YAML files with the position of every value, `-o a.b=c` overrides, and checked parsing; used by spec.py and site.py."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, NodeEvent
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from medgen import redact
from medgen.errors import InputError

Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
KeyPath = tuple[str | int, ...]
ModelType = TypeVar("ModelType", bound=BaseModel)

BARE_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
CLOCK = re.compile(r"\d+(:\d\d)+")
OCTAL = re.compile(r"[-+]?0\d+")
WRITTEN_VARIABLE = re.compile(r"\$\{(\w+)\}")
# in `{root: ${DATA}/mri}` YAML would take the inner braces for a mapping: they are hidden while it parses
HIDDEN_VARIABLE = re.compile("\\$\ue000(\\w+)\ue001")
LARGEST_BYTES = 32 * 2**20  # a list of a million items has 20 MB
MOST_LEVELS = 50  # libyaml takes seconds for a thousand and the process ends without a word at some ten thousand
MOST_WITH_ALIASES = 20_000  # values that a file with aliases may have when they are written out
LARGEST_NUMBER = 2**64
SHOWN_PROBLEMS = 20
SHOWN_CHARACTERS = 200  # of a wrong value
CORE_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "map", "seq")}
STARTS_WITH_KEY = re.compile(r"[a-z_][a-z0-9_]*(\.[a-z0-9_]+|\[\d+\])*: ")


@dataclass
class Document:
    """Plain YAML data and where each value stands: `positions[path] == "file:line:column"`.

    Below the keys in `verbatim` a ${NAME} stays as it is written."""

    source: str
    data: dict[str, Any]
    positions: dict[KeyPath, str] = field(default_factory=dict)
    verbatim: tuple[str, ...] = ()
    below: KeyPath = ()  # where the data stand in a larger document: told before each key

    def where(self, path: KeyPath) -> str:
        """The position of the value at `path`, or of its nearest parent that stands in a file."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.positions:
                return self.positions[path[:length]]
        return self.source

    def error(self, path: KeyPath, message: str) -> InputError:
        told = self.told(path)
        if not told:
            return InputError(f"{self.where(path)}: {message}")
        names_a_key = not path and STARTS_WITH_KEY.match(message)  # of this part of a document
        return InputError(f"{self.where(path)}: {told}{'.' if names_a_key else ': '}{message}")

    def told(self, path: KeyPath) -> str:
        """The key as a message names it."""
        return dotted((*self.below, *path))

    def part(self, path: KeyPath, data: dict[str, Any]) -> Document:
        """Data that stand at `path`, as a document of their own that still names and places its keys as they are written."""
        positions = {where[len(path) :]: place for where, place in self.positions.items() if where[: len(path)] == path}
        return Document(self.source, data, positions, self.verbatim, (*self.below, *path))

    def graft(self, path: KeyPath, other: Document) -> None:
        """Put another document's data and positions at `path`."""
        parent: Any = self.data
        for key in path[:-1]:
            parent = parent[key]
        parent[path[-1]] = other.data
        for below, position in other.positions.items():
            self.positions[path + below] = position


def dotted(path: KeyPath) -> str:
    return ".".join(str(key) for key in path)


def load(path: Path, verbatim: tuple[str, ...] = ()) -> Document:
    """Read one YAML mapping. Raises InputError with file:line:column for anything YAML would misread silently."""
    try:
        with path.open("rb") as handle:
            content = handle.read(LARGEST_BYTES + 1)
        text = content.decode() if len(content) <= LARGEST_BYTES else ""
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    if len(content) > LARGEST_BYTES:
        raise InputError(f"{path}: larger than {LARGEST_BYTES // 2**20} MB, which is no spec; is it the right file?")
    return parse(text, str(path), verbatim)


def parse(text: str, source: str, verbatim: tuple[str, ...] = ()) -> Document:
    hidden = WRITTEN_VARIABLE.sub("$\ue000\\1\ue001", text)
    has_aliases = _require_plain(hidden, source)
    try:
        root = yaml.compose(hidden, Loader=Loader)
    except yaml.YAMLError as error:
        raise _not_yaml(error, source) from None
    document = Document(source, {}, verbatim=verbatim)
    if root is None:
        raise InputError(f"{source}: the file is empty")
    if not isinstance(root, MappingNode):
        raise InputError(f"{source}: expected `key: value` lines at the top, found {'a list' if isinstance(root, SequenceNode) else 'one value'}")
    document.data = _plain(root, (), document, MOST_WITH_ALIASES if has_aliases else None)
    return document


def _not_yaml(error: yaml.YAMLError, source: str) -> InputError:
    mark = getattr(error, "problem_mark", None)
    place = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
    return InputError(f"{place}: not valid YAML: {getattr(error, 'problem', None) or str(error)[:SHOWN_CHARACTERS]}")


def _require_plain(text: str, source: str) -> bool:
    """Look at the text without building anything from it; True if it has aliases.

    Raises InputError for tags (a spec is data: no Python objects), for nesting that would end the process, for no YAML."""
    level, has_aliases = 0, False
    try:
        for event in yaml.parse(text, Loader=Loader):
            if isinstance(event, AliasEvent):
                has_aliases = True
            elif isinstance(event, NodeEvent) and event.tag is not None and event.tag not in CORE_TAGS:  # type: ignore[attr-defined]
                raise InputError(f"{_start(event, source)}: the tag {event.tag[:80]!r} is not read: a spec holds plain values; remove it")  # type: ignore[attr-defined]
            level += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
            if level > MOST_LEVELS:
                raise InputError(f"{_start(event, source)}: more than {MOST_LEVELS} levels of nesting; no spec needs them")
    except yaml.YAMLError as error:
        raise _not_yaml(error, source) from None
    return has_aliases


def _plain(node: Node, path: KeyPath, document: Document, most: int | None) -> Any:
    """`most`: how many values there may be in all; aliases of aliases can stand for billions."""
    place = _start(node, document.source)
    if len(path) > MOST_LEVELS or (most is not None and len(document.positions) >= most):
        raise InputError(f"{place}: the aliases (*name) in this file stand for more than {MOST_WITH_ALIASES} values or for themselves; write out what they mean")
    document.positions[path] = place
    if isinstance(node, MappingNode):
        return _plain_mapping(node, path, document, most)
    if isinstance(node, SequenceNode):
        return [_plain(item, (*path, index), document, most) for index, item in enumerate(node.value)]
    assert isinstance(node, ScalarNode)
    return _plain_scalar(node, path, document)


def _start(part: Any, source: str) -> str:
    """Where a node or event begins."""
    return f"{source}:{part.start_mark.line + 1}:{part.start_mark.column + 1}"


def _plain_mapping(node: MappingNode, path: KeyPath, document: Document, most: int | None) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        place = _start(key_node, document.source)
        if not isinstance(key_node, ScalarNode):
            raise InputError(f"{place}: a key is one word, not a list or mapping; is there a brace or bracket too many?")
        key = HIDDEN_VARIABLE.sub(r"${\1}", key_node.value)
        below = (*path, key)
        if key == "<<" and not key_node.style:
            raise InputError(f"{place}: {dotted(below)}: merge keys are not read; write the keys out")
        if key in result:
            raise InputError(f"{place}: {dotted(below)}: the key stands twice; keep one of them")
        result[key] = _plain(value_node, below, document, most)
        document.positions[below] = place
    return result


def _plain_scalar(node: ScalarNode, path: KeyPath, document: Document) -> Any:
    """A scalar as YAML reads it, but the readings that surprise people are refused with a hint."""
    text, plain = node.value, not node.style  # the C loader says "", the Python one None
    if plain and CLOCK.fullmatch(text):
        raise document.error(path, f"YAML reads the unquoted {text} as a number of seconds; write \"{text}\" or 90m, 12h")
    if plain and BARE_EXPONENT.fullmatch(text) and node.tag.endswith(":str"):
        mantissa, exponent = re.split("[eE]", text)
        raise document.error(path, f"YAML reads {text} as text; write {mantissa if '.' in mantissa else mantissa + '.0'}e{exponent if exponent[0] in '+-' else '+' + exponent}")
    if plain and OCTAL.fullmatch(text):
        raise document.error(path, f"YAML reads {text} as an octal number; write {int(text)}, or quote it if it is text")
    if plain and text.lower() in {"yes", "no", "on", "off"}:
        raise document.error(path, f"YAML reads {text} as true or false; write true, false or \"{text}\"")
    try:
        value = yaml.safe_load(text) if plain else text
    except (yaml.YAMLError, ValueError):  # `=`, `2026-13-45`, `0x_`: look like something special and are not
        raise document.error(path, f"YAML cannot read {_shown(text)}; quote it if it is text") from None
    if isinstance(value, int) and abs(value) >= LARGEST_NUMBER:
        raise document.error(path, "this number has more than 64 bits")
    return expand(value, path, document) if isinstance(value, str) else value


def expand(text: str, path: KeyPath, document: Document) -> str:
    """Replace ${NAME} by the environment variable; an unset one is an error, never an empty string."""

    def value_of(match: re.Match[str]) -> str:
        name = match.group(1)
        if any(key in document.verbatim for key in path):
            return f"${{{name}}}"
        if name not in os.environ:
            raise document.error(path, f"the environment variable {name} is not set; `export {name}=...` first")
        return os.environ[name]

    return HIDDEN_VARIABLE.sub(value_of, text)


def parse_override_value(text: str) -> Any:
    """The right side of `-o key=value`: YAML, with 1e-4 read as the number people mean."""
    if BARE_EXPONENT.fullmatch(text):
        return float(text)
    if CLOCK.fullmatch(text):
        return text
    if not text:
        return ""
    if _require_plain(text, "-o"):
        raise InputError("-o: no aliases (*name) here; write the value out")
    value = yaml.safe_load(text)
    if isinstance(value, int) and abs(value) >= LARGEST_NUMBER:
        raise ValueError("more than 64 bits")
    return value


def override(document: Document, assignments: Sequence[str]) -> None:
    """Apply `a.b=c` in order. A new key is created only below an existing mapping, so a typo in the middle is told."""
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not name:
            raise InputError(f"-o {_shown(assignment)}: write NAME.SUBNAME=VALUE, as in stages.train.config.epochs=5")
        place = f"-o {_shown(redact.arguments([assignment])[0])}"
        try:
            value = parse_override_value(text)
        except (InputError, yaml.YAMLError, ValueError):
            raise InputError(f"{place}: the right side is not a YAML value of a spec") from None
        set_value(document, name, value, place)


def set_value(document: Document, name: str, value: Any, place: str) -> None:
    """Put `value` at the dotted `name`; errors about it will be told at `place`."""
    keys = name.split(".")
    target: Any = document.data
    for depth, key in enumerate(keys[:-1]):
        if not isinstance(target, dict) or (key in target and not isinstance(target[key], dict)):
            raise InputError(f"{place}: {'.'.join(keys[:depth + 1])} holds one value and has no keys below it")
        if key not in target:
            if keys[0] == "stages" and depth == 1:
                known = ", ".join(target) or "none"
                raise InputError(f"{place}: no stage {key!r}; the stages are: {known}")
            target[key] = {}
        target = target[key]
    if not isinstance(target, dict):
        raise InputError(f"{place}: {'.'.join(keys[:-1])} holds one value and has no keys below it")
    target[keys[-1]] = value
    replaced = tuple(keys)
    document.positions = {path: where for path, where in document.positions.items() if path[: len(keys)] != replaced}
    document.positions[replaced] = place


def check(model: type[ModelType], document: Document, path: KeyPath = ()) -> ModelType:
    """Build `model` from the data at `path`; every problem is listed with its position, unknown keys with a suggestion."""
    value: Any = document.data
    for key in path:
        value = value[key]
    try:
        return model.model_validate(value)
    except ValidationError as error:
        problems = error.errors()
        lines = [_explain(problem, model, document, path) for problem in problems[:SHOWN_PROBLEMS]]
        lines += [f"{document.source}: and {len(problems) - SHOWN_PROBLEMS} more problems"] if len(problems) > SHOWN_PROBLEMS else []
        raise InputError("\n".join(dict.fromkeys(lines))) from None


def _explain(problem: Any, model: type[BaseModel], document: Document, path: KeyPath) -> str:
    inside = _keys_in_document(problem["loc"], document, path)
    where = path + inside
    if problem["type"] == "extra_forbidden":
        valid = _valid_keys(model, problem["loc"][:-1])
        close = difflib.get_close_matches(str(inside[-1])[:SHOWN_CHARACTERS], valid, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"the valid keys are: {', '.join(sorted(valid))}"
        return str(document.error(where, f"unknown key; {hint}"))
    if problem["type"] == "union_tag_invalid":
        kinds = [word.strip(" '") for word in problem["ctx"]["expected_tags"].split(",") if word.strip(" '") != "collect"]
        close = difflib.get_close_matches(problem["ctx"]["tag"], kinds, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"the kinds are: {', '.join(kinds)}"
        return str(document.error((*where, "kind"), f"unknown kind {problem['ctx']['tag']!r}; {hint}"))
    if problem["type"] == "literal_error" and inside == ("version",):
        return str(document.error(where, f"this medgen reads version {problem['ctx']['expected']} of specs, got {problem['input']!r}"))
    if problem["type"] == "missing":
        return str(document.error(where[:-1], f"{where[-1]!r} is missing"))
    message = _message(problem)
    if problem["type"] == "value_error" or isinstance(problem["input"], dict):
        return f"{document.where(_blamed(where, message, problem['input']))}: {document.told(where)}: {message}" if where else str(document.error(where, message))
    return str(document.error(where, f"{message[:1].lower()}{message[1:]}, got {_given(problem['input'], where)}"))


def told(error: ValidationError) -> str:
    """What is wrong with values that stand in no document, in one line: each with its key, and what was given."""
    lines = []
    for problem in error.errors():
        where, message = dotted(problem["loc"]), _message(problem)
        if problem["type"] != "value_error":
            message = f"{message[:1].lower()}{message[1:]}, got {_given(problem['input'], problem['loc'])}"
        lines.append(f"{where}: {message}" if where else message)
    return "; ".join(lines)


def _blamed(where: KeyPath, message: str, given: Any) -> KeyPath:
    """What is wrong with several keys together names one of them first: `key: ...` or `key.below: ...`."""
    named = re.match(r"([\w.]+): ", message)
    keys = named[1].split(".") if named is not None and isinstance(given, dict) else []
    return (*where, *keys) if keys and keys[0] in given else where


def _message(problem: Any) -> str:
    """What is wrong, in the words of who writes the file; pydantic's where they are plain."""
    if problem["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return "expected `key: value` lines below it"
    if problem["type"] in ("tuple_type", "list_type"):
        return "expected a list, as in [1, 2]"
    return str(problem["msg"].removeprefix("Value error, "))


def _given(value: Any, path: KeyPath) -> str:
    """A wrong value as a message shows it: passwords hidden, long ones cut."""
    return redact.HIDDEN if any(redact.is_secret(key) for key in path) else _shown(repr(redact.value(value)))


def _shown(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}... ({len(text)} characters)"


def _keys_in_document(location: Sequence[str | int], document: Document, path: KeyPath) -> KeyPath:
    """Drop what pydantic adds to a location that is no key of the file (the tag of a tagged union)."""
    keys: list[str | int] = []
    value: Any = document.data
    for key in path:
        value = value[key]
    for index, key in enumerate(location):
        last = index == len(location) - 1
        if isinstance(value, dict) and (key in value or (last and value.get("kind") != key)):
            keys.append(key)
            value = value.get(key)
        elif isinstance(value, list) and isinstance(key, int):
            keys.append(key)
            value = value[key] if key < len(value) else None
    return tuple(keys)


def _valid_keys(model: Any, location: Sequence[str | int]) -> list[str]:
    """The field names (as written in files) of the model that sits at `location` below `model`."""
    schema = model.model_json_schema(by_alias=True)

    def resolve(node: dict[str, Any]) -> dict[str, Any]:
        while "$ref" in node:
            node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
        return node

    def alternatives(node: dict[str, Any]) -> list[dict[str, Any]]:
        node = resolve(node)
        options = node.get("anyOf", []) + node.get("oneOf", [])
        return [inner for option in options for inner in alternatives(option)] if options else [node]

    def tag_of(node: dict[str, Any]) -> Any:
        return node.get("properties", {}).get("kind", {}).get("const")

    nodes = alternatives(schema)
    for key in location:
        tagged = [node for node in nodes if tag_of(node) == key]
        if tagged:
            nodes = tagged
            continue
        below: list[dict[str, Any]] = []
        for node in nodes:
            child = node.get("properties", {}).get(str(key)) or node.get("items") or node.get("additionalProperties")
            if isinstance(child, dict):
                below += alternatives(child)
        nodes = below
    return sorted({name for node in nodes for name in node.get("properties", {})})
