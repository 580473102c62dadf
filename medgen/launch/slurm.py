"""Slurm's commands and what they print. Used by the Slurm backend and by watch.

Plain text in fields we name, never --json, whose layout differs between versions. Submission itself is in executor.py."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from medgen.errors import MedgenError
from medgen.launch.processes import signal_group

TIMEOUT_SECONDS = 30.0  # Slurm's own MessageTimeout is 10 s, and squeue asks a backup controller after that
RETRIES, PAUSE_SECONDS = 2, 1.0
IDS_PER_CALL = 1000  # one argument may hold 128 KiB
TRANSIENT = ("socket timed out", "unable to contact slurm controller", "connection refused", "zero bytes were transmitted", "connection timed out", "unexpected message received", "communication connection failure")
GONE = re.compile("invalid job id|already completing or completed|already finished", re.IGNORECASE)
# what one Slurm job, or a user's habits, put into the environment: it would change what the commands print or ask for
INHERITED = re.compile(r"(SLURM|SQUEUE|SACCT|SINFO|SCONTROL|SCANCEL|SBATCH|SALLOC|SRUN|PMI|PMIX)_")
KEPT = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT")  # which cluster, and who we are there

# final whatever happens next; every other state, one we never heard of included, may still change
TERMINAL_STATES = frozenset(
    {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"}
)  # fmt: skip

LARGEST_INDEX = 4_000_000  # of an array, in every version

QUEUE_FIELDS = "%F|%K|%T|%r|%S|%e|%M|%V|%N|%j"  # the name last: only it may hold a bar
ACCOUNTING_FIELDS = (
    "JobID", "State", "ExitCode", "Start", "End", "Submit", "ElapsedRaw", "AllocTRES", "AllocCPUS", "NNodes", "ReqMem", "TotalCPU", "MaxRSS",
    "NodeList", "Reason", "JobName",
)  # fmt: skip
NODE_FIELDS = "%P|%a|%l|%D|%c|%m|%G|%f"


class SlurmError(MedgenError):
    """A command of Slurm failed or did not answer: the message names it, its exit code and its words."""


class SlurmMissing(SlurmError):
    """The command is not on PATH."""


class SlurmTimeout(SlurmError):
    """The command did not answer in time and was killed; what it asked for may have happened."""


class SlurmRefused(SlurmError):
    """sbatch said no for good: a wrong partition, account, limit. `reason`: one line."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class SlurmUnsure(SlurmError):
    """sbatch died, timed out or lost its reply: the job may exist."""


@dataclass(frozen=True, slots=True)
class QueueRow:
    """One job, or one element of an array. Times in unix seconds; `start` and `end` are expected ones until they happen."""

    job_id: int  # of the whole array
    array_task: int | None
    state: str  # the long word: RUNNING
    reason: str  # why it waits: Resources; "None" where nothing is in the way
    start: float | None
    end: float | None
    elapsed_seconds: int
    submitted: float | None
    nodes: str
    name: str


@dataclass(frozen=True, slots=True)
class AccountingRow:
    """What the accounting keeps of a job or array element; with `duplicates` one row for each time it ran.

    `total_cpu_seconds` and `max_rss_mebibytes` (the largest step) are None where nobody measured."""

    job_id: int
    array_task: int | None
    name: str  # "allocation" for a moment in rows that are not complete yet
    state: str  # one word: CANCELLED, not "CANCELLED by 1000"; "" in rows that are not complete yet
    exit_code: int
    signal: int
    start: float | None  # unix seconds
    end: float | None
    submitted: float | None
    elapsed_seconds: int
    gpus: int
    cpus: int
    nodes: int
    node_list: str
    requested_mem_mebibytes: float | None  # of the whole job
    total_cpu_seconds: float | None
    max_rss_mebibytes: float | None
    reason: str


@dataclass(frozen=True)
class NodeSet:
    """Equal nodes of a partition. `memory_mebibytes` and `gpus` per node."""

    nodes: int
    cpus: int
    memory_mebibytes: int
    gpus: int
    features: tuple[str, ...]


