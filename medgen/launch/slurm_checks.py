"""What Slurm would say to every job of a plan, asked with `sbatch --test-only` and told with the line to change. Called by preflight.py.

Slurm decides; only what it lets pass and never starts (a time above the partition's limit, a partition that is down) is judged here."""

from __future__ import annotations

import datetime
import getpass
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from medgen import sbatch_options
from medgen.document import KeyPath
from medgen.errors import InputError
from medgen.launch import slurm
from medgen.launch.executor import allowed_environment
from medgen.launch.findings import Finding, listed, undone
from medgen.launch.script import render_script
from medgen.launch.slurm import NodeSet, Partition, SlurmError
from medgen.launch.slurm_backend import chunks
from medgen.launch.submit import Prepared
from medgen.plan import PlannedStage
from medgen.site import Site

PATIENCE_SECONDS = 30.0  # for one answer of Slurm
TRIES, PAUSE_SECONDS = 2, 1.0
COMMANDS = ("sbatch", "squeue", "scontrol", "scancel", "srun", "sinfo")
START = re.compile(r"to start at (\S+)")
NOISE = ("sbatch: error: ", "sbatch: ", "allocation failure: ", "Batch job submission failed: ")

# what Slurm complains about -> the option that said it, the key of the spec or of the profile that made the option.
# The first that matches counts: "Invalid account or account/partition combination" is about the account.
COMPLAINTS: list[tuple[str, str, KeyPath | None, KeyPath | None]] = [
    (r"preferred feature", "prefer", ("resources", "gpu", "prefer"), None),
    (r"feature", "constraint", ("resources", "gpu"), None),
    (r"accounting/QOS policy", "qos", ("resources",), None),
    (r"account", "account", None, ("account",)),
    (r"qos", "qos", None, ("qos",)),
    (r"reservation", "reservation", None, ("reservation",)),
    (r"time limit", "time", ("resources", "time"), None),
    (r"job array", "array", ("shards",), None),
    (r"node name", "exclude", None, ("exclude",)),
    (r"licen[sc]e", "licenses", ("resources", "slurm"), None),
    (r"gres|generic resource", "gres", ("resources", "gpus"), None),
    (r"unrecognized option|invalid option|requires an argument|ambiguous", "", ("resources", "slurm"), None),
    (r"node configuration|node count|cpu count|memory specification|more processors|nodes required|nodes are", "", None, None),
    (r"partition", "partition", None, ("partitions",)),
]


@dataclass(frozen=True)
class Question:
    """One set of sbatch options, and the stages that have it; `item` and `stage` are those of its script."""

    item: Prepared
    stage: PlannedStage
    names: list[str]
    roots: list[str]  # those that wait for nothing
    script: str
    options: dict[str, str]  # long name -> value, the last one counts

    @property
    def spec_name(self) -> str:
        """The stage of the spec that decides: a collect stage stands in no spec."""
        return self.stage.name if self.stage.name in self.item.spec.stages else str(self.stage.settings["of"])

    @property
    def partition_key(self) -> KeyPath:
        return ("partitions", "gpu" if self.stage.gpus_per_node else "cpu")

    def key_of(self, option: str) -> int | None:
        """Which line of the user's own resources.slurm decides this option."""
        lines = self.item.spec.stages[self.spec_name].resources.slurm
        return next((number for number, line in reversed(list(enumerate(lines))) if option in sbatch_options.names_of(line)), None)

    def error(self, option: str, spec_key: KeyPath | None, site_key: KeyPath | None, message: str) -> InputError:
        """Blames the user's own directive if there is one, else the key of the spec, else that of the profile."""
        path: KeyPath = ("stages", self.spec_name)
        own = self.key_of(option)
        others = [name for name in self.names if name != self.stage.name]
        if others and (own is not None or site_key is None):
            message += f" (the same for {listed(others)})"
        if own is not None:
            return self.item.point.document.error((*path, "resources", "slurm", own), message)
        if site_key is not None and spec_key is None:
            key = "-o site." + ".".join(map(str, site_key))
            return self.item.site.error(site_key, f"{message}; change it there, or with {key}=...")
        return self.item.point.document.error((*path, *(spec_key or ("resources",))), message)


