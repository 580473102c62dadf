"""Why one attempt ended as it did: one word of fourteen, and the records that say so. Pure; used by why and usage.

Truth order: what the task told, the batch log, the guilty rank's log, the accounting, the exit code alone."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from medgen.errors import Exit
from medgen.launch.slurm import AccountingRow
from medgen.launch.tries import Try
from medgen.rundir import Outcome

Kind = Literal[
    "OOM", "TIMEOUT", "PREEMPTED", "NODE_FAIL", "SETUP", "NAN", "DISK_FULL", "RENDEZVOUS", "CANCELLED", "LOST", "DEPENDENCY", "INPUT", "USER",
]  # fmt: skip
Where = Literal["host", "GPU", ""]

WARNED_EARLY_SECONDS = 60  # Slurm may send its warning that much before the site's grace
ENDED_EARLY_SECONDS = 30  # Slurm counts from before the script does, and a last heartbeat is some seconds old
KILLED = (137,)
NOT_FOUND = (126, 127)  # what a shell says of a command it cannot start
# guessed from the exit code, not told by the work itself
WEAK = re.compile(r"^(exit code 0, but no outcome that verifies: )?(killed by|exit code \d+)|^the command ended with exit code (?P<code>\d+)$")
OWN_LINE = re.compile(r"^medgen: ended with|^\w+: (failed|interrupted): ")  # medgen's, at the end of a log
SET_UP = re.compile(r"^medgen: set-up failed with exit code (?P<code>\d+): (?P<command>.*)$", re.MULTILINE)
DISK_FULL = re.compile(r"no space left on device|disk is full|quota exceeded|quota is used up|\[errno (28|122)\]", re.IGNORECASE)
GPU_MEMORY = re.compile(r"(CUDA|HIP)( error:)? out of memory|OutOfMemoryError|CUBLAS_STATUS_ALLOC_FAILED", re.IGNORECASE)
HOST_MEMORY = re.compile(
    r"oom[-_]kill event|invoked oom-killer|out of memory: kill|exceeded (job |step )?memory limit|\bMemoryError\b|cannot allocate memory|DefaultCPUAllocator: .*(can't allocate|not enough) memory|"
    r"DataLoader worker .* killed by signal: Killed", re.IGNORECASE,
)  # fmt: skip
GPU_FAULT = re.compile(
    r"no GPU can be used on|no CUDA-capable device|uncorrectable (ECC|NVLink) error|fallen off the bus|Unable to determine the device handle|CUDA unknown error|"
    r"CUDA-capable device\(s\) is/are busy|CUDA driver initialization failed|system not yet initialized|NVML: (Unknown Error|Driver/library version mismatch)", re.IGNORECASE,
)  # fmt: skip
NOT_FINITE = re.compile(r"loss (is|became) (nan|-?inf)|holds NaN|(is|are) not finite|non-finite|^diverged: the loss", re.IGNORECASE | re.MULTILINE)
RENDEZVOUS = re.compile(
    r"could not meet|ended before its work|has not been heard of|TCPStore|DistNetworkError|DistStoreError|Rendezvous\w*Error|init_process_group|collective operation timeout|NCCL (error|timeout)|ncclSystemError|"
    r"ncclRemoteError|\bgloo\b.*(connection|timed out)|Connection (closed|reset) by peer", re.IGNORECASE,
)  # fmt: skip
NO_PACKAGE = re.compile(r"(ModuleNotFoundError: )?No module named '?(medgen|torch|monai|numpy|typer|pydantic|nibabel|einops|yaml|filelock)\b")
TIME_LIMIT = re.compile(r"^.*DUE TO TIME LIMIT.*$", re.MULTILINE)
PREEMPTION = re.compile(r"^.*DUE TO PREEMPTION.*$", re.MULTILINE)
NODE_FAILURE = re.compile(r"^.*(DUE TO NODE FAILURE|Node failure on).*$", re.MULTILINE)
SCANCEL = re.compile(r"^.*\*\*\* JOB \S+ ON \S+ CANCELLED AT (?!.*DUE TO).*$", re.MULTILINE)
# the accounting's last word, where it says more than that it failed
STATES: dict[str, Kind] = {
    "OUT_OF_MEMORY": "OOM", "TIMEOUT": "TIMEOUT", "DEADLINE": "TIMEOUT", "PREEMPTED": "PREEMPTED", "NODE_FAIL": "NODE_FAIL", "BOOT_FAIL": "NODE_FAIL",
    "CANCELLED": "CANCELLED",
}  # fmt: skip


@dataclass(frozen=True)
class Evidence:
    """One record and what it says, in one line."""

    record: str
    said: str


@dataclass(frozen=True)
class Cause:
    """`certain` is False where the records leave another reading; `where` tells the two memories apart."""

    kind: Kind
    detail: str
    evidence: tuple[Evidence, ...] = ()
    certain: bool = True
    where: Where = ""


@dataclass(frozen=True)
class Records:
    """All that is known of how one attempt ended. `outcome`: of this attempt only; `row`: of the job it ran in."""

    item: Try
    stage_kind: str
    limit_seconds: float  # of the job
    grace_seconds: float
    on_slurm: bool
    outcome: Outcome | None = None
    rank_causes: tuple[str, ...] = ()
    batch: str = ""
    rank_log: str = ""  # its name
    rank_lines: tuple[str, ...] = ()
    row: AccountingRow | None = None
    cancelled: bool = False
    no_room: str | None = None  # where the run folder has none now: its path

    @property
    def told(self) -> list[Evidence]:
        """What the task itself said, the most trusted first."""
        told = [Evidence("outcome", str(self.outcome.cause))] if self.outcome is not None and _is_told(self.outcome) else []
        told += [Evidence("event rank_failed", cause) for cause in self.rank_causes]
        if self.item.cause and not WEAK.match(self.item.cause):
            told.append(Evidence("event task_ended", self.item.cause))
        return told

    @property
    def exit_code(self) -> int | None:
        """Of the work: of a user's command its own, else the one that srun or the accounting gives; None if nobody saw one."""
        command = WEAK.match(self.outcome.cause) if self.outcome is not None and self.outcome.cause else None
        if command is not None and command["code"] is not None:
            return int(command["code"])
        return self.item.exit_code if self.item.exit_code is not None or self.row is None else self.row.exit_code


