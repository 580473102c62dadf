"""What a synthetic set and its model give away of the training patients: copies, membership, and what is guaranteed. Called by run.py.

The searches themselves are in copies.py and membership.py, on plain rows; here is which rows, and the words."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from medgen import spec
from medgen.checkpoint import Checkpoint
from medgen.data.store import SliceStore
from medgen.errors import MedgenError
from medgen.evaluate import classification, copies, extractors, feature_scores, features, intervals, membership
from medgen.evaluate.copies import Copies, Rows, Whitening
from medgen.evaluate.extractors import Extractor
from medgen.evaluate.features import Bench, Pictures, Say
from medgen.evaluate.inputs import MASK, Sides, some_rows
from medgen.evaluate.maker import maker
from medgen.evaluate.membership import Inferred
from medgen.evaluate.scores import Score, score
from medgen.models.base import Batch, DataShape, Model
from medgen.models.settings import FamilyConfig
from medgen.plan import Plan
from medgen.roc import binary_area
from medgen.rundir import RunDir
from medgen.spec_evaluate import Measures
from medgen.training import load_given, trained_model

SHOWN = 16  # pictures of the most suspicious
MOST_SEARCHED = 100_000  # synthetic images, in pixels; in features those that the other scores are of
MOST_HELD_OUT = 2048  # slices that set the threshold, or are attacked; all training slices are searched
MOST_WITH_MODEL = 128  # a side; each takes some passes of the network
MODEL_BATCH = 16
READ_BLOCK = 512
PIXELS, FEATURES = "pixels", "features"
METRIC_OF = {PIXELS: "near_train", FEATURES: "near_train_features"}

ToRows = Callable[[np.ndarray], np.ndarray]  # images float32 [k,C,H,W] to rows [k,D]


@dataclass(frozen=True)
class Examined:
    """`skipped`: metric -> reason. `nearest`: the pairs for the report's pictures, the most suspicious first. `suspects`: a line per
    synthetic image and space that is below the threshold. `record`: what metrics.json holds under `privacy`, see `in_words`."""

    scores: list[Score]
    skipped: dict[str, str]
    nearest: list[dict[str, Any]]
    suspects: list[dict[str, Any]]
    record: dict[str, Any]


@dataclass(frozen=True)
class Table:
    """All that is compared, in one space. `words`: of the space, for the protocol. `sides.chosen` are the synthetic images."""

    space: str
    words: str
    sides: Sides
    channels: list[str]
    train: np.ndarray  # rows [m, D]
    held_out: Rows
    synthetic: Rows


@dataclass(frozen=True)
class Known:
    """The real slices. `held_out`: at most 2048 store rows, none that is a training slice under another name (`leaked` of them were).

    `people` [m]: of the training slices; patients who share an identical slice count as one (`same_person` names fell away)."""

    train: np.ndarray
    held_out: np.ndarray
    people: np.ndarray
    same_person: int
    leaked: int


SUSPECT_COLUMNS = ("space", "synthetic", "real", "ratio", "threshold")


@dataclass(frozen=True)
class Origin:
    """The run whose model drew the images."""

    run: RunDir
    plan: Plan


def examine(sides: Sides, measures: Measures, origin: Origin | None, bench: Bench) -> Examined:
    """In pixels, and in the features of the extractor that is asked for, else of the one without weights. Without an `origin` there is no model to ask.

    Raises MedgenError for an image of the set that does not verify."""
    say, guarantee = bench.say, None if origin is None else _guarantee(origin, sides)
    if len(sides.train) == 0:
        return _finished([], dict.fromkeys(("near_train", "membership"), "the images that the model was trained on are not given"), [], [], [], guarantee, say)
    held_out = some_rows(sides.held_out(), sides.seed, "copies_held_out", MOST_HELD_OUT)
    if len(held_out) == 0:
        return _finished([], dict.fromkeys(("near_train", "membership"), "needs held-out patients (val or test) as a yardstick"), [], [], [], guarantee, say)
    known = _known(sides, held_out)
    if len(known.held_out) == 0:
        return _finished([], dict.fromkeys(("near_train", "membership"), "every held-out slice is a training slice as well"), [], [], [], guarantee, say)
    tables = [_pixel_table(sides.widened(MOST_SEARCHED), known)]
    if sides.dataset.image_channels and (_gives_a_threshold(known) or _can_be_attacked(sides, known)):
        tables.append(_feature_table(sides, known, measures, bench))
    found, skipped, pairs, searches = _copies(known, tables)
    inferred, reasons = _membership(origin, sides, known, tables[-1], bench)
    for attack, (words, results) in inferred.items():
        found += _membership_scores(sides, attack, words, results, reasons)
    attacks = [{"attack": attack, **asdict(item)} for attack, (_, results) in inferred.items() for item in results]
    return _finished(found, {**skipped, **reasons}, pairs, searches, attacks, guarantee, say)


def _finished(found: list[Score], skipped: dict[str, str], pairs: list[dict[str, Any]], searches: list[dict[str, Any]],
              attacks: list[dict[str, Any]], guarantee: dict[str, Any] | None, say: Say) -> Examined:  # fmt: skip
    record = {"guarantee": guarantee, "searches": searches, "membership": attacks}
    for sentence in in_words(record):
        say(sentence)
    suspects = [{name: pair[name] for name in SUSPECT_COLUMNS} for pair in pairs if pair["is_suspect"]]
    return Examined(found, skipped, _most_suspicious(pairs), suspects, record)


# --- which rows -------------------------------------------------------------------------------------------------------


def _known(sides: Sides, held_out: np.ndarray) -> Known:
    """Without the held-out slices that were trained on under another name: they would hide copies, not reveal them.

    Masks are no mark of a person: small ones are often alike."""
    patients = sides.patients(sides.train).astype(str)
    if not sides.dataset.image_channels:
        return Known(sides.train, held_out, patients, 0, 0)
    prints, theirs = (np.concatenate([copies.fingerprints(block) for block in _real(sides, sides.dataset.image_channels, rows)]) for rows in (sides.train, held_out))
    is_new = ~np.isin(theirs, prints[prints != 0])
    people = copies.people(patients, prints)
    return Known(sides.train, held_out[is_new], people, len(np.unique(patients)) - len(np.unique(people)), int((~is_new).sum()))


def _real(sides: Sides, channels: list[str], rows: np.ndarray) -> Iterator[np.ndarray]:
    """Slices [k,C,H,W], some at a time: a whole training set at full size does not fit into memory."""
    for start in range(0, len(rows), READ_BLOCK):
        some = rows[start : start + READ_BLOCK]
        yield np.stack([sides.store.masks(some).astype(np.float32) if name == MASK else sides.store.images(name, some) for name in channels], axis=1)


def _synthetic(sides: Sides, channels: list[str]) -> Iterator[np.ndarray]:
    for start in range(0, len(sides.chosen), READ_BLOCK):
        some = sides.chosen[start : start + READ_BLOCK]
        yield np.stack([sides.dataset.read(name, some).astype(np.float32) for name in channels], axis=1)


def _gives_a_threshold(known: Known) -> bool:
    return len(known.held_out) >= copies.FEWEST_HELD_OUT


def _pixel_table(sides: Sides, known: Known) -> Table:
    """Of masks alone the place counts: it is most of what tells small ones apart."""
    channels = sides.dataset.outputs
    pixels = f"{min(copies.COMPARED_PIXELS, sides.store.size)} px over {', '.join(channels)}"
    if not sides.dataset.image_channels:
        return _table(PIXELS, f"{pixels}, with mean 0 and norm 1", sides, channels, known, copies.pixel_rows)
    return _table(PIXELS, f"{pixels}, centred, with mean 0 and norm 1", sides, channels, known, lambda images: copies.pixel_rows(copies.centred(images)))


def _feature_table(sides: Sides, known: Known, measures: Measures, bench: Bench) -> Table:
    names = list(sides.pictures)
    bench.say(f"features of {len(known.train)} training, {len(known.held_out)} held-out and {len(sides.chosen)} synthetic images")
    networks = [_extractor(sides, name, measures, bench) for name in names]
    passes = [[features.features(network, pictures, rows, bench) for pictures, rows in _seen(sides, known, name)] for name, network in zip(names, networks, strict=True)]
    train, *others = [parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1) for parts in zip(*passes, strict=True)]
    words = f"features of {', '.join(names)} ({networks[0].name})"
    return Table(FEATURES, words, sides, names, train, Rows(others[0], others[1]), Rows(others[2], others[3]))


def _extractor(sides: Sides, name: str, measures: Measures, bench: Bench) -> Extractor:
    return extractors.load({"kind": "random_conv"}, None) if measures.extractor is None else feature_scores.extractor_of(sides, name, measures, bench)


def _seen(sides: Sides, known: Known, name: str) -> list[tuple[Pictures, np.ndarray]]:
    """What a network sees of one picture: training slices, held-out slices and their mirror images, synthetic images and theirs."""
    real, synthetic = feature_scores.pictures_of(sides, name)
    return [(real, known.train), (real, known.held_out), (_mirrored(real), known.held_out), (synthetic, sides.positions), (_mirrored(synthetic), sides.positions)]


def _mirrored(pictures: Pictures) -> Pictures:
    return Pictures(
        lambda rows: np.ascontiguousarray(pictures.read(rows)[..., ::-1]), lambda rows: [f"{text} mirrored" for text in pictures.contents(rows)], pictures.fingerprint
    )


def passes_of(sides: Sides) -> dict[str, list[tuple[Pictures, np.ndarray]]]:
    """The same of every picture, for who takes features ahead of the evaluation; empty where no search will be made."""
    held_out = some_rows(sides.held_out(), sides.seed, "copies_held_out", MOST_HELD_OUT)
    if len(held_out) == 0 or len(sides.train) == 0:
        return {}
    known = _known(sides, held_out)
    return {name: _seen(sides, known, name) for name in sides.pictures} if _gives_a_threshold(known) or _can_be_attacked(sides, known) else {}


def _table(space: str, words: str, sides: Sides, channels: list[str], known: Known, to_rows: ToRows) -> Table:
    train = np.concatenate([to_rows(block) for block in _real(sides, channels, known.train)])
    held_out, synthetic = (_both_ways(blocks, to_rows) for blocks in (_real(sides, channels, known.held_out), _synthetic(sides, channels)))
    return Table(space, words, sides, channels, train, held_out, synthetic)


def _both_ways(blocks: Iterator[np.ndarray], to_rows: ToRows) -> Rows:
    plain, mirrored = zip(*((to_rows(block), to_rows(copies.mirrored(block))) for block in blocks), strict=True)
    return Rows(np.concatenate(plain), np.concatenate(mirrored))


# --- copies -----------------------------------------------------------------------------------------------------------


def _copies(known: Known, tables: list[Table]) -> tuple[list[Score], dict[str, str], list[dict[str, Any]], list[dict[str, Any]]]:
    """Scores, reasons for what there is none of, every pair of a synthetic image and its nearest training slice, and the record."""
    metrics = [METRIC_OF[table.space] for table in tables]
    if len(np.unique(known.people)) < 2:
        return [], dict.fromkeys(metrics, "needs at least two training patients"), [], []
    searches = [Search(table, result, _why_no_threshold(known, result)) for table in tables for result in [_search(known, table)]]
    measured = [search for search in searches if search.reason is None]
    found = [_copy_score(known, search) for search in measured]
    found += _closeness_scores(measured[-1]) if measured else []
    skipped = {METRIC_OF[search.table.space]: search.reason for search in searches if search.reason is not None}
    pairs = [pair for search in searches for pair in _pairs(known, search)]
    return found, skipped, pairs, [_search_record(known, search) for search in measured]


@dataclass(frozen=True)
class Search:
    """One space, what was found in it, and why that is no measurement, if it is none."""

    table: Table
    result: Copies
    reason: str | None


def _why_no_threshold(known: Known, result: Copies) -> str | None:
    if not _gives_a_threshold(known):
        return f"{len(known.held_out)} held-out slices give no 1st percentile; at least {copies.FEWEST_HELD_OUT} are needed"
    if result.threshold == 0:
        return "1% or more of the held-out slices are equal to a training slice, so that no copy can be told from them"
    return None


def _search(known: Known, table: Table) -> Copies:
    train, held_out, synthetic = table.train, table.held_out, table.synthetic
    if table.space == FEATURES:
        whitening = Whitening.fitted(train)
        train = whitening(train)
        held_out, synthetic = (Rows(whitening(side.plain), whitening(side.mirrored)) for side in (held_out, synthetic))
    return copies.find_copies(synthetic, held_out, table.sides.patients(known.held_out), train, known.people)


def _pairs(known: Known, search: Search) -> list[dict[str, Any]]:
    sides, result = search.table.sides, search.result
    identifiers, store_ids = sides.dataset.index["id"].to_numpy()[sides.chosen], sides.store.aliases
    nearest, ratios = known.train[result.synthetic.place], result.synthetic.ratios
    return [
        {"space": search.table.space, "synthetic": str(identifiers[i]), "real": str(store_ids[nearest[i]]), "ratio": float(ratios[i]),
         "threshold": result.threshold, "is_suspect": bool(search.reason is None and result.suspects[i])}
        for i in np.argsort(ratios, kind="stable")
    ]  # fmt: skip


def _most_suspicious(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One pair per synthetic image, by how far it is below its space's threshold."""
    order = sorted(pairs, key=lambda pair: pair["ratio"] / max(pair["threshold"], 1e-12))
    first: dict[str, dict[str, Any]] = {}
    for pair in order:
        first.setdefault(pair["synthetic"], pair)
    return [{name: pair[name] for name in ("synthetic", "real", "ratio", "space", "is_suspect")} for pair in list(first.values())[:SHOWN]]