def missing_commands() -> list[str]:
    return [command for command in COMMANDS if shutil.which(command) is None]


def look(prepared: Sequence[Prepared]) -> list[Finding]:
    """One finding per distinct set of sbatch options. Raises SlurmError if Slurm does not answer."""
    partitions = slurm.parse_partitions(slurm.query(["sinfo", "-a", "-h", "-e", "-o", slurm.NODE_FIELDS], PATIENCE_SECONDS))
    config = slurm.parse_config(slurm.query(["scontrol", "show", "config"], PATIENCE_SECONDS))
    findings = [_ask(question, partitions) for question in questions(prepared)]
    return [*findings, *_unchecked_words(prepared[0].site, config)]


def questions(prepared: Sequence[Prepared]) -> Iterator[Question]:
    """The distinct sets of options of everything that is not done; of equal ones the largest array speaks."""
    groups: dict[tuple[str, ...], list[tuple[Prepared, PlannedStage]]] = {}
    for item in prepared:
        for stage in item.plan.stages:
            if undone(item.run, stage):
                groups.setdefault(_directives(_script(item, stage)), []).append((item, stage))
    for lines, members in groups.items():
        item, stage = max(members, key=lambda member: len(member[1].tasks))
        options = {name: value or "" for line in lines for name, value in sbatch_options.options_of(line)}
        names = list(dict.fromkeys(member.name for _, member in members))
        roots = list(dict.fromkeys(member.name for _, member in members if not member.needs))
        yield Question(item, stage, names, roots, _script(item, stage), options)


def _script(item: Prepared, stage: PlannedStage) -> str:
    first = chunks(stage, [task.shard for task in stage.tasks], 1, item.limits.array)[0]
    return render_script(item.plan, stage, first, item.run.root, sys.executable)


def _directives(script: str) -> tuple[str, ...]:
    lines = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]
    return tuple(sbatch_options.without(lines, {"job-name", "output", "array"}))


def _ask(question: Question, partitions: list[Partition]) -> Finding:
    topic = "Slurm"
    code, words = test_only(question.script, question.item.site.export)
    if code and slurm.is_transient(words):
        return Finding(topic, "warning", f"Slurm was too busy to say whether it would take {listed(question.names)}: {words}")
    if code:
        return Finding(topic, "wrong", str(_explain(question, words, partitions)), {"slurm": words})
    found = _partitions_of(question, partitions)
    problem = _never_starts(question, found)
    if problem is not None:
        return Finding(topic, "wrong", str(problem))
    away = [partition.name for partition in found if not partition.is_up]
    if away:
        return Finding(topic, "warning", f"{listed(question.names)}: partition {', '.join(away)} takes jobs and starts none now: sinfo says it is not up")
    start = START.search(words)
    at = slurm.parse_time(start[1]) if start else None
    facts = {"stages": question.names, "expected_start": at}
    if at is None or not question.roots:
        return Finding(topic, "fine", f"would take {listed(question.names)}", facts)
    return Finding(topic, "note", f"Slurm expects to start {listed(question.roots)} {_when(at)}", facts)


def test_only(script: str, exported: list[str]) -> tuple[int, str]:
    """sbatch's exit code and words, in the environment of a real submit; nothing is queued. Raises SlurmError if it does not answer."""
    with allowed_environment(exported):
        environment = slurm.reading_environment()
    with tempfile.TemporaryDirectory(prefix="medgen-") as folder:
        path = Path(folder) / "job.sh"
        path.write_text(script)
        for left in range(TRIES - 1, -1, -1):
            answer = slurm.call(["sbatch", "--test-only", str(path)], PATIENCE_SECONDS, environment)
            if not (answer.returncode and slurm.is_transient(answer.stderr)):
                break
            if left:
                time.sleep(PAUSE_SECONDS)
    if answer.returncode and not answer.stderr.strip():
        raise slurm.failure(answer)
    return answer.returncode, slurm.said(answer)


