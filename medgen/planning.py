"""Makes the plan: a pure function of spec and site. Called by the submit and check verbs.

What a spec asks for becomes stages, tasks with their hashes, and sbatch options in the words of the site."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from medgen import files, sbatch_options
from medgen.errors import InputError
from medgen.names import absolute
from medgen.plan import PLAN_VERSION, Place, Plan, PlannedStage, Shard, Task, collect_name, features_name
from medgen.site import Site
from medgen.spec import Spec, family_config
from medgen.spec_base import GpuRequest, Resources
from medgen.spec_evaluate import EvaluateStage, FeaturesStage
from medgen.spec_stages import AnyStage, Collected, CollectStage, CommandStage, GenerateStage, TrainStage
from medgen.spec_utility import TrialStage

DEFAULT_TIME_MINUTES = {
    "train": 720, "generate": 120, "collect": 60, "features": 120, "evaluate": 60, "structure": 240, "utility": 240, "report": 15, "command": 60,
}  # fmt: skip
SHARED_CPUS = 4  # of a cluster's node, for a task without a GPU that says nothing
# fields of a stage that cannot change what it produces
NOT_SCIENCE = {"resources", "shards", "parallel", "segments", "launcher"}


class Unplannable(InputError):
    """A spec that is fine by itself, but not on this site; `path` is the key of the spec to blame."""

    def __init__(self, path: tuple[str, ...], message: str):
        super().__init__(f"{'.'.join(path)}: {message}")
        self.path = path
        self.message = message


def run_id_of(spec: Spec) -> str:
    """The name of the run folder: changed resources are the same run, changed science is a new one."""
    science = {name: _science(stage) for name, stage in _with_planned(spec).items() if not isinstance(stage, FeaturesStage)}
    return f"{spec.name}-{files.sha256_json(_run_science(spec, science))[:10]}"


def make_plan(spec: Spec, site: Site) -> Plan:
    """Expand a spec into stages and tasks, in an order where every stage follows what it needs."""
    stages = _with_planned(spec)
    science = {name: _science(stage) for name, stage in stages.items()}
    run_id = run_id_of(spec)
    order = _topological(stages)
    return Plan(
        version=PLAN_VERSION,
        run_id=run_id,
        name=spec.name,
        seed=spec.seed,
        site=site.name,
        place=_place(site),
        data=spec.data.model_dump(mode="json") if spec.data is not None else {},
        stages=[_planned(name, stages, science, run_id, site) for name in order],
    )


def _place(site: Site) -> Place:
    interpreter = [*site.environment.prefix(), "python"] if site.environment.brings_python else []
    secrets = str(absolute(site.secrets)) if site.secrets is not None else None
    return Place(site.scheduler, interpreter, list(site.export), secrets, site.grace, site.notify.model_dump(mode="json"), site.lost)


def _with_planned(spec: Spec) -> dict[str, AnyStage]:
    """The user's stages, a collect stage behind each whose tasks make parts of one thing, and a features stage in front of each evaluate stage of several shards."""
    stages: dict[str, AnyStage] = {}
    for name, stage in spec.stages.items():
        if isinstance(stage, EvaluateStage) and stage.shards > 1:
            stages[features_name(name)] = FeaturesStage(kind="features", of=name, parts=stage.shards, parallel=stage.parallel, resources=stage.resources)
        stages[name] = stage
        if isinstance(stage, Collected):
            stages[collect_name(name)] = CollectStage(kind="collect", of=name)
    return stages


def _needs(name: str, stages: dict[str, AnyStage]) -> list[str]:
    """What must be finished first: readers wait for what was collected, the report for everything."""
    stage = stages[name]
    if stage.kind == "report":
        return [other for other, item in stages.items() if item.kind != "report"]
    if isinstance(stage, FeaturesStage):
        return [other for other in _needs(stage.of, stages) if other != name]
    waits_for_shards = isinstance(stage, CollectStage)
    needs = [
        collect_name(other) if isinstance(stages[other], Collected) and not waits_for_shards else other
        for other in stage.inputs()
    ]
    if features_name(name) in stages:
        needs.append(features_name(name))
    return list(dict.fromkeys(needs))


