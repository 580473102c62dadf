"""Directives in the words of a spec and of a site profile, for scripts that shall move to another cluster. Used by verb.py.

A directive is translated only where the two say exactly the same; every other stays as it is."""

from __future__ import annotations

import datetime
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from medgen.launch.importing.directives import Directive
from medgen.launch.importing.reading import Draft
from medgen.sbatch_options import minutes

FEATURE = re.compile(r"[\w.-]+")
AMOUNT = re.compile(r"(\d+)([MGT]?)B?", re.IGNORECASE)
SITE_OPTIONS = ("account", "qos", "reservation", "exclude", "mail-user")
EXCLUDED_DAYS = 90


@dataclass(frozen=True)
class Portable:
    """A draft whose directives are only those that have no other word, and the words of the others."""

    draft: Draft
    resources: dict[str, Any]


def duration(whole_minutes: int) -> str:
    """`1d12h`, `90m`."""
    days, rest = divmod(whole_minutes, 1440)
    hours, left = divmod(rest, 60)
    return "".join(f"{number}{unit}" for number, unit in ((days, "d"), (hours, "h"), (left, "m")) if number)


def word_for_word(draft: Draft) -> Portable:
    """Every directive as it is; a script that has none asks for one core, as Slurm gives it, and for medgen's hour."""
    return Portable(draft, {}) if draft.directives else Portable(_told_about_time(draft), {"cpus": 1})


def _told_about_time(draft: Draft) -> Draft:
    if draft.directive("time") is not None:
        return draft
    return draft.hint(None, "it gives no time limit; write time: below resources: if one hour is too short")


def to_portable(draft: Draft) -> Portable:
    """Time, memory, nodes, cores and GPUs as keys of `resources`."""
    resources: dict[str, Any] = {}
    said = {directive.setting: directive for directive in draft.directives}
    translated: list[Directive] = []

    def take(option: str, key: str, value: Any) -> None:
        resources[key] = value
        translated.append(said[option])

    nodes = _number(said.get("nodes")) or (1 if "nodes" not in said else None)
    tasks = _number(said.get("ntasks-per-node")) or (_number(said.get("ntasks")) if nodes == 1 else None)
    one_task = not {"ntasks", "ntasks-per-node"} & set(said) or (tasks == 1 and len({"ntasks", "ntasks-per-node"} & set(said)) == 1)
    if "nodes" in said and nodes and (nodes > 1 or one_task):  # that several tasks stay on one node is only said by --nodes=1
        take("nodes", "nodes", nodes)
    _take_gpus(said, nodes, take)
    if one_task and (cpus := _number(said.get("cpus-per-task"))):
        take("cpus-per-task", "cpus", cpus)
        translated += [said[option] for option in ("ntasks", "ntasks-per-node") if option in said]
    elif one_task and "cpus-per-gpu" not in said:
        resources["cpus"] = 1  # as Slurm gives it
    if "mem" in said and (amount := AMOUNT.fullmatch(said["mem"].value or "")) and int(amount.group(1)):
        take("mem", "mem", f"{amount.group(1)}{amount.group(2).upper() or 'M'}")
    if "time" in said and (limit := minutes(said["time"].value or "")):
        take("time", "time", duration(limit))
    draft = _told_about_time(draft)
    gpu = _gpu(said, draft.prefer, bool(resources.get("gpus") or resources.get("gpus_per_node")), translated)
    if gpu:
        resources["gpu"] = gpu
    words = ", ".join(str(key) for key in resources)
    for directive in translated:
        draft = draft.move_directive(directive, "resources")
    return Portable(draft.understood(f"{len(translated)} of them portable ({words})") if translated else draft, resources)


def _number(directive: Directive | None) -> int | None:
    value = directive.value if directive is not None else None
    return int(value) if value is not None and value.isdecimal() and int(value) else None


def _take_gpus(said: dict[str, Directive], nodes: int | None, take: Any) -> None:
    """Only where one directive counts GPUs, all of any kind."""
    given = [option for option in ("gres", "gpus", "gpus-per-node") if option in said]
    if len(given) != 1 or nodes is None or {"gpus-per-task", "gpus-per-socket"} & set(said):
        return
    option = given[0]
    value = said[option].value or ""
    match = re.fullmatch(r"gpu(?::(\d+))?" if option == "gres" else r"(\d+)", value)
    if match is not None and (nodes == 1 or option != "gpus"):
        take(option, "gpus" if nodes == 1 else "gpus_per_node", int(match.group(1) or 1))


