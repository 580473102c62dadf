"""Published weights: what each is for, where it comes from, and whether the file here is that one. Used by the spec, the evaluation and `medgen weights`.

Nothing is ever downloaded. Files lie in the folder $MEDGEN_WEIGHTS; beside each, `<file>.json` records the hash that `medgen weights add`
found, for files whose publisher gives none or only its first digits. A file that is not what it was is refused wherever it is used."""

from __future__ import annotations

import functools
import os
import pickle
import pickletools
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medgen import files
from medgen.errors import InputError
from medgen.names import absolute

if TYPE_CHECKING:
    import torch

WEIGHTS_VARIABLE = "MEDGEN_WEIGHTS"
UNSET_FOLDER = Path(f"${WEIGHTS_VARIABLE}")  # shown where nobody has set it
PAGE = "docs/weights.md"
WITHOUT = "what needs no weights: extractor: encoder or random_conv, and the metrics swd, ssim_pairs and ms_ssim_diversity"
SHOWN_DIGITS = 8  # of a hash, as many as publishers put into a file's name
SHOWN_COLUMNS = 120  # where there is no terminal
LEGACY_PICKLES = 4  # at the start of a file that torch saved before 1.6: two marks, the system, the object
COLOURS = {"there": "green", "not recorded": "yellow", "missing": "dim", "changed": "bold red"}


@dataclass(frozen=True)
class Published:
    """One file of weights as its authors publish it.

    `sha256` is the whole hash or the digits of it that are known for sure (publishers put the first eight into a file's name), "" if
    none are. `holds` are tensors with their shapes that no other entry has all of: a file is recognised by them."""

    name: str
    purpose: str
    file_name: str
    source: str
    licence: str
    citation: str
    holds: dict[str, tuple[int, ...]]
    sha256: str = ""
    size_bytes: int | None = None


INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


def _dinov2(name: str, letter: str, width: int, registers: int) -> Published:
    model, suffix = f"dinov2_vit{letter}14", "_reg4" if registers else ""
    holds: dict[str, tuple[int, ...]] = {"pos_embed": (1, 1370, width), **({"register_tokens": (1, registers, width)} if registers else {})}
    cited = "; registers: Darcet et al. 2023, arXiv:2309.16588" if registers else ""
    return Published(
        name=name, purpose="extractor: dinov2", file_name=f"{model}{suffix}_pretrain.pth",
        source=f"https://dl.fbaipublicfiles.com/dinov2/{model}/{model}{suffix}_pretrain.pth",
        licence="Apache 2.0", citation=f"Oquab et al. 2023, arXiv:2304.07193{cited}", holds=holds,
    )  # fmt: skip


def _torchvision(name: str, purpose: str, file_name: str, digits: str, citation: str, holds: dict[str, tuple[int, ...]]) -> Published:
    return Published(
        name=name, purpose=purpose, file_name=file_name, source=f"https://download.pytorch.org/models/{file_name}",
        licence="BSD 3-clause", citation=citation, holds=holds, sha256=digits,
    )  # fmt: skip