def _search_record(known: Known, search: Search) -> dict[str, Any]:
    sides, result = search.table.sides, search.result
    return {
        "space": search.table.space, "threshold": result.threshold, "images": len(sides.chosen), "of_images": len(sides.dataset.index),
        "suspects": int(result.suspects.sum()), "floor": result.floor, "training_slices": len(known.train),
        "held_out_slices": len(known.held_out), "held_out_patients": len(np.unique(sides.patients(known.held_out))),
        "held_out_slices_left_out": known.leaked, "training_patients_taken_for_another": known.same_person,
    }  # fmt: skip


def _copy_score(known: Known, search: Search) -> Score:
    table, result, sides = search.table, search.result, search.table.sides
    groups, share = sides.synthetic_groups(), float(result.suspects.mean())
    return score(METRIC_OF[table.space], " + ".join(table.channels), share, intervals.share_interval(share, groups), result.floor, len(groups),
                 f"{_search_protocol(known, table)}; threshold {result.threshold:.4f}; "
                 f"{intervals.describe(groups, _unit(sides), 'Wilson interval')}; seed {sides.seed}")  # fmt: skip


def _search_protocol(known: Known, table: Table) -> str:
    sides = table.sides
    whitened = ", whitened by the training slices" if table.space == FEATURES else ""
    doubts = [f"{known.same_person} training patients share an identical slice with another and count as the same person"] if known.same_person else []
    doubts += [f"{known.leaked} held-out slices are identical to training slices and were left out"] if known.leaked else []
    patients = len(np.unique(sides.patients(known.held_out)))
    return "; ".join([
        f"distance in {table.words}{whitened}, of the image or its mirror image: to the nearest of {len(known.train)} training slices, over the nearest of another training patient",
        f"the threshold is the 1st percentile of {len(known.held_out)} held-out slices of {patients} {' and '.join(sorted(set(sides.store.rows['split'].to_numpy()[known.held_out])))} patients; "
        "floor: their own share, each patient judged by the others",
        *doubts,
    ])  # fmt: skip


