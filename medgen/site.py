"""A site profile: what a machine or cluster offers, and its words for it. Read by plan.py and launch/; one YAML per site in cluster/."""

from __future__ import annotations

import datetime
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, model_validator

from medgen import document
from medgen.document import Document, KeyPath
from medgen.errors import InputError
from medgen.names import OptionWord, absolute
from medgen.units import Mebibytes, Minutes, Seconds, parse_seconds

SITE_VARIABLE = "MEDGEN_SITE"
OVERRIDE = "site."  # `-o site.account=x` changes the profile, everything else the spec
SLURM_PATIENCE_SECONDS = 10
SHORTEST_PATIENCE_SECONDS = 20


def _patience(value: object) -> int:
    """0 for never, or no less than what a slow file system may hold back."""
    seconds = parse_seconds(value)
    if seconds != 0 and seconds < SHORTEST_PATIENCE_SECONDS:
        raise ValueError(f"{seconds} s: write 0 for never, or at least {SHORTEST_PATIENCE_SECONDS}s; less would take a slow file system for a dead rank")
    return seconds


Patience = Annotated[int, BeforeValidator(_patience)]


def _list_of_sizes(value: object) -> object:
    return value if isinstance(value, list) else [value]


class Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Partitions(Frozen):
    """Where jobs with and without GPUs go; None: the cluster's default."""

    gpu: OptionWord | None = None
    cpu: OptionWord | None = None


class Exclusion(Frozen):
    """Nodes to stay away from: always with a reason, and until a day after which it is no longer believed."""

    nodes: OptionWord
    reason: str = Field(min_length=3)
    until: datetime.date


class Environment(Frozen):
    """How a job comes to the interpreter that has medgen's packages. Modules first, then one of conda, venv, apptainer.

    With none of the three: the interpreter that ran `medgen submit`."""

    modules: list[str] = []
    conda: str | None = None  # the name or folder of an environment
    venv: Path | None = None
    apptainer: Path | None = None  # an image with medgen's packages
    apptainer_options: list[str] = ["--nv"]

    @model_validator(mode="after")
    def _one_interpreter(self) -> Environment:
        given = [name for name, value in (("conda", self.conda), ("venv", self.venv), ("apptainer", self.apptainer)) if value is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} each bring an interpreter; keep one of them")
        return self

    @property
    def brings_python(self) -> bool:
        return any(value is not None for value in (self.conda, self.venv, self.apptainer))

    def lines(self) -> list[str]:
        """Bash lines that set it up; the first that fails stops the job."""
        lines = []
        if self.modules:
            # a batch job is no login shell: where the site did not export the function, its profile defines it
            lines += ["command -v module > /dev/null || source /etc/profile", "module purge"]
            lines += [f"module load {shlex.quote(name)}" for name in self.modules]
        if self.conda is not None:
            lines += ['source "$(conda info --base)/etc/profile.d/conda.sh"', f"conda activate {shlex.quote(self.conda)}"]
        if self.venv is not None:
            lines.append(f"source {shlex.quote(str(absolute(self.venv) / 'bin' / 'activate'))}")
        return lines

    def prefix(self) -> list[str]:
        """Words before the interpreter: the container, if there is one."""
        if self.apptainer is None:
            return []
        return ["apptainer", "exec", *self.apptainer_options, str(absolute(self.apptainer))]


class Limits(Frozen):
    """What the cluster allows; None: what Slurm itself tells, or no limit."""

    time: Minutes | None = None  # of one job
    array: int | None = Field(None, ge=1)  # elements of one array
    submitted: int | None = Field(None, ge=1)  # jobs and array elements queued by one user at a time


class Notify(Frozen):
    """Who hears of it, and when: `end` is the end of a whole run, `fail` a task that is not tried again.

    `webhook`: the name of an environment variable (of `secrets`) that holds the address: it never stands in a script."""

    mail: OptionWord | None = None
    webhook: str | None = None
    command: str | None = None  # run by bash with MEDGEN_RUN, MEDGEN_EVENT and MEDGEN_TEXT
    on: list[Literal["end", "fail"]] = ["end", "fail"]