_ENTRIES = (
    Published(
        name="inception", purpose="extractor: inception", file_name="weights-inception-2015-12-05-6726825d.pth",
        source="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        licence="Apache 2.0", citation="Szegedy et al. 2016, arXiv:1512.00567; Heusel et al. 2017, arXiv:1706.08500",
        holds={"Mixed_7c.branch1x1.conv.weight": (320, 2048, 1, 1), "fc.weight": (1008, 2048)},
        sha256=INCEPTION_SHA256, size_bytes=95_628_359,
    ),
    _dinov2("dinov2_vits14", "s", 384, 0), _dinov2("dinov2_vitb14", "b", 768, 0), _dinov2("dinov2_vitl14", "l", 1024, 0),
    _dinov2("dinov2_vits14_reg", "s", 384, 4), _dinov2("dinov2_vitb14_reg", "b", 768, 4), _dinov2("dinov2_vitl14_reg", "l", 1024, 4),
    Published(
        name="swav", purpose="extractor: swav", file_name="swav_800ep_pretrain.pth.tar",
        source="https://dl.fbaipublicfiles.com/deepcluster/swav_800ep_pretrain.pth.tar",
        licence="CC BY-NC 4.0", citation="Caron et al. 2020, arXiv:2006.09882",
        holds={"module.layer4.2.conv3.weight": (2048, 512, 1, 1), "module.prototypes.weight": (3000, 128)},
    ),
    Published(
        name="radimagenet", purpose="extractor, perceptual", file_name="ResNet50.pt",
        source="RadImageNet_pytorch/ResNet50.pt in https://drive.google.com/file/d/1RHt2GnuOYlc_gcoTETtBDSW73mFyRAtR",
        licence="MIT", citation="Mei et al. 2022, doi:10.1148/ryai.210315",
        holds={"backbone.7.2.conv3.weight": (2048, 512, 1, 1)},
    ),
    _torchvision("resnet50", "extractor: resnet50", "resnet50-11ad3fa6.pth", "11ad3fa6", "He et al. 2015, arXiv:1512.03385",
                 {"layer4.2.conv3.weight": (2048, 512, 1, 1), "fc.weight": (1000, 2048)}),
    _torchvision("alexnet", "lpips, perceptual", "alexnet-owt-7be5be79.pth", "7be5be79", "Krizhevsky 2014, arXiv:1404.5997",
                 {"features.10.weight": (256, 256, 3, 3), "classifier.6.weight": (1000, 4096)}),
    _torchvision("vgg16", "lpips, perceptual", "vgg16-397923af.pth", "397923af", "Simonyan and Zisserman 2014, arXiv:1409.1556",
                 {"features.28.weight": (512, 512, 3, 3), "classifier.6.weight": (1000, 4096)}),
    _torchvision("squeezenet", "lpips, perceptual", "squeezenet1_1-b8a52dc0.pth", "b8a52dc0", "Iandola et al. 2016, arXiv:1602.07360",
                 {"features.12.expand3x3.weight": (256, 64, 3, 3), "classifier.1.weight": (1000, 512, 1, 1)}),
)  # fmt: skip
REGISTRY = {entry.name: entry for entry in _ENTRIES}


def folder() -> Path:
    """$MEDGEN_WEIGHTS. Raises InputError if it is not set."""
    named = os.environ.get(WEIGHTS_VARIABLE)
    if not named:
        raise InputError(f"no folder for weights: `export {WEIGHTS_VARIABLE}=<a folder that jobs can read>`")
    return absolute(Path(named))


def usual_file(entry: Published, without: str) -> Path:
    """Where this file lies. Raises InputError, with what to fetch and what can be done `without` it, if there is no folder for weights."""
    try:
        return folder() / entry.file_name
    except InputError as error:
        raise InputError(f"{entry.name} needs its weights, and there is {error}, and put there {_fetch(entry)}; or write file: <path>; {without}") from None


def verified(file: Path, expected: str | None, entry: Published | None, key: str, without: str) -> str:
    """The sha256 of a file that a spec names under `key`.

    It must be `expected` if that is given, else what the publisher says, and what was recorded of this file; and hold the tensor by
    which its network is known. Raises InputError if not, or if it is missing: with what to fetch, where to put it, and what can be done `without`."""
    try:
        facts = file.stat()
        found = _sha256(file, facts.st_size, facts.st_mtime_ns)
    except OSError as error:
        fetch = f"put there {_fetch(entry)}, then `medgen weights add` records it" if entry is not None else "name a file that jobs can read"
        raise InputError(f"{key}: {file}: {error.strerror or error}; weights are never downloaded ({PAGE}): {fetch}; {without}") from None
    wrong = _not_what_it_should_be(file, found, expected, entry)
    if wrong is not None:
        raise InputError(f"{key}: {file} has the sha256 {found}, {wrong}{f'; published as {_fetch(entry)}' if entry is not None else ''}")
    if entry is not None:
        _require_its_tensor(file, entry, key)
    return found


@functools.cache
def _sha256(file: Path, size_bytes: int, changed_ns: int) -> str:
    """Read once for all points of a sweep, as long as the file does not change."""
    return files.sha256_file(file)


def _require_its_tensor(file: Path, entry: Published, key: str) -> None:
    """What can be told of the network without torch, and so before anything is queued. Raises InputError."""
    wanted = next(iter(entry.holds))
    try:
        names = _strings(file)
    except (ValueError, StopIteration, zipfile.BadZipFile, OSError):
        raise InputError(f"{key}: {file} is no file of tensors; it was cut short, or is something else. Fetch again {_fetch(entry)}") from None
    if wanted not in names:
        raise InputError(f"{key}: {file} does not hold the weights of {entry.name}: there is no {wanted} in it. Fetch {_fetch(entry)}")


