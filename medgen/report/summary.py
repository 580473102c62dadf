"""The three answers at the top of a page: is it good, is it a copy, is it useful. Sentences made from metrics.json alone. Used by build.py, folder_page.py and card.py.

A score is called worse than its floor only if its interval says so; what was not computed is named with the reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from medgen.evaluate import privacy, scores
from medgen.evaluate.scores import Score
from medgen.report import topics, words

HEADLINES = ("kid", "fid", "fd", "cmmd", "swd", "psd")  # the first that was measured stands for the set
PAIRED_HEADLINES = ("ms_ssim", "ssim", "mae", "dice")
DISTANCES = (*HEADLINES, "fd_small_n", "region_distance")  # nearer to 0 is never worse, also where a score is read beside its floor
MOST_NAMED = 4  # scores in one sentence

Standing = Literal["better", "at", "worse", "apart", "unknown"]


@dataclass(frozen=True)
class Measurement:
    """One stage that measures a set; `record` is its metrics.json, None with the reason in `missing`. `causes` of a failure may name patients' files."""

    stage: str
    kind: str
    record: dict[str, Any] | None
    missing: str = ""
    causes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ImageSet:
    """A set of synthetic images and what measured it. `add`: what to do where nothing did, by kind of stage."""

    name: str
    measurements: Sequence[Measurement]
    add: dict[str, str]


@dataclass(frozen=True)
class Line:
    """`about`: the set or the stage, empty where there is one only."""

    about: str
    text: str


@dataclass(frozen=True)
class Answer:
    question: str
    lines: list[Line]


# how to have measured in a run what was not
IN_A_JOB = {"evaluate": "add a stage of kind evaluate", "utility": "add a stage of kind utility, of images that were drawn on no mask of the val or test split"}


def answers(sets: Sequence[ImageSet]) -> list[Answer]:
    """Of a whole page, in the order in which people ask."""
    found = []
    for question, told in QUESTIONS:
        names_of: dict[str, list[str]] = {}
        for item in sets:
            names_of.setdefault(" ".join(told(item)), []).append(item.name)
        lines = [Line(", ".join(names) if len(sets) > 1 else "", text) for text, names in names_of.items()]
        found.append(Answer(question, lines or [Line("", "Not measured: no set of images was drawn.")]))
    return found


def is_it_good(images: ImageSet) -> list[str]:
    """Sentences on how far the images are from real ones."""
    return _of_evaluations(images, _fidelity)


def is_it_a_copy(images: ImageSet) -> list[str]:
    """Sentences on copies, membership and guarantees, in the words of privacy.py."""
    return _of_evaluations(images, _copies)


def is_it_useful(images: ImageSet) -> list[str]:
    """Sentences on what networks trained with the images reach, and on whether the images show what their masks say."""
    measured = [item for item in images.measurements if item.kind in ("utility", "structure")]
    told = [sentence for item in measured for sentence in _missing_or(item, _utility if item.kind == "utility" else _structure)]
    return told if any(item.kind == "utility" for item in measured) else [f"Not measured: {images.add['utility']}.", *told]


QUESTIONS = (("Is it good?", is_it_good), ("Is it a copy?", is_it_a_copy), ("Is it useful?", is_it_useful))


def _of_evaluations(images: ImageSet, sentences: Any) -> list[str]:
    measured = [item for item in images.measurements if item.kind == "evaluate"]
    if not measured:
        return [f"Not measured: {images.add['evaluate']}."]
    if len(measured) == 1:
        return _missing_or(measured[0], sentences)
    return [f"{item.stage}: {' '.join(_missing_or(item, sentences))}" for item in measured]


def _missing_or(item: Measurement, sentences: Any) -> list[str]:
    if item.record is None:
        return [_sentence(": ".join(["Not measured", item.missing, *(["; ".join(item.causes)] if item.causes else [])]))]
    found: list[str] = sentences(item.record)
    return found


# --- is it good? ------------------------------------------------------------------------------------------------------


def standing(score: Score) -> Standing:
    """How the interval of a score lies to its floor; unknown without one of them, apart where neither side is the better one."""
    if score.floor is None or score.ci is None:
        return "unknown"
    low, high = score.ci
    if low <= score.floor <= high:
        return "at"
    above = low > score.floor
    if score.better == "closer to floor" and score.metric not in DISTANCES:
        return "apart"
    if score.metric in DISTANCES and not above:
        return "at"  # as near as real sets are to each other; nearer is no merit
    return "better" if above == (score.better == "higher") else "worse"