def was_warned(ran_seconds: float, limit_seconds: float, grace_seconds: float) -> bool:
    """True if an attempt ran until Slurm warns of its time limit; where the grace is most of that, half of it must have passed."""
    return ran_seconds >= max(limit_seconds - grace_seconds - WARNED_EARLY_SECONDS, limit_seconds / 2)


def was_ended(ran_seconds: float, limit_seconds: float) -> bool:
    """True if an attempt ran until Slurm ends it, because of its time limit."""
    return ran_seconds >= limit_seconds - ENDED_EARLY_SECONDS


def _is_told(outcome: Outcome) -> bool:
    """False where the outcome says no more than an exit code."""
    return outcome.cause is not None and not WEAK.match(outcome.cause)


def classify(records: Records) -> Cause:
    """The first rule that fits; every rule looks at records in the order they are to be believed."""
    rules = (_set_up, _told_by_the_task, _interrupted, _batch_log, _accounting, _rank_log, _no_room, _exit_code)
    found = next(cause for rule in rules if (cause := rule(records)) is not None)
    return Cause(found.kind, found.detail, _with_others(found.evidence, records), found.certain, found.where)


def _with_others(evidence: tuple[Evidence, ...], records: Records) -> tuple[Evidence, ...]:
    """Also what else is known, so that a reader can disagree."""
    extra = []
    if records.item.exit_code is not None:
        extra.append(Evidence("event task_ended", f"{records.item.status}, exit code {records.item.exit_code}; {records.item.next}"))
    if records.row is not None and records.row.state:
        extra.append(_said_by_accounting(records.row))
    known = {item.record for item in evidence}
    return (*evidence, *(item for item in extra if item.record not in known))