def _closeness_scores(search: Search) -> list[Score]:
    """Are synthetic images nearer to the training slices than unseen patients are, as a whole?"""
    table, result, sides = search.table, search.result, search.table.sides
    groups, channels = sides.synthetic_groups(), " + ".join(table.channels)
    distances = np.concatenate([result.synthetic.distance, result.held_out.distance])
    is_synthetic = np.arange(len(distances)) < len(groups)
    everyone = np.concatenate([groups.astype(str), result.held_out_patients.astype(str)])
    closer = classification.estimate(lambda weights: binary_area(-distances, is_synthetic, weights), everyone, sides.seed)
    assert closer.value is not None, "both sides have images"
    where = f"nearest training slice in {table.words}{', whitened by the training slices' if table.space == FEATURES else ''}; beside {len(result.held_out_patients)} held-out slices"
    authentic = float(result.authentic.mean())
    return [
        score("closer_to_train", channels, closer.value, closer.interval, 0.5, len(groups),
              f"{where}; {intervals.describe(everyone, 'group')} (held-out patients, and synthetic images or patients of their conditions); seed {sides.seed}"),
        score("authentic", channels, authentic, intervals.share_interval(authentic, groups), float(result.held_out_authentic.mean()), len(groups),
              f"{where}; {intervals.describe(groups, _unit(sides), 'Wilson interval')}; seed {sides.seed}"),
    ]  # fmt: skip


