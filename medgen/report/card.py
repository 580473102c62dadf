"""A dataset card in Markdown, made from numbers alone: what whoever gets the images must know. Used by build.py and folder_page.py.

Its headings are the seven criteria of the scorecard for synthetic medical data (Zamzmi et al., Commun Eng 2025, doi:10.1038/s44172-025-00450-1);
what only people can say stands as a blank. The head is what dataset hubs read (YAML front matter)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from medgen import __version__
from medgen.evaluate import scores
from medgen.evaluate.scores import Score
from medgen.report import summary, topics, words
from medgen.report.summary import ImageSet

Fact = tuple[str, str]
BLANK = "________ (to be filled in)"
UNKNOWN = "not known"
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"), (10_000_000, "1M<n<10M"))


@dataclass(frozen=True)
class Subject:
    """What a card is about. `contents`, `made`, `source`: label and value, as tables; `limits`: sentences."""

    title: str
    lead: str
    count: int
    contents: Sequence[Fact]
    made: Sequence[Fact]
    source: Sequence[Fact]
    limits: Sequence[str]
    images: ImageSet


def dataset_card(subject: Subject) -> str:
    """The whole card."""
    found = [(item.stage, score) for item in subject.images.measurements if item.record is not None for score in scores.from_json(item.record["scores"])]
    protocols = list(dict.fromkeys(score.protocol for _, score in found))

    def table(*names: str, by_group: bool = False) -> list[str]:
        wanted = [(stage, item) for stage, item in found if topics.topic_of(item.metric).name in names and (not item.is_headline) == by_group]
        return _score_table([(stage, item) for stage, item in wanted if item.comparison in (None, "real-synthetic")], protocols)

    arms = table("utility") + table("utility", by_group=True)
    parts = [
        _front_matter(subject), f"# {subject.title}", subject.lead,
        "## In short", *(f"**{question}** {' '.join(told(subject.images))}" for question, told in summary.QUESTIONS),
        "## Completeness: what is in it", *_facts(subject.contents),
        "## Comprehension: how it was made", *_facts(subject.made), "### From which data", *_facts(subject.source),
        "## Congruence: are the images like real ones?", *(table("distribution", "texture", "regions", "pairs") or ["Not measured."]),
        "## Coverage: are they as varied?", *(table("diversity") or ["Not measured."]),
        "## Constraint: do they show what they should?", *(table("structure", "classes") or ["Not measured: whether an image shows what its mask or class says."]),
        "## Consistency: does that hold for every group?", *(table(*topics.FIDELITY, "structure", by_group=True) or ["Not measured by class or by any other group."]),
        "## Compliance: does it repeat training images?", *(table("copies") or ["Not measured."]), " ".join(summary.is_it_a_copy(subject.images)),
        *_facts([("licence", BLANK), ("approval of the ethics committee and of the data's owner", BLANK), ("contact", BLANK)]),
        "## Usefulness", *(arms or [" ".join(summary.is_it_useful(subject.images))]),
        "## Limits", _bullets([*subject.limits, *_limits(subject)]),
        "## Intended use", f"Research with synthetic images; not for diagnosis. Anything else: {BLANK}",
        *(["## Protocols", "\n".join(f"{number}. {text}" for number, text in enumerate(protocols, 1))] if protocols else []),
        f"Made by medgen {__version__} from the numbers of the evaluation.",
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _front_matter(subject: Subject) -> str:
    head = {
        "pretty_name": subject.title, "tags": ["synthetic", "medical", "medgen"], "annotations_creators": ["machine-generated"],
        "size_categories": [next((name for most, name in SIZES if subject.count < most), "n>10M")],
    }  # fmt: skip
    return f"---\nlicense:  # to be filled in\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---"


def _facts(facts: Sequence[Fact]) -> list[str]:
    return [_table(("", ""), facts)] if facts else [UNKNOWN.capitalize() + "."]


def _score_table(found: Sequence[tuple[str, Score]], protocols: list[str]) -> list[str]:
    """A Markdown table per stage; the protocol as a number of the list at the end."""
    tables = []
    head = ("metric", "channel", "group", "value", "real with real (floor)", "95% interval", "n", "protocol")
    for stage in dict.fromkeys(stage for stage, _ in found):
        of_stage = topics.in_order([item for name, item in found if name == stage])
        rows = [
            (topics.meaning_of(item).title + (f" ({item.unit})" if item.unit else ""), item.channel, item.group or "all", words.number(item.value),
             "-" if item.floor is None else words.number(item.floor), words.interval(item) or "none", f"{item.n:,}", str(protocols.index(item.protocol) + 1))
            for item in of_stage
        ]  # fmt: skip
        tables += [f"Stage `{stage}`:", _table(head, rows)]
    return tables


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _limits(subject: Subject) -> list[str]:
    """What the numbers themselves say against relying on them."""
    told = []
    kinds = {item.kind for item in subject.images.measurements if item.record is not None}
    for item in subject.images.measurements:
        told += [] if item.record is None else [f"{item.stage}: {text}" for text in _limits_of(item.record)]
    if "evaluate" not in kinds:
        told.append("Not measured: how far the images are from real ones, and whether they repeat any.")
    if "utility" not in kinds:
        told.append("Not measured: usefulness for training a network.")
    return told


def _limits_of(record: dict[str, Any]) -> list[str]:
    told = []
    counts, warning = record["counts"], words.few_patients(record["counts"])
    if warning is not None:
        told.append(warning)
    if "synthetic_used" in counts and counts["synthetic_used"] < counts["synthetic"]:
        told.append(f"The scores are of {counts['synthetic_used']:,} of the {counts['synthetic']:,} images.")
    return told + [f"Not computed: {names} ({reason})." for names, reason in words.grouped_by_reason(record["skipped"])]


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {' '.join(line.split())}" for line in lines)