def _topological(stages: dict[str, AnyStage]) -> list[str]:
    order: list[str] = []

    def visit(name: str) -> None:
        if name not in order:
            for needed in _needs(name, stages):
                visit(needed)
            order.append(name)

    for name in stages:
        visit(name)
    return order


def _science(stage: AnyStage) -> dict[str, Any]:
    return stage.model_dump(mode="json", by_alias=True, exclude=NOT_SCIENCE)


def _run_science(spec: Spec, science: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        "plan_version": PLAN_VERSION,
        "name": spec.name,
        "seed": spec.seed,
        "data": spec.data.model_dump(mode="json") if spec.data is not None else {},
        "stages": science,
    }


def _planned(name: str, stages: dict[str, AnyStage], science: dict[str, Any], run_id: str, site: Site) -> PlannedStage:
    stage = stages[name]
    resources = stage.resources
    # a command's own header is believed; for medgen's stages other numbers behind the plan's back are refused by preflight
    said = sbatch_options.amounts(resources.slurm if isinstance(stage, CommandStage) else [])
    stage_hash = files.sha256_json([run_id, name, science[name]])
    tasks = _tasks(name, stage, stage_hash)
    gpus_per_node = said.gpus_per_node if said.gpus_per_node is not None else _gpus_per_node(stage, resources, site)
    ranks_per_node = max(gpus_per_node, resources.processes or 1) if isinstance(stage, TrainStage) else max(1, resources.processes or 1)
    _check_ranks(name, stage, gpus_per_node)
    if isinstance(stage, TrainStage):
        knob, batch_sizes = family_config(stage.config).global_batch_sizes
        problem = uneven_batch(batch_sizes, resources.nodes * ranks_per_node)
        if problem is not None:
            raise Unplannable(("stages", name, "config", knob), problem)
    parallel = stage.parallel if isinstance(stage, GenerateStage | CommandStage | FeaturesStage | TrialStage) and stage.parallel else len(tasks)
    time_minutes = said.time_minutes or resources.time or DEFAULT_TIME_MINUTES[stage.kind]
    if site.limits.time is not None and time_minutes > site.limits.time:
        goes_on = "it goes on by itself after that"
        hint = {"train": goes_on, "structure": goes_on, "utility": goes_on, "command": "save and go on with segments"}.get(stage.kind, "use more shards")
        raise Unplannable(("stages", name, "resources", "time"), f"{_hours(time_minutes)} is more than {site.name} gives a job ({_hours(site.limits.time)}); {hint}")
    return PlannedStage(
        name=name,
        kind=stage.kind,
        needs=_needs(name, stages),
        nodes=said.nodes or resources.nodes,
        ranks_per_node=ranks_per_node,
        gpus_per_node=gpus_per_node,
        threads=said.cpus_per_task or _threads(stage, resources, ranks_per_node, gpus_per_node, site),
        time_minutes=time_minutes,
        mem_mebibytes=said.mem_mebibytes or resources.mem or (site.mem * max(1, gpus_per_node) if site.mem else None),
        parallel=parallel,
        segments=stage.segments if isinstance(stage, TrainStage | CommandStage) else None if isinstance(stage, TrialStage) else 1,
        chain=_chain(stage, site),
        launcher="none" if isinstance(stage, CommandStage) else stage.launcher if isinstance(stage, TrainStage) else "srun",
        setup=[*site.environment.lines(), *site.setup, *([] if isinstance(stage, CommandStage) else resources.setup)],
        command_setup=list(resources.setup) if isinstance(stage, CommandStage) else [],
        directives=_directives(name, stages, gpus_per_node, site) if site.scheduler == "slurm" else [],
        left_out=_left_out(stage),
        settings=stage.model_dump(mode="json", by_alias=True, exclude={"resources"}),
        tasks=tasks,
    )