def _unit(sides: Sides) -> str:
    return "patient" if sides.partners is not None else "image"


# --- membership -------------------------------------------------------------------------------------------------------


Attacks = dict[str, tuple[str, list[Inferred]]]  # what the attacker holds -> the protocol, and the result by slice and by patient


def _membership(origin: Origin | None, sides: Sides, known: Known, table: Table, bench: Bench) -> tuple[Attacks, dict[str, str]]:
    """Training slices against as many held-out ones of the same classes and positions, and why an attack was left out."""
    if not _can_be_attacked(sides, known):
        besides = " that no image was conditioned on" if sides.partners is not None else ""
        return {}, {"membership": f"needs {intervals.FEWEST_GROUPS} training and {intervals.FEWEST_GROUPS} held-out patients{besides} with slices of the same class and position"}
    members, others = _attacked(sides, known, MOST_HELD_OUT, "membership")
    found: Attacks = {"images": _attack_by_images(sides, known, table, members, others)}
    if origin is None:
        return found, {"membership from the model": "there is no run, and no model to ask"}
    source = origin.plan.stage(origin.plan.stage(sides.dataset.name).settings["from"])
    if not spec.family_config(source.settings["config"]).attackable:
        return found, {"membership from the model": f"the model of {source.name} does not say how likely an image is a training image"}
    try:
        found["model"] = _attack_by_model(sides, known, maker(origin.run, source.name, sides.dataset), bench)
    except MedgenError as error:
        return found, {"membership from the model": str(error)}
    return found, {}