def _strings(file: Path) -> set[str]:
    """All strings in what torch pickled, the names of tensors among them; nothing in the file is run. Raises ValueError if it is no such file."""
    with open(file, "rb") as handle:
        if not zipfile.is_zipfile(handle):
            handle.seek(0)
            found = [value for _ in range(LEGACY_PICKLES) for _, value, _ in pickletools.genops(handle)]
        else:
            with zipfile.ZipFile(handle) as archive:
                pickled = next(name for name in archive.namelist() if name.endswith("data.pkl"))
                found = [value for _, value, _ in pickletools.genops(archive.read(pickled))]
    return {value for value in found if isinstance(value, str)}


def _not_what_it_should_be(file: Path, found: str, expected: str | None, entry: Published | None) -> str | None:
    """In words, or None."""
    if expected is not None:
        return None if found == expected else f"expected {expected}; copy the file again, or write its own sha256: beside file:"
    if entry is not None and not found.startswith(entry.sha256):
        return f"expected {entry.sha256}...; copy the file again, or write its own sha256: beside file:"
    noted = recorded(file)
    if noted is not None and noted.sha256 != found:
        return f"and was recorded with {noted.sha256} ({_record_of(file).name}); copy it again, or `medgen weights add` the new one"
    return None


def _fetch(entry: Published) -> str:
    return f"{entry.file_name} from {entry.source}"


def _record_of(file: Path) -> Path:
    return file.with_name(f"{file.name}.json")


@dataclass(frozen=True)
class Recorded:
    """What `medgen weights add` noted of a file."""

    sha256: str
    size_bytes: int


def recorded(file: Path) -> Recorded | None:
    """None if it was never added. Raises InputError if the record cannot be read."""
    path = _record_of(file)
    if not path.exists():
        return None
    try:
        noted = files.read_json(path)
        return Recorded(str(noted["sha256"]), int(noted["size_bytes"]))
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{path}: not a record of `medgen weights add`; add the file again") from None


def tensors(file: Path, key: str) -> dict[str, torch.Tensor]:
    """The tensors of a file that torch saved, by name; code in it is not run. Raises InputError if it holds anything else."""
    import torch

    try:
        content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # its words advise to run the code
        raise InputError(f"{key}: {file} holds other objects than tensors") from None
    except (RuntimeError, ValueError, KeyError, EOFError, OSError, TypeError, AttributeError) as error:
        raise InputError(f"{key}: {file} is no file of tensors ({type(error).__name__}); it was cut short, or is something else") from None
    if isinstance(content, dict) and "state_dict" in content:
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise InputError(f"{key}: {file} holds no tensors by name")
    return content


# --- the verb ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """What `medgen weights` says of one entry: missing, there, changed, or there and not recorded."""

    entry: Published
    file: Path
    mark: str
    digits: str

    @property
    def record(self) -> dict[str, str]:
        entry = self.entry
        return {"name": entry.name, "for": entry.purpose, "state": self.mark, "file": str(self.file), "sha256": self.digits,
                "source": entry.source, "licence": entry.licence, "citation": entry.citation}  # fmt: skip


def states(read_all: bool) -> list[State]:
    """Of every entry. `read_all`: compare hashes; else the sizes alone, which a copy that broke off shows too."""
    here = folder() if read_all or os.environ.get(WEIGHTS_VARIABLE) else UNSET_FOLDER
    return [_state(entry, here / entry.file_name, read_all) for entry in REGISTRY.values()]


def _state(entry: Published, file: Path, read_all: bool) -> State:
    if not file.is_file():
        return State(entry, file, "missing", entry.sha256)
    noted = recorded(file)
    known = noted.sha256 if noted is not None else entry.sha256
    sizes = (entry.size_bytes, noted.size_bytes if noted is not None else None)
    if any(size not in (None, file.stat().st_size) for size in sizes):
        return State(entry, file, "changed", known)
    if read_all:
        known = files.sha256_file(file)
        if _not_what_it_should_be(file, known, None, entry) is not None:
            return State(entry, file, "changed", known)
    return State(entry, file, "there" if noted is not None or entry.sha256 else "not recorded", known)


