"""Any two folders of images compared, with no run behind them. Called by two_folders.py for `medgen evaluate SYNTHETIC REAL`.

The folders become the two sides that the metrics know (inputs.py); what had to be assumed about them is told."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medgen import spec, weights
from medgen.data.image_looks import Reading, stem_of
from medgen.data.store import SliceStore, open_store
from medgen.errors import InputError
from medgen.evaluate.features import Bench, Progress, Say
from medgen.evaluate.file_images import ImageFolder, by_content, open_folder
from medgen.evaluate.folder_sides import SPLIT, RealFolder, SyntheticFolder
from medgen.evaluate.inputs import SPACING, Pairing, Sides, sides_of
from medgen.evaluate.run import PAIRED, evaluate_sides
from medgen.spec_evaluate import FEATURE_METRICS, MASK_METRICS, Measures

SHOWN = 3
USUAL = ("kid", "prdc", "swd", "psd", "ms_ssim_diversity", "ssim_pairs")


@dataclass(frozen=True)
class Request:
    """What the command line asks for. `measures` without metrics or an extractor: what can be computed here."""

    synthetic: Path
    real: Path
    train: Path | None
    synthetic_masks: Path | None
    real_masks: Path | None
    train_masks: Path | None
    pair: Literal["name", "index"] | None
    reading: Reading
    channel: str | None
    unlike_files: bool
    measures: dict[str, Any]
    seed: int
    cache: Path


@dataclass(frozen=True)
class Matched:
    """Both sides, and what had to be assumed about them, in words."""

    sides: Sides
    notes: list[str]


@dataclass(frozen=True)
class Compared:
    """What there is to write: the record of metrics.json, the lines of suspects.csv, and both sides for their pictures."""

    record: dict[str, Any]
    suspects: list[dict[str, Any]]
    sides: Sides


def evaluate_folders(request: Request, say: Say, progress: Progress) -> Compared:
    """Compare; writes nothing but the features it keeps.

    Raises InputError for folders that cannot be compared, naming the file or the option that would mend it."""
    measures = measures_of(request)
    matched = sides_of_folders(request, measures)
    for note in matched.notes:
        say(f"note: {note}")
    evaluated = evaluate_sides(matched.sides, measures, {}, None, Bench(request.cache, lambda _: None, progress))
    if not evaluated.record["scores"]:
        raise InputError("nothing could be computed: " + "; ".join(f"{name}: {reason}" for name, reason in evaluated.record["skipped"].items()))
    record = evaluated.record | {
        "stage": "folders",
        "notes": matched.notes,
        "generation": {},
        "inputs": {
            "synthetic": str(request.synthetic), "real": str(request.real), "train": None if request.train is None else str(request.train),
            "dataset_index_sha256": matched.sides.dataset.fingerprint, "data_fingerprint": matched.sides.store.fingerprint,
        },
    }  # fmt: skip
    return Compared(record, evaluated.suspects, matched.sides)


def measures_of(request: Request) -> Measures:
    """The metrics that were asked for, or those that can be computed with what is there."""
    asked = dict(request.measures)
    if "metrics" not in asked:
        perceptual = ["lpips_diversity", *(["lpips"] if request.pair is not None else [])] if "lpips" in asked else []
        asked["metrics"] = [*USUAL, *(PAIRED if request.pair is not None else ()), *perceptual]
    if "extractor" not in asked and set(asked["metrics"]) & set(FEATURE_METRICS):
        asked["extractor"] = "inception" if _has_weights("inception") else "random_conv"
    measures = Measures.model_validate(asked)
    if "auc" in measures.metrics:
        raise InputError("--metrics auc: it asks the model that made the images, and there is none here; it is a metric of an evaluate stage in a job")
    return measures


def _has_weights(name: str) -> bool:
    return weights.WEIGHTS_VARIABLE in os.environ and weights.usual_file(weights.REGISTRY[name], weights.WITHOUT).is_file()


def sides_of_folders(request: Request, measures: Measures) -> Matched:
    """Open the folders and match them. Raises InputError if they do not fit together."""
    if request.real.suffix in (".yaml", ".yml"):
        return _against_job(request, measures)
    if request.channel is not None:
        raise InputError(f"--channel {request.channel}: only the data of a job have channels with names; remove it")
    if request.train is not None and request.train.resolve() == request.real.resolve():
        raise InputError(f"--train {request.train}: the same folder as REAL; copies are judged by real images that the model has not seen")
    of_masks = set(measures.metrics) <= set(MASK_METRICS)
    reading = replace(request.reading, content=0.0) if of_masks or request.pair is not None else request.reading
    synthetic = open_folder(request.synthetic, replace(reading, patient=None), request.synthetic if of_masks else request.synthetic_masks)
    real = open_folder(request.real, reading, request.real if of_masks else request.real_masks)
    train = None if request.train is None else open_folder(request.train, reading, request.train_masks)
    size = _common_size([synthetic, real, *([train] if train is not None else [])], reading)
    fixed = replace(reading, size=size)
    folders = [None if folder is None else _with_spacing(replace(folder, reading=fixed)) for folder in (synthetic, real, train)]
    _require_masks(measures, request.pair is not None, synthetic, real, train)
    if measures.extractor is not None and measures.extractor.kind == "encoder" and train is None:
        raise InputError("--extractor encoder: it learns from training images: give them with --train FOLDER, or write --extractor random_conv, which needs none")
    if reading.window is not None and not any(folder.takes_window for folder in (synthetic, real, train) if folder is not None):
        raise InputError("--window has no effect on pictures and stacks, whose black and white are known; remove it")
    notes, folders = ([], folders) if of_masks else _same_kind_of_files(folders, request.unlike_files)
    notes += [f"{folder.root}: {folder.left_out} slices of volumes left out, less than {reading.content:.0%} of their pixels above 0" for folder in folders if folder is not None and folder.left_out]
    if train is not None:
        _require_unseen(real, train)
    if request.synthetic.resolve() == request.real.resolve():
        notes.append("SYNTHETIC and REAL are the same folder: what is measured is how each metric sees no difference at all")
    synthetic, real, train = _by_class(folders, notes)
    has_classes = "label" in synthetic.items.columns
    if request.reading.patient is None and (real.items["patient"] == real.items["file"]).all() and len(real.items) > 1:
        notes.append(f"each real file counts as a patient of its own; if {real.root} has several images of one, name them with --patient REGEX: else intervals are too narrow")
    paired = synthetic.items.assign(**_partners(synthetic, RealFolder(real, train, has_classes), request.pair))
    store = RealFolder(by_content(real), None if train is None else by_content(train), has_classes)
    ordered = by_content(replace(synthetic, items=paired))
    dataset = SyntheticFolder(ordered, ordered.items, shows_masks=of_masks)
    pairing = Pairing(f"the real image of the same {'name' if request.pair == 'name' else 'place in the order'}", "no pairs: say which images belong together, --pair name or --pair index")
    sides = sides_of(dataset, store, request.seed, SPLIT, ("train",) if train is not None else (), measures, pairing)
    return Matched(sides, notes)


def _against_job(request: Request, measures: Measures) -> Matched:
    """With the test split of a job's data, and its train split as what the model was trained on: windows, patients and masks are as the job says."""
    needless = {"--train": request.train, "--real-masks": request.real_masks, "--train-masks": request.train_masks, "--patient": request.reading.patient, "--pair": request.pair}
    given = [name for name, value in needless.items() if value is not None]
    if given:
        raise InputError(f"{given[0]} has no effect beside the data of a job, {request.real}; remove it")
    checked = spec.load(request.real)
    if checked.data is None:
        raise InputError(f"{request.real}: a job without data; give a folder of real images")
    store = open_store(checked.data, checked.seed, request.cache, lambda _: None)
    synthetic = open_folder(request.synthetic, replace(request.reading, patient=None), request.synthetic_masks)
    if synthetic.size != store.size:
        raise InputError(f"{synthetic.root}: images of {synthetic.size} px, but the data of {request.real} have {store.size} px; bring them to that with --size {store.size}")
    if synthetic.eight_bits and not request.unlike_files:
        raise InputError(f"{synthetic.root}: 8 bits a value, but not the data of {request.real}: metrics would see how the files were stored. Store 16 bits, or compare all the same with --unlike-files")
    ordered = by_content(_with_spacing(replace(synthetic, items=synthetic.items.drop(columns="label").assign(condition_kind="none", condition=""))))
    dataset = SyntheticFolder(ordered, ordered.items, _channel_of(request, synthetic, store))
    pairing = Pairing("", "no pairs: nobody says which slice of the job's data an image belongs to")
    sides = sides_of(dataset, store, checked.seed, "test", ("train",), measures, pairing)
    notes = [f"real side: the test split of {request.real}, its train split as what the model was trained on; all that is random is drawn from the job's seed, {checked.seed}"]
    return Matched(sides, [*notes, *([f"{synthetic.root}: 8 bits a value, compared all the same"] if synthetic.eight_bits else [])])


