"""Makes a plan fit a machine or a cluster: fewer GPUs, other shards, never other science. Pure; called by submit.py."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Sequence
from dataclasses import dataclass

from medgen import sbatch_options
from medgen.errors import InputError
from medgen.launch import nodes
from medgen.plan import Plan, PlannedStage
from medgen.site import Site
from medgen.spec import Spec
from medgen.spec_stages import GenerateStage

NATIVE_PREFER = (22, 5)  # Slurm 22.05 brought --prefer


@dataclass(frozen=True)
class Limits:
    """What the cluster allows, from its profile and from Slurm itself; None: unknown or unlimited."""

    version: tuple[int, int] | None = None
    array: int | None = None  # MaxArraySize: one more than the largest index
    submitted: int | None = None  # jobs and array elements of one user


def fit_to_machine(plan: Plan, site: Site) -> tuple[Plan, list[str]]:
    """The plan as this machine can run it, and a note for every stage that gets less than it asked for.

    All ranks run on one node. With too few GPUs a stage takes those there are; with none, one process on the CPU."""
    stages, notes = [], []
    for stage in plan.stages:
        asked = stage.nodes * stage.gpus_per_node
        given = min(asked, site.gpus)
        if asked and stage.launcher != "none":
            stages.append(dataclasses.replace(stage, nodes=1, gpus_per_node=given, ranks_per_node=max(1, given), threads=_threads(stage, given, site)))
        else:
            stages.append(dataclasses.replace(stage, nodes=1, gpus_per_node=given, ranks_per_node=stage.ranks))
        if given < asked:
            notes.append(f"{stage.name} asks for {_gpus(asked)}; this machine has {_gpus(site.gpus)}: it runs on {_gpus(given) if given else 'the CPU'}")
    return dataclasses.replace(plan, stages=stages), notes


def _threads(stage: PlannedStage, given: int, site: Site) -> int:
    """As planned, but a whole-machine stage that lost its GPUs gets the machine's cores."""
    if stage.kind == "generate":
        return stage.threads  # part of the promise that shards are the same bytes
    return max(stage.threads, site.cpus // max(1, given)) if given < stage.nodes * stage.gpus_per_node else stage.threads


def _gpus(count: int) -> str:
    return {0: "no GPU", 1: "1 GPU"}.get(count, f"{count} GPUs")


def fit_shards(checked: Spec, plan: Plan, limits: Limits) -> tuple[Spec, list[str]]:
    """Fewer, larger shards where the cluster would not take as many jobs; images do not depend on the number of shards.

    Raises InputError if even one shard each would be too many."""
    total = sum(stage.jobs for stage in plan.stages)
    if limits.submitted is None or total <= limits.submitted:
        return checked, []
    sizes = {name: stage.shards for name, stage in checked.stages.items() if isinstance(stage, GenerateStage)}
    room = limits.submitted - (total - sum(sizes.values()))
    if room < len(sizes) or not sizes:
        raise InputError(f"this run needs at least {total - sum(sizes.values()) + len(sizes)} jobs in the queue, and this cluster takes {limits.submitted} "
                         "of one user; split the spec, or ask for another QOS (-o site.qos=...)")
    fitted = _shared_out(sizes, room)
    stages = dict(checked.stages)
    for name, shards in fitted.items():
        stage = stages[name]
        assert isinstance(stage, GenerateStage)
        stages[name] = stage.model_copy(update={"shards": shards, "parallel": min(stage.parallel, shards) if stage.parallel else None})
    told = ", ".join(f"{name} {sizes[name]} -> {shards}" for name, shards in fitted.items() if shards != sizes[name])
    return checked.model_copy(update={"stages": stages}), [f"this cluster takes {limits.submitted} jobs of one user: fewer, larger shards ({told}); the images stay the same"]


def _shared_out(sizes: dict[str, int], room: int) -> dict[str, int]:
    """Cut the largest again and again until all fit."""
    fitted = dict(sizes)
    while sum(fitted.values()) > room:
        largest = max(fitted, key=lambda name: fitted[name])
        fitted[largest] -= 1
    return fitted


def fit_to_cluster(plan: Plan, site: Site, limits: Limits, today: datetime.date, bad_nodes: Sequence[nodes.Entry]) -> tuple[Plan, list[str]]:
    """Exclusions that are still believed, and no option that this version of Slurm does not know."""
    stages, notes = list(plan.stages), []
    excluded = [item for item in site.exclude if item.until >= today]
    for item in site.exclude:
        if item not in excluded:
            notes.append(f"{item.nodes} were to be avoided until {item.until} ({item.reason}): used again; remove the entry from the profile of {site.name}, or renew it")
    notes += [f"kept away from {entry.node} until {datetime.date.fromtimestamp(entry.until)}: {entry.reason}; `medgen nodes --forget {entry.node}` takes it back" for entry in bad_nodes]
    if excluded or bad_nodes:
        option = f"--exclude={','.join(dict.fromkeys([*(item.nodes for item in excluded), *(entry.node for entry in bad_nodes)]))}"
        stages = [_with_directive(stage, option) for stage in stages]
    if site.restart == "chain":
        notes += [f"{stage.name}: restart: chain queues one job, because segments: says no number; with segments: 4 four jobs wait one behind the other"
                  for stage in plan.stages if stage.kind == "train" and stage.segments is None]  # fmt: skip
    if limits.version is not None and limits.version < NATIVE_PREFER:
        version = f"{limits.version[0]}.{limits.version[1]:02}"
        for number, stage in enumerate(stages):
            kept = [line for line in stage.directives if not line.startswith("--prefer=")]
            if kept != stage.directives:
                stages[number] = dataclasses.replace(stage, directives=kept)
                notes.append(f"{stage.name}: Slurm {version} knows no --prefer: whichever allowed GPU is free first is taken; "
                             f"to wait for the better one, write any_of with it alone")
    return dataclasses.replace(plan, stages=stages), notes


def _with_directive(stage: PlannedStage, option: str) -> PlannedStage:
    name = sbatch_options.names_of(option)
    return stage if name & sbatch_options.decided(stage.directives) else dataclasses.replace(stage, directives=[option, *stage.directives])
