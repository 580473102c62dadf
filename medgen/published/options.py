"""The published system's config.json, read and checked option by option; nothing in it is run. Used by job.py and weights.py."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medgen.errors import InputError
from medgen.models.pacgan.config import FACTORS, FIRST_SIZE, PER_PHASE
from medgen.published.expressions import ExpressionError, checked, evaluate

LARGEST_BYTES = 2**20
SHOWN = 60  # letters of a value
# what its README means by it, though Python would make one large number of it
TIMES_PHASES = re.compile(r"\s*(\d+)\s*\*\s*len\(\s*FACTORS\s*\)\s*")

FOLDERS = (
    "DATA_TRAIN_DIRECTORY", "LABEL_TRAIN_DIRECTORY", "DATA_TEST_DIRECTORY", "LABEL_TEST_DIRECTORY", "IMAGE_DIRECTORY", "MODEL_DIRECTORY",
)  # fmt: skip
TEXTS = (*FOLDERS, "DEVICE")
# taken where a file does not give them: what its README calls the default, and for the modes that nothing is done
DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(FOLDERS, ""), "DEVICE": "cuda", "GPUS_N": 0, "IMAGE_CHANNELS": 1, "CLASS_SIZE": 2,
    "IN_CHANNELS": 512, "FACTORS": list(FACTORS), "EMBEDDING_DIM": 3, "Z_DIM": 512,
    "PROGRESSIVE_EPOCHS": "[100]*len(FACTORS)", "BATCH_SIZES": list(PER_PHASE["batch_sizes"]), "CRITIC_ITERATIONS": list(PER_PHASE["critic_iterations"]),
    "LEARNING_RATE": 1e-3, "LAMBDA_GP": 10, "LAMBDA_CLS1": 4, "LAMBDA_CLS2": "LAMBDA_CLS1/2",
    "VALIDATE": False, "START_CHECK_AT": 0.6, "TESTING": False, "TEST_USING_BEST_MODEL": True, "GENERATE": False, "N_IMAGES_GENERATED": [200],
    "LOAD_MODEL": False, "START_TRAIN_AT_IMG_SIZE": FIRST_SIZE,
}  # fmt: skip


@dataclass(frozen=True)
class Note:
    """Something to tell about an option."""

    option: str
    text: str


@dataclass(frozen=True)
class Options:
    """Every option by its own name in lower case. `given`: how many of them stand in the file."""

    path: Path
    given: int
    notes: tuple[Note, ...]
    data_train_directory: str
    label_train_directory: str
    data_test_directory: str
    label_test_directory: str
    image_directory: str
    model_directory: str
    device: str
    gpus_n: tuple[int, ...]
    image_channels: int
    class_size: int
    in_channels: int
    factors: tuple[float, ...]
    embedding_dim: int
    z_dim: int
    progressive_epochs: tuple[float, ...]
    batch_sizes: tuple[int, ...]
    critic_iterations: tuple[int, ...]
    learning_rate: float
    lambda_gp: float
    lambda_cls1: float
    lambda_cls2: float
    validate: bool
    start_check_at: float
    testing: bool
    test_using_best_model: bool
    generate: bool
    n_images_generated: tuple[int, ...]
    load_model: bool
    start_train_at_img_size: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """Pixels per side of every phase."""
        return tuple(FIRST_SIZE * 2**level for level in range(len(self.factors)))

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels at each size; the published system cuts off what is left of a whole number."""
        return tuple(int(self.in_channels * factor) for factor in self.factors)


def read_options(path: Path) -> Options:
    """Raises InputError naming every option that cannot be read, and what is allowed."""
    reading = _Reading(_read_json(path))
    if not reading.raw.keys() & DEFAULTS.keys():
        raise InputError(f"{path}: none of the published system's options stands in it ({', '.join(list(DEFAULTS)[:3])} ...); is it another file?")
    values: dict[str, Any] = {}
    problems: list[str] = []
    for name in DEFAULTS:
        try:
            values[name.lower()] = READERS[name](reading, name)
        except ExpressionError as error:
            problems.append(f"{path}: {name}: {error}")
    if problems:
        raise InputError("\n".join(problems))
    notes = [*reading.notes, *_notes_on_names(reading.raw)]
    return Options(path=path, given=len(reading.raw.keys() & DEFAULTS.keys()), notes=tuple(notes), **values)