def _channel_of(request: Request, synthetic: ImageFolder, store: SliceStore) -> str | None:
    """Which channel of the job the images show; None for colours, which are called alike."""
    if synthetic.channels == store.channels:
        return None
    if len(synthetic.channels) > 1:
        raise InputError(f"{synthetic.root} is in colour, the data of {request.real} have {', '.join(store.channels)}; bring it to gray with --gray")
    if request.channel is None and len(store.channels) != 1:
        raise InputError(f"{request.real} has several channels: {', '.join(store.channels)}; say which one {synthetic.root} shows with --channel")
    channel = request.channel or store.channels[0]
    if channel not in store.channels:
        raise InputError(f"--channel {channel}: the channels of {request.real} are: {', '.join(store.channels)}")
    return channel


def _with_spacing(folder: ImageFolder) -> ImageFolder:
    spacings = folder.spacings_mm()
    return folder if spacings is None else replace(folder, items=folder.items.assign(**dict(zip(SPACING, spacings.T, strict=True))))


def _common_size(folders: list[ImageFolder], reading: Reading) -> int:
    if reading.size is not None:
        return reading.size
    sizes = {folder.size: folder.root for folder in folders}
    if len(sizes) > 1:
        told = ", ".join(f"{size} px in {root}" for size, root in sizes.items())
        raise InputError(f"the sides differ in size: {told}; bring all to one with --size {min(sizes)}")
    return next(iter(sizes))