class Site(Frozen):
    """`cpus` and `gpus`: on this machine what the local backend may use at once; on a cluster what one node has.

    `setup` lines run at the start of every job, in bash; a failing one stops the job."""

    name: str = "local"
    scheduler: Literal["local", "slurm"] = "local"
    cluster: str | None = None  # ClusterName of its slurm.conf: how medgen knows where it is
    cpus: int = Field(default_factory=lambda: len(os.sched_getaffinity(0)), ge=1)
    gpus: int = Field(default_factory=lambda: count_gpus(), ge=0)
    cpus_per_gpu: int | None = Field(None, ge=1)  # a task's share where it says nothing; default: cpus / gpus
    mem: Mebibytes | None = None  # of a node's share, where a stage says nothing: per GPU, or per task without GPUs
    partitions: Partitions = Partitions()
    account: OptionWord | None = None
    qos: OptionWord | None = None
    reservation: OptionWord | None = None
    features: dict[OptionWord, Annotated[list[Mebibytes], BeforeValidator(_list_of_sizes)]] = {}  # GPU feature -> memories it may have; [] says nothing
    exclude: list[Exclusion] = []
    limits: Limits = Limits()
    environment: Environment = Environment()
    setup: list[str] = []
    export: list[str] = []  # environment variables that jobs get from the shell of `medgen submit`
    secrets: Path | None = None  # a file of NAME=value lines, read on the node
    notify: Notify = Notify()
    restart: Literal["requeue", "chain"] = "requeue"  # how what meets its limit goes on: the job is queued again, or `segments` jobs wait one behind the other
    grace: Seconds = 180  # between the warning signal and the time limit: one step, one save and a minute of slack
    lost: Patience = 600  # a rank that nothing is heard of for so long is given up, and its task fails; 0: never

    _document: Document | None = PrivateAttr(None)  # where every key stands

    def error(self, path: KeyPath, message: str) -> InputError:
        """For what is wrong with the key at `path`: says where it stands in the profile."""
        return (self._document or Document(f"the profile of {self.name}", {})).error(path, message)

    @model_validator(mode="after")
    def _cluster_words_need_a_cluster(self) -> Site:
        if self.scheduler == "local":
            words = {"account", "qos", "reservation", "partitions", "features", "exclude", "limits", "mem", "cluster", "restart"} & self.model_fields_set
            if words:
                raise ValueError(f"{', '.join(sorted(words))}: these are words of a cluster; write scheduler: slurm, or remove them")
        return self

    def on_this_machine(self) -> Site:
        """The same environment, with this machine's cores and GPUs and without a scheduler."""
        if self.scheduler == "local":
            return self
        kept = self.model_dump(include={"environment", "setup", "export", "secrets", "notify", "grace", "lost"})
        return Site(name=f"{self.name} (local)", **kept)


def count_gpus() -> int:
    """GPUs this process may use, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([item for item in visible.split(",") if item.strip() not in ("", "-1")])
    if shutil.which("nvidia-smi") is None:
        return 0
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())


def load(name: str | None, overrides: Sequence[str] = (), local: bool = False) -> Site:
    """The profile `name`: a path, or a file in ./cluster or in the package's cluster folder; None: $MEDGEN_SITE.

    With neither: where there is `sbatch`, the profile whose `cluster` is this one's name, or a plain Slurm site; else this
    machine. `local`: run here whatever the profile says. `overrides`: those of -o that begin with `site.`."""
    chosen = name or os.environ.get(SITE_VARIABLE)
    profile = _profile(chosen) if chosen else _profile_of_this_place(local)
    document.override(profile, [text.removeprefix(OVERRIDE) for text in overrides if text.startswith(OVERRIDE)])
    profile.positions = {path: place.replace("-o ", f"-o {OVERRIDE}", 1) if place.startswith("-o ") else place for path, place in profile.positions.items()}
    site = document.check(Site, profile)
    site._document = profile
    return site.on_this_machine() if local else site


def spec_overrides(overrides: Sequence[str]) -> list[str]:
    """Those of -o that change the spec and not the site."""
    return [text for text in overrides if not text.startswith(OVERRIDE)]


def _profile(chosen: str) -> Document:
    candidates = [Path(chosen), *(folder / f"{chosen}.yaml" for folder in _folders())]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise InputError(f"no site profile {chosen!r}; known here: {', '.join(sorted({path.stem for path in _profiles()})) or 'none'}; or give a path")
    return _read(found)


def _folders() -> list[Path]:
    return [Path.cwd() / "cluster", Path(__file__).parent.parent / "cluster"]


def _profiles() -> list[Path]:
    return [path for folder in _folders() for path in sorted(folder.glob("*.yaml"))]


def _read(path: Path) -> Document:
    return document.load(path, verbatim=("setup", "command"))


def _profile_of_this_place(local: bool) -> Document:
    if local or shutil.which("sbatch") is None:
        return Document("this machine", {})
    cluster = cluster_name()
    for path in _profiles():
        profile = _read(path)
        if cluster is not None and profile.data.get("cluster") == cluster:
            return profile
    # nothing is known of the nodes: one GPU for what has a network, a few cores each
    return Document("a Slurm site without a profile", {"name": cluster or "slurm", "scheduler": "slurm", "cpus": 8, "gpus": 1})


def cluster_name() -> str | None:
    """ClusterName of the slurm.conf in use, or None if it does not answer."""
    try:
        answer = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, timeout=SLURM_PATIENCE_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    words = (line.partition("=") for line in answer.stdout.splitlines())
    return next((value.strip() for key, _, value in words if key.strip() == "ClusterName"), None)