@dataclass(frozen=True)
class Partition:
    """A partition and what it is made of. `time_limit_minutes`: None where there is no limit."""

    name: str
    is_default: bool
    is_up: bool
    time_limit_minutes: int | None
    node_sets: tuple[NodeSet, ...]


# --- calling ---------------------------------------------------------------------------------------------------------


def call(arguments: Sequence[str], timeout_seconds: float = TIMEOUT_SECONDS, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run one command once and return its exit code, stdout and stderr; its exit code is not judged.

    `environment` is used as it is; None means one in which every version of Slurm prints what is parsed here.
    Raises SlurmMissing, or SlurmTimeout after killing the command and all it started."""
    try:
        process = subprocess.Popen(
            list(arguments), env=dict(reading_environment() if environment is None else environment), start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
        )  # fmt: skip
    except FileNotFoundError:
        raise SlurmMissing(f"{arguments[0]}: this command of Slurm is not on PATH; run medgen on a login node of the cluster") from None
    except OSError as error:
        raise SlurmError(f"{arguments[0]}: cannot be started: {error.strerror or error}") from None
    try:
        stdout, stderr = process.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        raise SlurmTimeout(f"{_shown(arguments)}: did not answer within {timeout_seconds:.0f} s") from None
    finally:  # on every way out, Ctrl-C included
        if process.returncode is None:
            _kill(process)
    return subprocess.CompletedProcess(list(arguments), process.returncode, stdout, stderr)


def _kill(process: subprocess.Popen[str]) -> None:
    signal_group(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # a grandchild in a session of its own may hold the pipes
        process.communicate(timeout=1)
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()


def query(arguments: Sequence[str], timeout_seconds: float = TIMEOUT_SECONDS) -> str:
    """The stdout of a command that only reads; passing troubles are tried again within the same time.

    Raises SlurmError if it fails."""
    answer = _patient_call(arguments, timeout_seconds)
    if answer.returncode:
        raise failure(answer)
    return answer.stdout


def _patient_call(arguments: Sequence[str], timeout_seconds: float = TIMEOUT_SECONDS) -> subprocess.CompletedProcess[str]:
    """`call` for what may safely be repeated: twice more if Slurm was busy or away for a moment."""
    deadline = time.monotonic() + timeout_seconds
    for left in range(RETRIES, -1, -1):
        answer = call(arguments, max(0.1, deadline - time.monotonic()))
        again = left and answer.returncode and is_transient(answer.stderr) and time.monotonic() + PAUSE_SECONDS < deadline
        if not again:
            break
        time.sleep(PAUSE_SECONDS)
    return answer


def is_transient(stderr: str) -> bool:
    """True if Slurm was busy or away for a moment, which says nothing about what it was asked."""
    return any(words in stderr.lower() for words in TRANSIENT)


def failure(answer: subprocess.CompletedProcess[str]) -> SlurmError:
    """The error for a command that ended with an exit code other than 0."""
    words = said(answer)
    return SlurmError(f"{_shown(answer.args)}: exit code {answer.returncode}{f': {words}' if words else ''}")


def said(answer: subprocess.CompletedProcess[str]) -> str:
    """What a command complained about, in one line."""
    return "; ".join(line.strip() for line in answer.stderr.splitlines() if line.strip())[:400]


def _shown(arguments: Sequence[str]) -> str:
    text = shlex.join(arguments)
    return text if len(text) <= 100 else f"{text[:97]}..."


def scrubbed(environment: Mapping[str, str]) -> dict[str, str]:
    """Without what an enclosing Slurm job or a user's defaults for Slurm's commands left there; SLURM_CONF stays."""
    return {name: value for name, value in environment.items() if name in KEPT or not INHERITED.match(name)}


def reading_environment() -> dict[str, str]:
    """What makes the commands print the same in every version and language: times in unix seconds, array expressions in full."""
    return {**scrubbed(os.environ), "LC_ALL": "C", "SLURM_TIME_FORMAT": "%s", "SLURM_BITSTR_LEN": "0"}


# --- the queue -------------------------------------------------------------------------------------------------------


def queue(name_prefix: str = "medgen.") -> list[QueueRow]:
    """This user's jobs whose names begin so: waiting, running, and those that ended a few minutes ago. One call of squeue.

    Raises SlurmError."""
    return parse_queue(queue_text(), name_prefix)


def queue_text(timeout_seconds: float = TIMEOUT_SECONDS) -> str:
    """What squeue says about all jobs of this user, for `parse_queue`. Raises SlurmError."""
    # without -r: a waiting array is one line however long, and -r forgets the last element of 0-88:2
    return query(["squeue", "--me", "-h", "-a", "-t", "all", "-o", QUEUE_FIELDS], timeout_seconds)


def parse_queue(text: str, name_prefix: str = "medgen.") -> list[QueueRow]:
    """Lines that are no rows (headers, warnings, other people's strange job names) are left out."""
    rows: list[QueueRow] = []
    for line in text.splitlines():
        fields = line.split("|", 9)
        if len(fields) != 10 or not fields[9].startswith(name_prefix) or not fields[0].isdecimal():
            continue
        job, element, state, reason, start, end, elapsed, submitted, nodes, name = fields
        for number in expand_tasks(element):
            rows.append(
                QueueRow(int(job), number, state, reason, parse_time(start), parse_time(end), int(parse_elapsed(elapsed) or 0), parse_time(submitted), nodes, name)
            )
    return rows


def expand_tasks(expression: str) -> Sequence[int | None]:
    """The element numbers of an array expression as Slurm prints it: `7`, `[1-5,9]`, `1-89:2%90`; [None] where it is none.

    Slurm cuts long ones short with `...`: what stands before is returned, without a last range that may be cut."""
    body, _, _ = expression.strip("[] \n").partition("%")
    if not body or body == "N/A":
        return [None]
    kept, dots, _ = body.partition("...")
    parts = kept.split(",")
    if dots:
        parts.pop()
    numbers: list[int | None] = []
    for part in parts:
        match = re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", part)
        if match:
            first, last, step = int(match[1]), int(match[2] or match[1]), int(match[3] or 1)
            if last <= LARGEST_INDEX:
                numbers += range(first, last + 1, max(1, step))
    return numbers or [None]


# --- the accounting --------------------------------------------------------------------------------------------------


def accounting(job_ids: Sequence[int], since: float, duplicates: bool = False, timeout_seconds: float = TIMEOUT_SECONDS) -> list[AccountingRow]:
    """What the accounting knows of these jobs and all elements of these arrays, if they were there after `since` (unix seconds).

    `duplicates`: also the earlier lives of requeued jobs. Raises SlurmError, also where a cluster keeps no accounting."""
    rows: list[AccountingRow] = []
    start = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(since))
    for ids in _chunks([str(number) for number in job_ids]):
        command = ["sacct", "-n", "-P", "-S", start, "-j", ",".join(ids), "-o", ",".join(ACCOUNTING_FIELDS)]
        rows += parse_accounting(query([*command, "-D"] if duplicates else command, timeout_seconds))
    return rows


def parse_accounting(text: str) -> list[AccountingRow]:
    """Rows of jobs; the rows of their steps, which follow them, give only the memory that was used."""
    found: list[dict[str, str]] = []
    for line in text.splitlines():
        fields = dict(zip(ACCOUNTING_FIELDS, line.split("|", len(ACCOUNTING_FIELDS) - 1), strict=False))
        if len(fields) != len(ACCOUNTING_FIELDS):
            continue
        job, dot, _ = fields["JobID"].partition(".")
        if not dot:
            found.append(fields)
        elif found and found[-1]["JobID"] == job:
            largest = max(parse_mebibytes(found[-1]["MaxRSS"]) or 0, parse_mebibytes(fields["MaxRSS"]) or 0)
            found[-1]["MaxRSS"] = f"{largest:.6f}M" if largest else ""
    return [row for fields in found for row in _accounting_rows(fields)]


def _accounting_rows(fields: Mapping[str, str]) -> Iterator[AccountingRow]:
    job, _, element = fields["JobID"].partition("_")
    job = job.partition("+")[0]  # a part of a heterogeneous job
    if not job.isdecimal():
        return
    code, _, number = fields["ExitCode"].partition(":")
    cpus, nodes = _count(fields["AllocCPUS"]), _count(fields["NNodes"])
    for task in expand_tasks(element):
        yield AccountingRow(
            job_id=int(job),
            array_task=task,
            name=fields["JobName"],
            state=(fields["State"].split() or [""])[0].rstrip("+"),
            exit_code=_count(code),
            signal=_count(number),
            start=parse_time(fields["Start"]),
            end=parse_time(fields["End"]),
            submitted=parse_time(fields["Submit"]),
            elapsed_seconds=_count(fields["ElapsedRaw"]),
            gpus=parse_gpus(fields["AllocTRES"]),
            cpus=cpus,
            nodes=nodes,
            node_list="" if fields["NodeList"] == "None assigned" else fields["NodeList"],
            requested_mem_mebibytes=_requested_mebibytes(fields["ReqMem"], cpus, nodes),
            total_cpu_seconds=parse_elapsed(fields["TotalCPU"]),
            max_rss_mebibytes=parse_mebibytes(fields["MaxRSS"]),
            reason="" if fields["Reason"] == "None" else fields["Reason"],
        )


def _requested_mebibytes(text: str, cpus: int, nodes: int) -> float | None:
    """Until 20.11 `4Gn` is per node and `4Gc` per CPU; later versions print the sum."""
    each = parse_mebibytes(text.rstrip("nc"))
    factor = {"n": nodes, "c": cpus}.get(text[-1:], 1)
    return None if each is None else each * max(1, factor)


# --- words and numbers as Slurm writes them --------------------------------------------------------------------------


def parse_time(text: str) -> float | None:
    """Unix seconds from `1700000000` or `2026-11-20T10:00:00` (local time); None for `N/A`, `NONE`, `Unknown`."""
    if text.isdecimal():
        return float(text) or None
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError):
        return None