def _can_be_attacked(sides: Sides, known: Known) -> bool:
    members, others = _attacked(sides, known, MOST_HELD_OUT, "membership")
    return membership.has_enough_patients(sides.patients(known.train[members]), sides.patients(known.held_out[others]))


def _attacked(sides: Sides, known: Known, most: int, stream: str) -> tuple[np.ndarray, np.ndarray]:
    """Places among `known.train` and `known.held_out`. Nobody whose mask an image was made from: it resembles him for that reason."""
    rows = sides.store.rows
    given = np.array([]) if sides.partners is None else sides.patients(sides.partners)
    free = [np.flatnonzero(~np.isin(sides.patients(side), given)) for side in (known.train, known.held_out)]
    slices, labels = rows["slice"].to_numpy(), rows["label"].to_numpy().astype(str)
    of_train, of_held_out = known.train[free[0]], known.held_out[free[1]]
    members, others = membership.matched((slices[of_train], slices[of_held_out]), (labels[of_train], labels[of_held_out]), most, sides.seed, stream)
    return free[0][members], free[1][others]


def _attack_by_images(sides: Sides, known: Known, table: Table, members: np.ndarray, others: np.ndarray) -> tuple[str, list[Inferred]]:
    items, reference, synthetic = np.concatenate([table.train[members], table.held_out.plain[others]]), table.held_out.plain, table.synthetic.plain
    if table.space == FEATURES:
        whitening = Whitening.fitted(np.concatenate([items, synthetic]))  # not by the training slices alone: they would lie otherwise in it
        items, reference, synthetic = whitening(items), whitening(reference), whitening(synthetic)
    of_members = membership.folds(sides.patients(known.train[members]), sides.seed, "membership_members")
    of_reference = membership.folds(sides.patients(known.held_out), sides.seed, "membership_reference")
    scores = membership.image_scores(items, np.concatenate([of_members, of_reference[others]]), synthetic, reference, of_reference)
    words = (f"attack with {len(synthetic)} synthetic images alone: distance to the nearest one in {table.words}, beside the nearest of "
             f"{len(reference)} held-out slices of other patients")  # fmt: skip
    return words, _inferred(sides, known, members, others, scores)