def _said_by_accounting(row: AccountingRow) -> Evidence:
    return Evidence("accounting", f"{row.state} {row.exit_code}:{row.signal} on {row.node_list or 'no node'} after {row.elapsed_seconds} s")


def _set_up(records: Records) -> Cause | None:
    match = SET_UP.search(records.batch)
    if match:
        full = DISK_FULL.search(records.batch)
        kind: Kind = "DISK_FULL" if full else "SETUP"
        return Cause(kind, f"a set-up line ended with exit code {match['code']}: {match['command']}", (Evidence("batch log", match[0]),))
    for name, text in (("rank log", "\n".join(records.rank_lines)), ("batch log", records.batch)):
        package = NO_PACKAGE.search(text)
        if package and records.outcome is None and records.stage_kind != "command":
            return Cause("SETUP", f"the job's interpreter has not what medgen needs: {_line_of(text, package)}", (Evidence(name, _line_of(text, package)),))
    if records.exit_code in NOT_FOUND and records.outcome is None and records.stage_kind != "command":
        said = _last(records.batch.splitlines()) or f"exit code {records.item.exit_code}"
        return Cause("SETUP", f"a command of the job script was not found: {said}", (Evidence("batch log", said),))
    return None


def _strong(evidence: Evidence) -> Cause | None:
    """What can be read off a text whoever wrote it."""
    for pattern, kind, where in ((DISK_FULL, "DISK_FULL", ""), (GPU_MEMORY, "OOM", "GPU"), (GPU_FAULT, "NODE_FAIL", "GPU"), (HOST_MEMORY, "OOM", "host"), (NOT_FINITE, "NAN", "")):
        match = pattern.search(evidence.said)
        if match:
            line = _line_of(evidence.said, match)
            return Cause(kind, line, (Evidence(evidence.record, line),), where=where)  # type: ignore[arg-type]
    return None


def _told_by_the_task(records: Records) -> Cause | None:
    told = records.told
    strong = next((cause for item in told if (cause := _strong(item)) is not None), None)
    if strong is not None:
        return strong
    if not told or records.item.status == "interrupted" or (records.outcome is not None and records.outcome.status == "interrupted"):
        return None
    if records.item.exit_code == Exit.BAD_INPUT or records.item.status == "refused":
        return Cause("INPUT", told[0].said, (told[0],))
    other = _first_failed_rank(records)
    if RENDEZVOUS.search(told[0].said):  # how the other ranks notice that one has died
        return other or Cause("RENDEZVOUS", told[0].said, (told[0],))
    return Cause("USER", told[0].said, (told[0],))


def _first_failed_rank(records: Records) -> Cause | None:
    """The reason of a rank that did not just lose the others: by its own words, or in its log."""
    own = [item for item in records.told if item.record == "event rank_failed" and not RENDEZVOUS.search(item.said)]
    if own:
        return Cause("USER", own[0].said, (own[0],))
    return _batch_log(records) or _strong(Evidence(records.rank_log, "\n".join(records.rank_lines)))


def _interrupted(records: Records) -> Cause | None:
    """Stopped from outside, after saving or before it could: who did it is in Slurm's words, the events, or the clock."""
    outcome, item = records.outcome, records.item
    if item.status != "interrupted" and (outcome is None or outcome.status != "interrupted"):
        return None
    detail = item.cause or (outcome.cause if outcome is not None else None) or "stopped from outside"
    evidence = (Evidence("outcome" if outcome is not None and outcome.cause == detail else "event task_ended", detail),)
    if records.cancelled or item.kind == "CANCELLED":
        return Cause("CANCELLED", detail, evidence)
    if item.kind == "LOST":
        return Cause("LOST", detail, evidence)
    slurms = _batch_log(records) or _accounting(records)
    if slurms is not None:
        return Cause(slurms.kind, f"{detail}; {slurms.detail}", (*slurms.evidence, *evidence), where=slurms.where)
    if item.kind == "TIMEOUT":
        return Cause("TIMEOUT", detail, (Evidence("event task_ended", item.next),))
    if item.ended is not None and was_warned(item.ended - item.started, records.limit_seconds, records.grace_seconds):
        return Cause("TIMEOUT", detail, evidence, certain=False)
    if not records.on_slurm:
        return Cause("CANCELLED", detail, evidence, certain=False)
    return Cause("PREEMPTED", detail, evidence, certain=False)