def add(file: Path, name: str | None) -> State:
    """Check that a file is what it claims, copy it into the folder and record its hash.

    Raises InputError if it cannot be read, holds other tensors than any entry (or than `name`), or is not the published file."""
    if name is not None and name not in REGISTRY:
        raise InputError(f"--name {name}: no such weights; the names are: {', '.join(REGISTRY)}")
    file = absolute(file)
    if not file.is_file():
        raise InputError(f"{file}: no such file")
    entry = _recognised(file, name)
    digest = files.sha256_file(file)
    if not digest.startswith(entry.sha256):
        raise InputError(f"{file} has the sha256 {digest}, the published {entry.file_name} begins with {entry.sha256[:SHOWN_DIGITS]}; fetch it again from {entry.source}. "
                         "Weights of your own need no place here: name them in the spec, with file: and sha256:")  # fmt: skip
    target = folder() / entry.file_name
    if file != target:
        _copy(file, target, digest)
    note = {"name": entry.name, "sha256": digest, "size_bytes": target.stat().st_size, "source": entry.source, "added": date.today().isoformat()}
    files.write_json(_record_of(target), note)
    return State(entry, target, "there", digest)


def _recognised(file: Path, name: str | None) -> Published:
    found = tensors(file, "weights")
    shapes = {key: tuple(value.shape) for key, value in found.items()}
    fitting = [entry for entry in REGISTRY.values() if entry.holds.items() <= shapes.items() and ("register_tokens" in entry.holds) == ("register_tokens" in shapes)]
    if name is not None and REGISTRY[name] not in fitting:
        wanted = ", ".join(f"{key} {list(shape)}" for key, shape in REGISTRY[name].holds.items())
        raise InputError(f"{file} is not {name}: it does not hold {wanted}{f'; it looks like {fitting[0].name}' if fitting else ''}")
    if not fitting:
        first = next(iter(shapes), "nothing")
        raise InputError(f"{file} holds none of the weights that medgen knows (its first tensor is {first}); it knows: {', '.join(REGISTRY)}")
    return fitting[0]


def _copy(source: Path, target: Path, digest: str) -> None:
    with files.temporary_beside(target) as temporary, open(source, "rb") as reading, open(temporary, "wb") as writing:
        hashing = files.HashingWriter(writing)
        while block := reading.read(files.CHUNK_BYTES):
            hashing.write(block)
        if hashing.digest.hexdigest() != digest:
            raise InputError(f"{source} changed while it was copied; nothing was added")


def show(found: list[State]) -> None:
    """A table of all, and under it what to fetch for those that are missing, in lines that can be copied."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else SHOWN_COLUMNS, highlight=False)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("weights", "for", "state", "sha256", "licence"):
        table.add_column(heading, no_wrap=heading != "licence")
    for state in found:
        table.add_row(state.entry.name, state.entry.purpose, f"[{COLOURS[state.mark]}]{state.mark}[/]", state.digits[:SHOWN_DIGITS] or "-", state.entry.licence)
    console.print(f"{len(found)} files that medgen knows, in {found[0].file.parent}\n", soft_wrap=True)
    console.print(table)
    for line in _advice(found):
        console.print(line, soft_wrap=True, markup=False)


def _advice(found: list[State]) -> Iterator[str]:
    of = {mark: [state for state in found if state.mark == mark] for mark in COLOURS}
    if found[0].file.parent == UNSET_FOLDER:
        yield f"\nThere is no folder for them yet: export {WEIGHTS_VARIABLE}=<a folder that jobs can read>"
    if of["missing"]:
        yield "\nMissing. Fetch where there is a network, then here: medgen weights add FILE"
        yield from (f"  {state.entry.name:<18}{state.entry.source}" for state in of["missing"])
    if of["not recorded"]:
        yield f"\nNot recorded: nobody would notice if they changed. {'; '.join(f'medgen weights add {state.file}' for state in of['not recorded'])}"
    if of["changed"]:
        yield f"\nChanged, and refused by every job: {', '.join(str(state.file) for state in of['changed'])}. Fetch again, then: medgen weights add FILE"
    yield f"\n{WITHOUT[0].upper()}{WITHOUT[1:]}."