def _gpu(said: dict[str, Directive], prefer: str | None, has_gpus: bool, translated: list[Directive]) -> dict[str, Any]:
    """`any_of` from `--constraint=a100|h100`, `prefer` from `--prefer=h100`; features of nodes without GPUs stay."""
    if not has_gpus:
        return {}
    gpu: dict[str, Any] = {}
    if "constraint" in said and all(FEATURE.fullmatch(part) for part in (said["constraint"].value or "").split("|")):
        gpu["any_of"] = (said["constraint"].value or "").split("|")
        translated.append(said["constraint"])
    wanted = said["prefer"].value if "prefer" in said else prefer
    if wanted and FEATURE.fullmatch(wanted) and ("constraint" not in said or wanted in gpu.get("any_of", [])):
        gpu["prefer"] = wanted
        translated += [said["prefer"]] if "prefer" in said else []
    return gpu


def site_of(parts: Sequence[Portable]) -> tuple[dict[str, Any], list[Portable]]:
    """A profile with what most of the scripts say of their cluster, and the parts without it; what differs stays in the spec."""
    common = {option: value for option in SITE_OPTIONS if (value := _said_by_most(parts, option)) is not None}
    with_gpus = [part for part in parts if _has_gpus(part)]
    without = [part for part in parts if not _has_gpus(part)]
    partitions = {"gpu": _said_by_most(with_gpus, "partition"), "cpu": _said_by_most(without, "partition")}
    site: dict[str, Any] = {"name": "imported", "scheduler": "slurm"}
    site |= {"cpus": max((part.resources.get("cpus", 1) for part in parts), default=1)}
    site |= {"gpus": max((part.resources.get("gpus", 0) or part.resources.get("gpus_per_node", 0) for part in parts), default=0)}
    site |= {"partitions": {key: value for key, value in partitions.items() if value is not None}}
    site |= {option: common[option] for option in ("account", "qos", "reservation") if option in common}
    if "exclude" in common:
        until = datetime.date.today() + datetime.timedelta(days=EXCLUDED_DAYS)
        site["exclude"] = [{"nodes": common["exclude"], "reason": "imported scripts keep away from it and do not say why", "until": until}]
    if "mail-user" in common:
        site["notify"] = {"mail": common["mail-user"]}
    return site, [_without_site(part, common, partitions) for part in parts]


def _said_by_most(parts: Sequence[Portable], option: str) -> str | None:
    """The value that more than half of them give."""
    values = Counter(directive.value for part in parts if (directive := part.draft.directive(option)) is not None)
    return next((value for value, count in values.items() if value is not None and 2 * count > len(parts)), None)


def _has_gpus(part: Portable) -> bool:
    return bool(part.resources.get("gpus") or part.resources.get("gpus_per_node"))


def _counts_gpus(draft: Draft) -> bool:
    return any(draft.directive(option) is not None for option in ("gres", "gpus", "gpus-per-node", "gpus-per-task", "gpus-per-socket"))


def _without_site(part: Portable, common: dict[str, str], partitions: dict[str, str | None]) -> Portable:
    draft = part.draft
    wanted = {**common, "partition": partitions["gpu" if _has_gpus(part) else "cpu"]}
    if _counts_gpus(draft):
        del wanted["partition"]  # GPUs in Slurm's words do not tell medgen which of the two it is
    for option, value in wanted.items():
        directive = draft.directive(option)
        if directive is not None and directive.value == value:
            draft = draft.move_directive(directive, "the site profile")
        elif directive is None and value is not None:
            draft = draft.hint(None, f"the site profile says {option} {value}; this script says nothing of it")
    if "mail-user" in common and draft.directive("mail-user") is None:
        for mails in [item for item in draft.directives if item.option == "mail-type"]:
            draft = draft.move_directive(mails, "the site profile: medgen writes at the end of a run, and when a task fails")
    return replace(part, draft=draft)