def _fidelity(record: dict[str, Any]) -> list[str]:
    found = [item for item in topics.in_order(scores.from_json(record["scores"])) if topics.topic_of(item.metric).name in topics.FIDELITY]
    headline = _headline(found)
    if not headline:
        reasons = words.grouped_by_reason({name: why for name, why in record["skipped"].items() if topics.topic_of(name).name in (*topics.FIDELITY, "other")})
        why_not = "; ".join(f"{names}: {why}" for names, why in reasons)
        told = _region_sentences(record)
        return [*told, f"{'As a set not' if told else 'Not'} measured{f' ({why_not})' if why_not else ''}; kid or swd among the metrics would say it."]
    others = [item for item in found if item.is_headline and item.metric != headline[0].metric]
    told = [_headline_sentence(headline), *_class_sentence(found, headline[0].metric), *_others_sentence(others), *_region_sentences(record)]
    missing = [name for name in ("kid", "swd") if name in record["skipped"]]
    told += [f"{name} was not computed for {'all' if name == headline[0].metric else 'any'}: {record['skipped'][name]}." for name in missing]
    warning = words.few_patients(record["counts"])
    return [*told, *([warning] if warning else [])]


def _headline(found: list[Score]) -> list[Score]:
    """The scores, one per channel, of the first metric that says something of the whole set."""
    for metric in (*HEADLINES, *PAIRED_HEADLINES):
        of_metric = [item for item in found if item.metric == metric and item.is_headline]
        if of_metric:
            return of_metric
    return [item for item in found if item.is_headline][:1]


def _headline_sentence(headline: list[Score]) -> str:
    title = topics.meaning_of(headline[0]).title
    several = len(headline) > 1
    return f"{title}: {'; '.join(_in_words(item, several) for item in headline[:MOST_NAMED])}."


def _in_words(item: Score, with_channel: bool) -> str:
    channel = f"{item.channel} " if with_channel else ""
    if item.floor is None:
        return f"{channel}{words.number(item.value)} ({_interval_words(item)}, n = {item.n:,}), without a floor to read it by"
    verdict = {"at": "at its floor", "better": "better than its floor", "worse": _worse(item), "apart": "apart from its floor", "unknown": words.against_floor(item)}[standing(item)]
    return f"{channel}{words.number(item.value)} ({_interval_words(item)}, n = {item.n:,}) beside a floor of {words.number(item.floor)}: {verdict}"


def _worse(item: Score) -> str:
    """How many times the floor, where that is a number and says something."""
    if item.metric not in DISTANCES or item.floor is None or item.floor <= 0:
        return "worse than its floor"
    return f"{item.value / item.floor:.1f} times its floor, outside the interval"


def _interval_words(item: Score) -> str:
    shown = words.interval(item)
    return "no interval" if shown is None else f"95% interval {shown}"


def _class_sentence(found: list[Score], metric: str) -> list[str]:
    of_classes = [item for item in found if item.metric == metric and item.group is not None and item.comparison in (None, "real-synthetic") and item.floor is not None]
    if len({item.group for item in of_classes}) < 2:
        return []
    worst = max(of_classes, key=lambda item: abs(item.value - (item.floor or 0.0)))
    return [f"Furthest from its floor is {worst.group}: {_in_words(worst, False)}."]


def _others_sentence(others: list[Score]) -> list[str]:
    """The remaining scores by how they stand; those without an interval are counted, not judged."""
    told = []
    headings = {"worse": "Worse than their floors", "apart": "Apart from their floors", "better": "Better than their floors", "at": "At their floors"}
    for name, heading in headings.items():
        of_standing = [item for item in others if standing(item) == name]
        if of_standing:
            told.append(f"{heading}: {_named(of_standing, with_numbers=name in ('worse', 'apart'))}.")
    unknown = [item for item in others if standing(item) == "unknown"]
    return [*told, f"Without an interval, so not to be told from chance: {_named(unknown, with_numbers=True)}."] if unknown else told


def _region_sentences(record: dict[str, Any]) -> list[str]:
    """How much the values in regions vary beside real ones, what is shown to differ first."""
    told = [item for item in record["details"].get("regions", []) if item["ratio"] is not None]
    if not told:
        return []
    told.sort(key=lambda item: item["verdict"] not in ("narrow", "wide"))
    more = f" and {len(told) - MOST_NAMED} more" if len(told) > MOST_NAMED else ""
    return [f"Spread between images of the value in a region, as a share of the real one: {', '.join(_ratio_words(item) for item in told[:MOST_NAMED])}{more}."]


def _ratio_words(item: dict[str, Any]) -> str:
    name = " ".join(part for part in (item["group"], item["region"]) if part)
    interval = "no interval" if item["ratio_interval"] is None else f"{item['ratio_interval'][0]:.2f} to {item['ratio_interval'][1]:.2f}"
    shown = f", too {item['verdict']}" if item["verdict"] in ("narrow", "wide") else ""
    return f"{name} {item['ratio']:.2f} ({interval}{shown})"