def _explain(question: Question, words: str, partitions: list[Partition]) -> InputError:
    """Slurm's refusal as an error at the key that caused it, with what is allowed."""
    said = _plain(words)
    here = _partitions_of(question, partitions)
    for pattern, option, spec_key, site_key in COMPLAINTS:
        if not re.search(pattern, said, re.IGNORECASE):
            continue
        if site_key == ("partitions",):
            known = ", ".join(partition.name for partition in partitions)
            return question.error(option, None, question.partition_key, f"{_refused(said)}; partitions here: {known}")
        if option in ("constraint", "prefer"):
            features = sorted({feature for partition in here for nodes in partition.node_sets for feature in nodes.features})
            asked = question.options.get(option, "")
            return question.error(option, spec_key, None, f"{_refused(said)} ({asked}); features of {_names(here)}: {', '.join(features) or 'none'}")
        if option == "account":
            return question.error(option, None, site_key, f"{_refused(said)} ({question.options.get('account', 'your default account')}); {_own_accounts()}")
        if option or spec_key:
            return question.error(option, spec_key, site_key, _refused(said))
        return _misfit(question, said, here)
    return question.error("", ("resources",), None, _refused(said))


def _refused(said: str) -> str:
    return f"Slurm refuses this: {said}"


def _plain(words: str) -> str:
    """Each of sbatch's complaints once, without its own name in front."""
    parts = []
    for part in words.split("; "):
        for noise in NOISE:
            part = part.removeprefix(noise)
        parts.append(part.strip())
    return "; ".join(dict.fromkeys(part for part in parts if part and not part.startswith('Try "sbatch')))


def _partitions_of(question: Question, partitions: list[Partition]) -> list[Partition]:
    """Those the job asks for, or the default one; [] if they do not exist."""
    if "partition" not in question.options:
        return [partition for partition in partitions if partition.is_default]
    asked = question.options["partition"].split(",")
    return [partition for partition in partitions if partition.name in asked]


def _names(partitions: list[Partition]) -> str:
    return " and ".join(partition.name for partition in partitions) or "the partition"


def _never_starts(question: Question, partitions: list[Partition]) -> InputError | None:
    """Many clusters take a job with too long a limit, and it waits for ever (PartitionTimeLimit)."""
    minutes = sbatch_options.minutes(question.options.get("time", ""))
    limits = [partition.time_limit_minutes for partition in partitions]
    largest = None if not limits or None in limits else max(limit for limit in limits if limit is not None)
    if minutes is None or largest is None or minutes <= largest:
        return None
    message = f"{_hours(minutes)} is more than {_names(partitions)} gives a job ({_hours(largest)}): it would wait for ever"
    hint = {"train": "; save and go on with segments", "generate": "; use more shards"}.get(question.stage.kind, "")
    return question.error("time", ("resources", "time"), None, message + hint)