def _batch_log(records: Records) -> Cause | None:
    """Slurm's own words about the job."""
    for pattern, kind, words in (
        (TIME_LIMIT, "TIMEOUT", "Slurm ended it at its time limit"), (PREEMPTION, "PREEMPTED", "Slurm took its place for another job"),
        (NODE_FAILURE, "NODE_FAIL", "its node failed"),
    ):  # fmt: skip
        match = pattern.search(records.batch)
        if match:
            return Cause(kind, words, (Evidence("batch log", match[0].strip()),))  # type: ignore[arg-type]
    memory = _strong(Evidence("batch log", records.batch))
    if memory is not None:
        return memory
    match = SCANCEL.search(records.batch)
    return Cause("CANCELLED", "the job was cancelled", (Evidence("batch log", match[0].strip()),)) if match else None


def _accounting(records: Records) -> Cause | None:
    row = records.row
    kind = STATES.get(row.state) if row is not None else None
    if row is None or kind is None:
        return None
    words = {
        "OOM": "it needed more memory than it had asked for", "TIMEOUT": "it was still at work at its time limit", "PREEMPTED": "Slurm gave its place to another job",
        "NODE_FAIL": f"its node failed: {row.node_list}", "CANCELLED": "somebody or something cancelled the job",
    }  # fmt: skip
    return Cause(kind, words[kind], (_said_by_accounting(row),), where="host" if kind == "OOM" else "")


def _rank_log(records: Records) -> Cause | None:
    lines = "\n".join(records.rank_lines)
    found = _strong(Evidence(records.rank_log, lines))
    if found is not None:
        return found
    match = RENDEZVOUS.search(lines)
    if match:
        return Cause("RENDEZVOUS", _line_of(lines, match), (Evidence(records.rank_log, _line_of(lines, match)),))
    return None


def _no_room(records: Records) -> Cause | None:
    """On a full disk nobody can write down why he failed."""
    if records.no_room is None:
        return None
    return Cause("DISK_FULL", f"{records.no_room}: the disk is full, it could not even tell why it ended", (Evidence("free space", "none"),), certain=False)


def _exit_code(records: Records) -> Cause:
    code, row = records.exit_code, records.row
    if records.cancelled:
        return Cause("CANCELLED", "`medgen cancel` ended it", (Evidence("event cancelled", "while it was at work"),))
    if code in KILLED or (row is not None and row.signal == 9):
        return Cause("OOM", "killed by SIGKILL without a word: most often the memory limit", (Evidence("exit code", "137, which is SIGKILL"),), False, "host")
    if code is None and records.on_slurm:
        return Cause("NODE_FAIL", "it stopped without a word: its node failed, or everything was killed at once", (), certain=False)
    if code is None:
        return Cause("LOST", "it stopped without a word: its supervisor was killed, or the machine went down")
    kind: Kind = "INPUT" if code == Exit.BAD_INPUT and records.stage_kind != "command" else "USER"
    ended = f"exit code {code}" if code else "exit code 0, but no outcome that verifies"
    last = _last(list(records.rank_lines))
    return Cause(kind, f"{ended}: {last}" if last else ended, (Evidence(records.rank_log, last),) if last else ())


def _last(lines: list[str]) -> str:
    return next((line.strip() for line in reversed(lines) if line.strip() and not OWN_LINE.match(line)), "")[:300]


def _line_of(text: str, match: re.Match[str]) -> str:
    """The whole line in which something was found."""
    start, end = text.rfind("\n", 0, match.start()) + 1, text.find("\n", match.end())
    return text[start : end if end >= 0 else len(text)].strip()[:300]