def parse_elapsed(text: str) -> float | None:
    """Seconds from `1-02:03:04`, `02:03`, `00:01.250`; None for `INVALID`, `UNLIMITED`, `infinite` and nothing."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+(?:\.\d+)?)", text.strip())
    if match is None:
        return None
    days, hours, minutes, seconds = (float(part or 0) for part in match.groups())
    return days * 86400 + hours * 3600 + minutes * 60 + seconds


def parse_mebibytes(text: str) -> float | None:
    """From `1024K`, `4.5G`, `1048576` (bytes); None for nothing and for `?`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGTP]?)", text.strip())
    return float(match[1]) * 1024 ** (" KMGTP".index(match[2] or " ") - 2) if match else None


def parse_gpus(tres: str) -> int:
    """From `cpu=8,gres/gpu:a100=2,gres/gpu=2`: the sum over types is there too in most versions, and must not count twice."""
    counts = {name: _count(number) for name, _, number in (item.partition("=") for item in tres.split(",")) if name.startswith("gres/gpu")}
    typed = sum(number for name, number in counts.items() if name.startswith("gres/gpu:"))
    return counts.get("gres/gpu", typed)


def _count(text: str) -> int:
    """A leading number; 0 where there is none. sinfo writes `8+` for nodes that differ, sacct `2K` for 2048."""
    match = re.match(r"(\d{1,18})(?:\.\d+)?([KMG]?)", text)
    return int(match[1]) * 1024 ** " KMG".index(match[2] or " ") if match else 0