def _same_kind_of_files(folders: list[ImageFolder | None], accepted: bool) -> tuple[list[str], list[ImageFolder | None]]:
    """Bits lost on one side only are a difference that every metric sees; they are refused, or lost on all sides and told."""
    known = [folder for folder in folders if folder is not None]
    channels = {tuple(folder.channels): folder.root for folder in known}
    if len(channels) > 1:
        kinds = [f"{root} is {'gray' if len(names) == 1 else 'in colour'}" for names, root in channels.items()]
        raise InputError(f"{' and '.join(kinds)}; bring both to gray with --gray")
    unlike = next((f"{folder.root}: {folder.unlike_inside}" for folder in known if folder.unlike_inside), None)
    if unlike is not None and not accepted:
        raise InputError(f"{unlike}: metrics would see how the files were stored. Store all alike, or compare them all the same with --unlike-files")
    coarse, lossy = [folder for folder in known if folder.eight_bits], [folder for folder in known if folder.lossy]
    notes = []
    for some, what in ((coarse, "8 bits a value"), (lossy, "JPEG")):
        if some and len(some) < len(known):
            others = ", ".join(str(folder.root) for folder in known if folder not in some)
            told = f"{', '.join(str(folder.root) for folder in some)}: {what}, but not {others}"
            if not accepted:
                raise InputError(f"{told}: metrics would see how the files were stored. Store all sides alike, or compare them all the same with --unlike-files")
            notes.append(f"{told}; compared all the same{' (the finer side rounded to 8 bits)' if what.startswith('8') else ''}")
    rounded = bool(coarse) and len(coarse) < len(known)
    return notes, [folder if folder is None or folder.eight_bits or not rounded else replace(folder, to_eight_bits=True) for folder in folders]