def _read_json(path: Path) -> dict[str, Any]:
    """All options in one mapping, whatever groups they stand in."""
    try:
        with path.open("rb") as handle:
            content = handle.read(LARGEST_BYTES + 1)
        if len(content) > LARGEST_BYTES:
            raise InputError(f"{path}: larger than {LARGEST_BYTES // 2**20} MB, which is no configuration; is it the right file?")
        found = json.loads(content.decode("utf-8-sig"), object_pairs_hook=lambda pairs: _without_repeats(path, pairs))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}") from None
    except (OSError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected an object of options {{\"Z_DIM\": 512, ...}}, found {type(found).__name__}")
    return dict(_without_repeats(path, _flat(found)))


def _flat(found: dict[str, Any]) -> list[tuple[str, Any]]:
    return [pair for name, value in found.items() for pair in (_flat(value) if isinstance(value, dict) else [(name, value)])]


def _without_repeats(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"{path}: {twice[0]} stands twice; keep one of them")
    return dict(pairs)


def _notes_on_names(raw: dict[str, Any]) -> list[Note]:
    notes = []
    for name in raw:
        if name not in DEFAULTS:
            close = difflib.get_close_matches(name, DEFAULTS, n=1)
            meant = f"did you mean {close[0]}?" if close else "nothing stands for it in the spec"
            notes.append(Note(name, f"no option of the published system ({_shown(raw[name])}); {meant}"))
    notes += [Note(name, f"not given; taken is {_shown(default)}") for name, default in DEFAULTS.items() if name not in raw and name not in FOLDERS]
    return notes


class _Reading:
    """The options as they stand in the file, worked out when they are asked for, and what there is to tell of them."""

    def __init__(self, raw: dict[str, Any]):
        self.raw = raw
        self.notes: list[Note] = []
        self._open: list[str] = []  # options that are being worked out: one that needs itself has no value

    def text(self, name: str) -> str:
        given = self.raw.get(name, DEFAULTS[name])
        if not isinstance(given, str):
            raise ExpressionError(f"{_shown(given)} is not a text")
        return given.strip().strip("'\"")

    def value(self, name: str) -> Any:
        if name not in DEFAULTS:
            raise ExpressionError(f"{_shown(name)} is neither a number nor an option")
        if name in TEXTS:
            raise ExpressionError(f"{name} is a text, not a number")
        if name in self._open:
            raise ExpressionError(f"it needs itself: {' -> '.join([*self._open, name])}")
        self._open.append(name)
        try:
            return self._worked_out(self.raw.get(name, DEFAULTS[name]))
        finally:
            self._open.pop()

    def _worked_out(self, given: Any) -> Any:
        if isinstance(given, list):
            if any(isinstance(item, list) for item in given):
                raise ExpressionError("a list in a list has no meaning here")
            return [self._worked_out(item) for item in given]
        if isinstance(given, str):
            return evaluate(given, self.value)
        if isinstance(given, int | float):
            return checked(given)
        raise ExpressionError(f"{_shown(given)} has no meaning here")


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _folder(reading: _Reading, name: str) -> str:
    """With slashes, and none at the end."""
    text = reading.text(name)
    if "\0" in text or "\n" in text:
        raise ExpressionError("no path holds such a character")
    if "\\" in text:
        text = text.replace("\\", "/")
        reading.notes.append(Note(name, f"written with backslashes; read as {text}"))
    return text.rstrip("/") or text[:1]


def _needed_folder(reading: _Reading, name: str) -> str:
    folder = _folder(reading, name)
    if not folder:
        raise ExpressionError("not given; name the folder with Real4x4.nii.gz to the largest size")
    return folder


def _device(reading: _Reading, name: str) -> str:
    """Which of the two a text asks for, whatever it asks first: "cuda if available" is cuda."""
    text = reading.text(name)
    found = next((device for device in ("cuda", "cpu") if device in text.lower()), None)
    if found is None:
        raise ExpressionError(f"{_shown(text)} names neither cuda nor cpu")
    return found


def _as_whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise ExpressionError(f"{_shown(value)} is not a whole number")
    return int(value)


def _as_number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ExpressionError(f"{_shown(value)} is not a number")
    return value


def _whole(reading: _Reading, name: str) -> int:
    return _as_whole(reading.value(name))


def _number(reading: _Reading, name: str) -> float:
    return _as_number(reading.value(name))


def _flag(reading: _Reading, name: str) -> bool:
    value = reading.value(name)
    if value not in (0, 1):
        raise ExpressionError(f"{_shown(value)} is neither true nor false")
    return bool(value)


def _image_channels(reading: _Reading, name: str) -> int:
    count = _whole(reading, name)
    if count not in (1, 3):
        raise ExpressionError(f"{count} channels; allowed are 1 (grey) and 3 (colour)")
    return count


def _factors(reading: _Reading, name: str) -> tuple[float, ...]:
    value = reading.value(name)
    if not isinstance(value, list) or not value:
        raise ExpressionError(f"{_shown(value)} is no list of one number per size, such as [1, 1, 1/2]")
    return tuple(_as_number(item) for item in value)


def _phases(reading: _Reading) -> int:
    """How many sizes there are; what is wrong with FACTORS itself is told there."""
    try:
        return len(_factors(reading, "FACTORS"))
    except ExpressionError:
        raise ExpressionError("goes by FACTORS, which cannot be read") from None


def _per_phase(entry: Callable[[Any], Any]) -> Callable[[_Reading, str], tuple[Any, ...]]:
    def read(reading: _Reading, name: str) -> tuple[Any, ...]:
        count = _phases(reading)
        given = reading.raw.get(name)
        if isinstance(given, str) and (match := TIMES_PHASES.fullmatch(given)):
            reading.notes.append(Note(name, f"{given.strip()} is read as {match[1]} at each of the {count} sizes"))
            return tuple(entry(int(match[1])) for _ in range(count))
        value = reading.value(name)
        if not isinstance(value, list):
            raise ExpressionError(f"{_shown(value)} is one value for {count} sizes; write a list of {count}, such as [{_shown(value)}]*len(FACTORS)")
        if name not in reading.raw and len(value) > count:
            value = value[:count]
        if len(value) != count:
            raise ExpressionError(f"has {len(value)} entries, FACTORS has {count}; write one per size, from {FIRST_SIZE} to {FIRST_SIZE * 2 ** (count - 1)} px")
        return tuple(entry(item) for item in value)

    return read


def _share(reading: _Reading, name: str) -> float:
    """A share of a phase, which may be written as percent."""
    value = _number(reading, name)
    if 0 <= value < 1:
        return value
    if 1 < value < 100:
        reading.notes.append(Note(name, f"{value:g} is read as {value:g} %"))
        return value / 100
    raise ExpressionError(f"{value:g} is no share of the epochs; write 0.6 for 60 %")


def _some_wholes(reading: _Reading, name: str) -> tuple[int, ...]:
    value = reading.value(name)
    return tuple(_as_whole(item) for item in (value if isinstance(value, list) else [value]))


def _image_counts(reading: _Reading, name: str) -> tuple[int, ...]:
    counts, classes = _some_wholes(reading, name), _whole(reading, "CLASS_SIZE")
    if len(counts) not in (1, classes):
        raise ExpressionError(f"counts {len(counts)} classes, CLASS_SIZE is {classes}; write one number for all, or {classes}")
    if min(counts) < 0:
        raise ExpressionError(f"{min(counts)} is below 0")
    return counts


def _first_size(reading: _Reading, name: str) -> int:
    size, sizes = _whole(reading, name), [FIRST_SIZE * 2**level for level in range(_phases(reading))]
    if size not in sizes:
        raise ExpressionError(f"{size} px is none of the sizes of FACTORS: {', '.join(map(str, sizes))}")
    return size


READERS: dict[str, Callable[[_Reading, str], Any]] = {
    **dict.fromkeys(FOLDERS, _folder), "DATA_TRAIN_DIRECTORY": _needed_folder, "DEVICE": _device, "GPUS_N": _some_wholes,
    "IMAGE_CHANNELS": _image_channels, "CLASS_SIZE": _whole, "IN_CHANNELS": _whole, "FACTORS": _factors, "EMBEDDING_DIM": _whole, "Z_DIM": _whole,
    "PROGRESSIVE_EPOCHS": _per_phase(_as_number), "BATCH_SIZES": _per_phase(_as_whole), "CRITIC_ITERATIONS": _per_phase(_as_whole),
    "LEARNING_RATE": _number, "LAMBDA_GP": _number, "LAMBDA_CLS1": _number, "LAMBDA_CLS2": _number,
    "VALIDATE": _flag, "START_CHECK_AT": _share, "TESTING": _flag, "TEST_USING_BEST_MODEL": _flag, "GENERATE": _flag, "N_IMAGES_GENERATED": _image_counts,
    "LOAD_MODEL": _flag, "START_TRAIN_AT_IMG_SIZE": _first_size,
}  # fmt: skip