def _misfit(question: Question, said: str, partitions: list[Partition]) -> InputError:
    """Which number no node of the partition can give."""
    sets = [nodes for partition in partitions for nodes in partition.node_sets]
    have = f"{_names(partitions)} has: {describe_nodes(sets)}"
    stage, constraint = question.stage, question.options.get("constraint", "")
    matching = [nodes for nodes in sets if satisfies(constraint, nodes.features)]
    if not matching:
        return question.error("constraint", ("resources", "gpu"), None, f"no node of {_names(partitions)} has {constraint}; {have}")
    resources = question.item.spec.stages[question.spec_name].resources
    cpus = stage.threads * stage.ranks_per_node
    most = {"gpus": max(nodes.gpus for nodes in matching), "cpus": max(nodes.cpus for nodes in matching), "mem": max(nodes.memory_mebibytes for nodes in matching)}
    if stage.gpus_per_node > most["gpus"]:
        key = "gpus_per_node" if resources.gpus_per_node is not None else "gpus"
        return question.error("gres", ("resources", key), None, f"{stage.gpus_per_node} GPUs on one node, {_such(constraint)} have {most['gpus']} at most; {have}")
    if cpus > most["cpus"]:
        message = f"{cpus} CPUs on one node, {_such(constraint)} have {most['cpus']} at most; {have}"
        from_site = None if resources.cpus else (("cpus_per_gpu",) if stage.gpus_per_node else ("cpus",))
        return question.error("cpus-per-task", None if from_site else ("resources", "cpus"), from_site, message)
    if stage.mem_mebibytes is not None and stage.mem_mebibytes > most["mem"]:
        message = f"{stage.mem_mebibytes / 1024:g}G of memory on one node, {_such(constraint)} have {most['mem'] / 1024:.4g}G at most; {have}"
        return question.error("mem", ("resources", "mem") if resources.mem else None, None if resources.mem else ("mem",), message)
    count = sum(nodes.nodes for nodes in matching)
    if stage.nodes > count:
        return question.error("nodes", ("resources", "nodes"), None, f"{stage.nodes} nodes, {_names(partitions)} has {count} of them; {have}")
    return question.error("", ("resources",), None, f"{_refused(said)}; {have}")


def _such(constraint: str) -> str:
    return f"nodes with {constraint}" if constraint else "its nodes"


def satisfies(constraint: str, features: Sequence[str]) -> bool:
    """For what a plan writes, `a|b` and `(a|b)&(c|d)`; True for other forms, of which Slurm knows more."""
    if re.search(r"[\[\]*:]", constraint):
        return True
    return all(any(name.strip("() ") in features for name in part.split("|")) for part in constraint.split("&") if part)


def describe_nodes(sets: list[NodeSet]) -> str:
    """`2 nodes with 64 CPUs, 500G, 4 GPUs (a100, gpu40g)`, the largest groups first."""
    texts = []
    for nodes in sorted(sets, key=lambda nodes: -nodes.nodes):
        gpus = f", {nodes.gpus} GPUs" if nodes.gpus else ", no GPU"
        features = f" ({', '.join(nodes.features)})" if nodes.features else ""
        texts.append(f"{nodes.nodes} {'node' if nodes.nodes == 1 else 'nodes'} with {nodes.cpus} CPUs, {nodes.memory_mebibytes / 1024:.4g}G{gpus}{features}")
    return "; ".join(texts[:6]) or "no nodes"


def _own_accounts() -> str:
    """What the accounting says this user may use, in words."""
    try:
        text = slurm.query(["sacctmgr", "-nP", "show", "assoc", f"user={getpass.getuser()}", "format=account"], PATIENCE_SECONDS)
    except (SlurmError, KeyError, OSError):
        return "ask `sacctmgr show assoc user=$USER` for yours"
    accounts = list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    return f"your accounts: {', '.join(accounts)}" if accounts else "you have no account on this cluster: ask its administrators"


def _unchecked_words(site: Site, config: dict[str, str]) -> list[Finding]:
    words = [f"{name} {value}" for name, value in (("account", site.account), ("QOS", site.qos)) if value is not None]
    enforced = config.get("AccountingStorageEnforce", "none")
    if not words or any(word in enforced for word in ("associations", "limits", "qos", "safe", "all")):
        return []
    return [Finding("Slurm", "note", f"this cluster checks no accounts (AccountingStorageEnforce={enforced}): a mistake in {' or '.join(words)} would not be noticed")]


def _when(at: float) -> str:
    """In words that do not grow old while they are read."""
    wait = at - time.time()
    if wait < 60:
        return "at once"
    clock = datetime.datetime.fromtimestamp(at).strftime("%Y-%m-%d %H:%M")
    return f"at {clock} at the latest (in {_hours(round(wait / 60))})"


def _hours(minutes: int) -> str:
    return f"{minutes} min" if minutes < 90 else f"{minutes / 60:.3g} h" if minutes < 2880 else f"{minutes / 1440:.3g} days"