def _by_class(folders: list[ImageFolder | None], notes: list[str]) -> list[Any]:
    """Subfolders (or labels) that stand on both sides are classes; others are patients."""
    synthetic, real = folders[0], folders[1]
    assert synthetic is not None and real is not None
    names = [set(folder.items["label"]) - {""} for folder in (synthetic, real)]
    are_classes = bool(names[0]) and names[0] == names[1] and not any((folder.items["label"] == "").any() for folder in (synthetic, real))
    if are_classes:
        notes.append(f"{', '.join(sorted(names[0]))} stand on both sides: taken as classes")
    changed: list[Any] = []
    for folder in folders:
        if folder is None:
            changed.append(None)
            continue
        items = folder.items
        if are_classes:
            items = items.assign(patient=np.where(items["patient"] == items["label"], items["file"], items["patient"]))
        elif folder is synthetic:
            items = items.drop(columns="label")
        else:
            items = items.assign(label="")
        changed.append(replace(folder, items=items))
    return changed


def _require_masks(measures: Measures, has_pairs: bool, synthetic: ImageFolder, real: ImageFolder, train: ImageFolder | None) -> None:
    """Lesions are chosen alike on all sides, or the sides differ by the choice. A synthetic image may have the mask of its pair."""
    if not measures.positive_only and measures.by != "lesion_size":
        return
    option = "--by lesion_size" if measures.by == "lesion_size" else "--positive-only"
    needed = [(synthetic, "--synthetic-masks")] if not has_pairs else []
    needed += [(real, "--real-masks"), *([(train, "--train-masks")] if train is not None else [])]
    for folder, masks in needed:
        if not folder.has_masks:
            raise InputError(f"{option}: nothing tells which images of {folder.root} show a lesion; give its masks with {masks} FOLDER")


def _require_unseen(real: ImageFolder, train: ImageFolder) -> None:
    name_of = {digest: name for name, digest in train.digests.items()}
    shared = [(name, name_of[digest]) for name, digest in real.digests.items() if digest in name_of]
    if shared:
        raise InputError(f"{len(shared)} of the {len(real.digests)} files of {real.root} are also in --train {train.root}: {shared[0][0]} is {shared[0][1]}; "
                         "the real side must be images that the model has not seen: remove them from one of the folders")  # fmt: skip


def _partners(synthetic: ImageFolder, store: RealFolder, pair: str | None) -> dict[str, Any]:
    """Columns with the real image that each item belongs to. Raises InputError unless every image has exactly one partner."""
    items, real = synthetic.items, store.images_folder.items
    aliases = store.aliases[: len(real)]
    if pair is None:
        return {"condition_kind": "none", "condition": ""}
    if pair == "index":
        if len(items) != len(real):
            raise InputError(f"--pair index: {len(items)} images in {synthetic.root}, but {len(real)} in {store.images_folder.root}; pairs need as many, in the same order")
        return {"condition_kind": "real", "condition": aliases}
    partner = {_name_of(row): alias for row, alias in zip(real.to_dict("records"), aliases, strict=True)}
    names = [_name_of(row) for row in items.to_dict("records")]
    alone, left = [name for name in names if name not in partner], [name for name in partner if name not in set(names)]
    if alone or left or len(set(names)) < len(names) or len(partner) < len(real):
        told = [f"{len(some)} of {root} without a partner: {', '.join(some[:SHOWN])}{' ...' if len(some) > SHOWN else ''}"
                for some, root in ((alone, synthetic.root), (left, store.images_folder.root)) if some]  # fmt: skip
        raise InputError(f"--pair name: {'; '.join(told) or 'two images of one side have the same name'}; a pair has the same path in both folders, but for the suffix")
    return {"condition_kind": "real", "condition": [partner[name] for name in names]}


def _name_of(item: dict[Any, Any]) -> str:
    return f"{stem_of(item['file'])}#{item['number']}" if item["id"] != item["file"] else stem_of(item["file"])