def _chunks(items: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(items), IDS_PER_CALL):
        yield items[start : start + IDS_PER_CALL]


# --- acting on jobs --------------------------------------------------------------------------------------------------


def release(job_ids: Sequence[int]) -> None:
    """Let held jobs start; those that have ended meanwhile are no failure. Raises SlurmError."""
    for ids in _chunks([str(number) for number in job_ids]):
        _refuse_unless_gone(_patient_call(["scontrol", "release", ",".join(ids)]))


def element_text(job_id: int, array_task: int | None) -> str:
    """`123`, or `123_4` for an element of an array: what Slurm's commands call it."""
    return str(job_id) if array_task is None else f"{job_id}_{array_task}"


def cancel(job_ids: Sequence[int | str]) -> None:
    """End jobs; `12_3` names one element. One that has ended already is no failure. Raises SlurmError."""
    for ids in _chunks([str(job) for job in job_ids]):
        _refuse_unless_gone(_patient_call(["scancel", "--quiet", *ids]))


def signal_steps(job_ids: Sequence[int | str], name: str) -> None:
    """A signal to every process that srun started for these jobs, and not to the script that waits for them."""
    _signal(job_ids, [f"--signal={name}"])


def signal_scripts(job_ids: Sequence[int | str], name: str) -> None:
    """A signal to the shells of the job scripts alone."""
    _signal(job_ids, ["--batch", f"--signal={name}"])