def _chain(stage: AnyStage, site: Site) -> int:
    """How many jobs are queued for the one task of a stage that is known to meet its time limit."""
    chained = site.restart == "chain" and isinstance(stage, TrainStage | CommandStage) and not (isinstance(stage, CommandStage) and stage.foreach)
    return (stage.segments or 1) if chained and isinstance(stage, TrainStage | CommandStage) else 1


def uneven_batch(batch_sizes: Iterable[int], ranks: int) -> str | None:
    """Why this many ranks cannot share every batch, in words; None if they can. Asked again in the job, which may have others."""
    uneven = next((size for size in batch_sizes if size % ranks), None)
    return None if uneven is None else f"{uneven} cannot be shared evenly by {ranks} ranks; use a multiple"


def _check_ranks(name: str, stage: AnyStage, gpus_per_node: int) -> None:
    """Only training is shared by several devices; images are spread over shards."""
    resources = stage.resources
    if isinstance(stage, TrainStage | CommandStage):
        return
    several = resources.nodes > 1 or gpus_per_node > 1 or (resources.processes or 1) > 1
    if several:
        hint = "write shards: N instead" if isinstance(stage, GenerateStage) else "remove nodes, processes and further gpus"
        raise Unplannable(("stages", name, "resources"), f"a task of a {stage.kind} stage runs on one device, more would idle; {hint}")


def _directives(name: str, stages: dict[str, AnyStage], gpus_per_node: int, site: Site) -> list[str]:
    """sbatch options in the words of the site; the user's own take the place of those that decide the same."""
    resources = stages[name].resources
    lines = [*_site_directives(name, resources, gpus_per_node, site), *_mail(name, stages, site)]
    return [*sbatch_options.without(lines, sbatch_options.decided(resources.slurm)), *resources.slurm]


def _site_directives(name: str, resources: Resources, gpus_per_node: int, site: Site) -> list[str]:
    """Raises Unplannable for GPUs the site does not have."""
    partition = site.partitions.gpu if gpus_per_node else site.partitions.cpu
    words = {"partition": partition, "account": site.account, "qos": site.qos, "reservation": site.reservation}
    directives = [f"--{option}={value}" for option, value in words.items() if value is not None]
    if resources.gpu is not None:
        directives += _gpu_directives(name, resources.gpu, site)
    return directives


def _left_out(stage: AnyStage) -> list[str]:
    """A command that brings sbatch options asks for what they say, and for what its resources say beside them: no defaults."""
    resources = stage.resources
    if not isinstance(stage, CommandStage) or not resources.slurm:
        return []
    said = {
        "time": resources.time, "nodes": resources.nodes if resources.nodes > 1 else None, "ntasks-per-node": resources.processes,
        "cpus-per-task": resources.cpus, "mem": resources.mem, "gres": resources.gpus_asked,
    }  # fmt: skip
    return [option for option, value in said.items() if value is None]


def _mail(name: str, stages: dict[str, AnyStage], site: Site) -> list[str]:
    """Slurm's own mail: for every job that fails, and for the end of those that nothing waits for."""
    last = not any(name in _needs(other, stages) for other in stages)
    kinds = [*(["FAIL"] if "fail" in site.notify.on else []), *(["END"] if last and "end" in site.notify.on else [])]
    return [f"--mail-user={site.notify.mail}", f"--mail-type={','.join(kinds)}"] if site.notify.mail is not None and kinds else []


def _gpu_directives(name: str, wanted: GpuRequest, site: Site) -> list[str]:
    path = ("stages", name, "resources", "gpu")
    known = ", ".join(site.features) or "none are listed in its profile"
    for feature in [*wanted.any_of, *([wanted.prefer] if wanted.prefer else [])]:
        if site.features and feature not in site.features:
            raise Unplannable((*path, "any_of" if feature in wanted.any_of else "prefer"), f"{site.name} has no GPUs called {feature!r}; it has: {known}")
    constraint = "|".join(wanted.any_of)
    if wanted.memory is not None:
        constraint = _with_memory(wanted.any_of, wanted.memory, path, site)
    lines = [f"--constraint={constraint}"] if constraint else []
    return [*lines, f"--prefer={wanted.prefer}"] if wanted.prefer else lines