def _named(found: list[Score], with_numbers: bool) -> str:
    several = {item.metric for item in found if sum(other.metric == item.metric for other in found) > 1}
    told = []
    for item in found:
        title = words.lower_first(topics.meaning_of(item).title) + (f" of {item.channel}" if item.metric in several else "")
        floor = "" if item.floor is None else f", floor {words.number(item.floor)}"
        told.append(f"{title} ({words.number(item.value)}{floor})" if with_numbers else title)
    return ", ".join(told[:MOST_NAMED]) + (f" and {len(told) - MOST_NAMED} more" if len(told) > MOST_NAMED else "")


# --- is it a copy? ----------------------------------------------------------------------------------------------------


def _copies(record: dict[str, Any]) -> list[str]:
    if "privacy" not in record:
        return ["Told in the table of scores alone: an earlier version of medgen has evaluated this set.", "No DP guarantee."]
    found, skipped = scores.from_json(record["scores"]), record["skipped"]
    told = privacy.in_words(record["privacy"])
    rates = [f"{_attack(item)}{_percent(item.value)} ({_percents(item.ci)})" for item in found if item.metric == "membership_tpr"]
    rate = [f"Members that it finds at 1% false alarms: {'; '.join(rates)}."] if rates else []
    not_searched = [] if record["privacy"]["searches"] else [f"Copies were not counted: {skipped.get('near_train', 'no reason is written down')}."]
    not_attacked = [] if record["privacy"]["membership"] else [f"Membership inference was not tried: {skipped.get('membership', 'no reason is written down')}."]
    return [*not_searched, *told[:-1], *rate, *not_attacked, told[-1]]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _percents(interval: tuple[float, float] | None) -> str:
    return "no interval" if interval is None else f"{_percent(interval[0])} to {_percent(interval[1])}"


def _attack(item: Score) -> str:
    """What the attack has in its hands, where the channel says it."""
    return f"{item.channel.rpartition(', ')[2]} " if ", from the " in item.channel else ""


# --- is it useful? ----------------------------------------------------------------------------------------------------


def _utility(record: dict[str, Any]) -> list[str]:
    found = scores.from_json(record["scores"])
    if not found:
        return [f"Not measured: {'; '.join(f'{names}: {why}' for names, why in words.grouped_by_reason(record['skipped'])) or 'the stage gave no score'}."]
    first = found[0]
    of_metric = [item for item in found if item.metric == first.metric]
    values = _by_arm([item for item in of_metric if item.channel == first.channel])
    of_regions = [f"{channel.partition(': ')[2]}: {_by_arm([item for item in of_metric if item.channel == channel])}." for channel in dict.fromkeys(item.channel for item in of_metric) if channel != first.channel]
    gains = _gains(record, first.metric)
    return [f"{topics.meaning_of(first).title} on real test images ({first.n:,}), by what was trained on: {values}.", *of_regions, *([gains] if gains else [])]


def _by_arm(found: list[Score]) -> str:
    return ", ".join(f"{item.group} {words.number(item.value)}" for item in found)


def _gains(record: dict[str, Any], metric: str) -> str:
    """What each arm with synthetic images gains over real ones alone, in the stage's own words."""
    told = [item for item in record["details"].get("comparisons", [])
            if (item["metric"], item["to"]) == (metric, "real") and "region" not in item and item["arm"].split()[0] in ("synthetic", "mixed")]  # fmt: skip
    return "; ".join(f"{item['arm']}: {item['words']}" for item in told) + "." if told else ""


def _structure(record: dict[str, Any]) -> list[str]:
    told = [record["details"]["words"], *record["details"].get("warnings", [])] if "words" in record["details"] else []
    if not told:
        told = [f"{topics.meaning_of(item).title} {words.number(item.value)}" for item in scores.from_json(record["scores"]) if item.is_headline][:MOST_NAMED]
    return [_sentence(f"Masks: {'; '.join(told)}")] if told else ["Not measured: the structure stage gave no score."]


def _sentence(text: str) -> str:
    return text if text.endswith(".") else text + "."


def missing_stage(stage: str, status: str) -> str:
    """Why a stage has no metrics.json, in words."""
    why = {"not run": "has not run", "done": "is done, but its metrics.json cannot be read", "unfinished": "is not finished"}
    return f"{stage} {why.get(status, status)}"


def without_causes(images: ImageSet) -> ImageSet:
    """For what is given away."""
    return replace(images, measurements=[replace(item, causes=()) for item in images.measurements])