def kill_steps(job_ids: Sequence[int | str]) -> None:
    """KILL to what the first srun of each job has started, at once. For a whole job KILL means no more than to cancel it: its
    processes get TERM, and KILL only after KillWait."""
    _signal([f"{job}.0" for job in job_ids], ["--signal=KILL"])


def _signal(job_ids: Sequence[int | str], options: list[str]) -> None:
    """Once, because a program may count signals. scancel fails without a word where a job has no step or has just ended,
    so its exit code says nothing: the queue tells what became of the job."""
    for ids in _chunks([str(job) for job in job_ids]):
        call(["scancel", "--quiet", *options, *ids])


def _refuse_unless_gone(answer: subprocess.CompletedProcess[str]) -> None:
    complaints = [line for line in answer.stderr.splitlines() if line.strip()]
    if answer.returncode and not (complaints and all(GONE.search(line) for line in complaints)):
        raise failure(answer)


def write_batch_script(job_id: int) -> str:
    """The script Slurm keeps of a job. Raises SlurmError."""
    return query(["scontrol", "write", "batch_script", str(job_id), "-"])


# --- the cluster -----------------------------------------------------------------------------------------------------


def node_names() -> set[str]:
    """Every node of the cluster. Raises SlurmError if Slurm does not answer."""
    return set(query(["sinfo", "--noheader", "--Node", "--format=%N"]).split())


def config() -> dict[str, str]:
    """slurm.conf as the controller has it, and what it knows beside it. Raises SlurmError."""
    return parse_config(query(["scontrol", "show", "config"]))


def controller_started() -> float | None:
    """When the slurmctld that answers now was started, in unix seconds; None if it does not tell."""
    try:
        return parse_time(config().get("BOOT_TIME", ""))
    except SlurmError:
        return None


def parse_config(text: str) -> dict[str, str]:
    return {match[1]: match[2].strip() for match in re.finditer(r"^(\S+)\s+= ?(.*)$", text, re.MULTILINE)}


def partitions() -> list[Partition]:
    """Every partition, in Slurm's order. One call of sinfo. Raises SlurmError."""
    return parse_partitions(query(["sinfo", "-a", "-h", "-e", "-o", NODE_FIELDS]))


def parse_partitions(text: str) -> list[Partition]:
    found: dict[str, Partition] = {}
    for line in text.splitlines():
        fields = line.split("|")
        if len(fields) != 8:
            continue
        name, up, limit, nodes, cpus, memory, gres, features = (field.strip() for field in fields)
        known = found.get(name, Partition(name.removesuffix("*"), name.endswith("*"), up == "up", _limit_minutes(limit), ()))
        named = () if features == "(null)" else tuple(features.split(","))
        node_set = NodeSet(_count(nodes), _count(cpus), _count(memory), _gpus_of_gres(gres), named)
        node_sets = (*known.node_sets, node_set) if node_set.nodes else known.node_sets
        found[name] = Partition(known.name, known.is_default, known.is_up, known.time_limit_minutes, node_sets)
    return list(found.values())


def _limit_minutes(text: str) -> int | None:
    """`7-00:00:00`, `30:00` (minutes), `infinite`."""
    seconds = parse_elapsed(text)
    return None if seconds is None else int(seconds // 60)


def _gpus_of_gres(text: str) -> int:
    """`gpu:4`, `gpu:a100:2(S:0-1),gpu:h100:2,shard:8`: the GPUs of all types."""
    return sum(int(match[1]) for match in re.finditer(r"(?:^|,)gpu(?::[^:,()]+)?:(\d+)", text))