def _with_memory(any_of: list[str], memory: int, path: tuple[str, ...], site: Site) -> str:
    """The features that promise this much memory, or of the wanted ones those that do, alone or together with such a feature."""
    enough = [feature for feature, sizes in site.features.items() if sizes and min(sizes) >= memory]
    if not any_of:
        if not enough:
            raise Unplannable((*path, "memory"), f"{site.name} promises no GPU with {memory / 1024:g}G; its features: {_sizes(site)}")
        return "|".join(enough)
    alone = [feature for feature in any_of if feature in enough]
    with_a_size = [feature for feature in any_of if feature not in enough and max(site.features[feature], default=memory) >= memory]
    sizes = [feature for feature in enough if feature not in any_of]
    if with_a_size and sizes and not alone:
        return f"({'|'.join(with_a_size)})&({'|'.join(sizes)})"
    if alone:
        return "|".join(alone)
    raise Unplannable((*path, "memory"), f"none of {', '.join(any_of)} promises {memory / 1024:g}G on {site.name}; its features: {_sizes(site)}")


def _sizes(site: Site) -> str:
    return ", ".join(f"{name} {'/'.join(f'{size / 1024:g}G' for size in sizes)}" for name, sizes in site.features.items() if sizes) or "none with a memory"


def _hours(minutes: int) -> str:
    return f"{minutes / 60:g} h" if minutes < 2880 else f"{minutes / 1440:g} days"


def _gpus_per_node(stage: AnyStage, resources: Resources, site: Site) -> int:
    """What was asked for; where nothing was said, stages with a network take one GPU of a machine that has any."""
    if resources.gpus_asked is not None:
        return resources.gpus_asked
    takes_one = isinstance(stage, TrainStage | GenerateStage | FeaturesStage | TrialStage) and resources.processes is None
    return min(1, site.gpus) if takes_one else 0


def _threads(stage: AnyStage, resources: Resources, ranks_per_node: int, gpus_per_node: int, site: Site) -> int:
    """CPU threads per process: what was asked for; else one for each shard, a GPU's share of the cores, or all of them."""
    if resources.cpus is not None:
        return max(1, resources.cpus // ranks_per_node)
    if isinstance(stage, GenerateStage | FeaturesStage):
        return 1
    if gpus_per_node:
        return site.cpus_per_gpu or max(1, site.cpus // max(ranks_per_node, site.gpus))
    if site.scheduler == "slurm":  # a node is shared with others
        return site.cpus_per_gpu or min(SHARED_CPUS, site.cpus)
    if isinstance(stage, TrialStage):
        return 1  # as many side by side as there are cores
    return max(1, site.cpus // ranks_per_node)


def _tasks(name: str, stage: AnyStage, stage_hash: str) -> list[Task]:
    parts = len(stage.foreach) if isinstance(stage, CommandStage) else stage.trials if isinstance(stage, TrialStage) else 0
    if isinstance(stage, FeaturesStage):
        return [Task(name, number, files.sha256_json([stage_hash, stage.parts, number])[:16], None) for number in range(stage.parts)]
    if parts:
        return [Task(name, number, files.sha256_json([stage_hash, number])[:16], None) for number in range(parts)]
    if not isinstance(stage, GenerateStage):
        return [Task(name, 0, stage_hash[:16], None)]
    tasks = []
    for number, images in enumerate(shard_ranges(stage.count, stage.chunk, stage.shards)):
        tasks.append(Task(name, number, files.sha256_json([stage_hash, images.first, images.stop])[:16], images))
    return tasks


def shard_ranges(count: int, chunk: int, shards: int) -> list[Shard]:
    """Split `count` images into `shards` runs of whole chunks whose lengths differ by one chunk at most."""
    chunks = -(-count // chunk)
    edges = [chunks * number // shards * chunk for number in range(shards + 1)]
    return [Shard(first, min(stop, count)) for first, stop in itertools.pairwise(edges)]