def _attack_by_model(sides: Sides, known: Known, made_by: Checkpoint, bench: Bench) -> tuple[str, list[Inferred]]:
    members, others = _attacked(sides, known, MOST_WITH_MODEL, "membership_model")
    scores = _scores_of_model(made_by, sides, np.concatenate([known.train[members], known.held_out[others]]), bench)
    return f"attack with the model ({made_by.folder.name}): what it says itself", _inferred(sides, known, members, others, scores)


def _inferred(sides: Sides, known: Known, members: np.ndarray, others: np.ndarray, scores: np.ndarray) -> list[Inferred]:
    patients = sides.patients(np.concatenate([known.train[members], known.held_out[others]]))
    is_member = np.arange(len(scores)) < len(members)
    return [measure(scores, is_member, patients, sides.seed) for measure in (membership.by_slice, membership.by_patient)]


def _scores_of_model(made_by: Checkpoint, sides: Sides, rows: np.ndarray, bench: Bench) -> np.ndarray:
    """float64 [n] of real slices by store row."""
    state = made_by.state()
    config = spec.family_config(state["config"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vocabulary = state["vocabulary"] if config.uses_captions else {}  # checkpoints of earlier versions have none
    shape = DataShape(config.input_channels, state["size"], tuple(state["classes"]), sides.store.regions, vocabulary=vocabulary)
    model = trained_model(made_by, state["config"]["model"], config, shape, device)
    parts = []
    for start in range(0, len(rows), MODEL_BATCH):
        bench.progress(start, len(rows), "slices attacked")
        parts.append(_scores_of_block(model, config, sides, rows[start : start + MODEL_BATCH], device))
    return np.concatenate(parts)


def _scores_of_block(model: Model, config: FamilyConfig, sides: Sides, rows: np.ndarray, device: torch.device) -> np.ndarray:
    assert isinstance(sides.store, SliceStore)  # a run's real images are its slice store
    given = load_given(config, sides.store, rows, device)
    batch = Batch(given.channels, rows.tolist(), sides.seed, "membership", given.labels, given.sizes, given.captions)
    return model.attack_scores(batch).double().cpu().numpy()


def _membership_scores(sides: Sides, attack: str, words: str, results: list[Inferred], reasons: dict[str, str]) -> list[Score]:
    """By patient; the rate by slice where there are too few patients for it."""
    slices, patients = results
    channel = f"{' + '.join(sides.dataset.outputs)}, from the {attack}"
    rated = patients if patients.true_positive_rate is not None else slices
    found = [_membership_score(sides, "membership_auc", channel, words, patients, patients.auc, 0.5)]
    if rated.true_positive_rate is None:
        reasons[f"membership_tpr from the {attack}"] = f"{slices.others} held-out slices cannot show 1% false positives; at least {membership.FEWEST_OTHERS} are needed"
        return found
    return [*found, _membership_score(sides, "membership_tpr", channel, words, rated, rated.true_positive_rate, membership.FALSE_POSITIVE_RATE)]


def _membership_score(sides: Sides, metric: str, channel: str, words: str, result: Inferred, value: classification.Estimate, floor: float) -> Score:
    assert value.value is not None, "both sides have slices"
    unit = "per patient, by the mean over the slices" if result.unit == "patient" else "per slice"
    protocol = (f"{words}; {result.members} training against {result.others} held-out {result.unit}s, equally many slices of each class and tenth of the "
                f"head; {unit}; 95% bootstrap over patients; seed {sides.seed}")  # fmt: skip
    return score(metric, channel, value.value, value.interval, floor, result.members + result.others, protocol)


# --- what is guaranteed, and the words --------------------------------------------------------------------------------


def _guarantee(origin: Origin, sides: Sides) -> dict[str, Any] | None:
    """Of the privacy card of a train stage that was trained with differential privacy; None for any other."""
    outcome = origin.run.read_outcome(origin.plan.stage(sides.dataset.name).settings["from"], 0)
    if outcome is None or "privacy" not in outcome.facts or outcome.facts["privacy"]["epsilon_prv"] is None:
        return None
    card = outcome.facts["privacy"]
    return {"epsilon": card["epsilon_prv"], "delta": card["delta"], "unit": card["unit"], "auc_at_most": card["attack_at_most"]["auc"]}


def in_words(record: dict[str, Any]) -> list[str]:
    """Sentences for people, of `privacy` in metrics.json: what was looked for and found, never that nothing could be."""
    return [*map(_search_in_words, record["searches"]), *(_attack_in_words(item) for item in record["membership"] if item["unit"] == "patient"),
            _guarantee_in_words(record["guarantee"], record["membership"])]  # fmt: skip


def _search_in_words(search: dict[str, Any]) -> str:
    where = f"at threshold {search['threshold']:.3f} ({search['space']})"
    among = f"{search['images']:,} images" if search["images"] == search["of_images"] else f"{search['images']:,} of {search['of_images']:,} images"
    if search["suspects"] == 0:
        return f"No copies found {where} among {among}."
    expected = search["floor"] * search["images"]
    suspected = "1 suspected copy" if search["suspects"] == 1 else f"{search['suspects']:,} suspected copies"
    return f"{suspected} {where} among {among}; held-out patients would give about {expected:.0f}: look at the nearest pairs."


def _attack_in_words(item: dict[str, Any]) -> str:
    auc = item["auc"]
    interval = "" if auc["interval"] is None else f" ({auc['interval'][0]:.2f} to {auc['interval'][1]:.2f})"
    return f"Membership inference from the {item['attack']}: AUC {auc['value']:.2f}{interval} per patient, where 0.5 is guessing."


def _guarantee_in_words(guarantee: dict[str, Any] | None, attacks: list[dict[str, Any]]) -> str:
    if guarantee is None:
        return "No DP guarantee."
    unit, most = guarantee["unit"], guarantee["auc_at_most"]
    told = f"Trained with differential privacy: epsilon {guarantee['epsilon']:.4g} at delta {guarantee['delta']:g} per {unit}; no attack may reach an AUC above {most:.4f}."
    broken = [item for item in attacks if item["unit"] == unit and item["auc"]["interval"] is not None and item["auc"]["interval"][0] > most]
    if not broken:
        return told
    reached = max(item["auc"]["interval"][0] for item in broken)
    return f"{told} One does, with {reached:.2f} at the least: this guarantee does not hold. Do not give the model or its images away, and look for the mistake in its training."
