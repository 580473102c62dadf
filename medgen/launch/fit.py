"""Makes a plan fit one machine: fewer GPUs and processes than asked, never other science. Pure; called by submit.py."""

from __future__ import annotations

import dataclasses

from medgen.plan import Plan, PlannedStage
from medgen.site import Site


def fit_to_site(plan: Plan, site: Site) -> tuple[Plan, list[str]]:
    """The plan as this machine can run it, and a note for every stage that gets less than it asked for.

    All ranks run on one node. With too few GPUs a stage takes those there are; with none, one process on the CPU."""
    stages, notes = [], []
    for stage in plan.stages:
        asked = stage.nodes * stage.gpus_per_node
        given = min(asked, site.gpus)
        if asked:
            stages.append(dataclasses.replace(stage, nodes=1, gpus_per_node=given, ranks_per_node=max(1, given), threads=_threads(stage, given, site)))
        else:
            stages.append(dataclasses.replace(stage, nodes=1, ranks_per_node=stage.ranks))
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
