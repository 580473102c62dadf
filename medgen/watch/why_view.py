"""The screen of `medgen why`: what failed, the records that say so, the last lines, what to do. Called by why.py."""

from __future__ import annotations

import shutil
import textwrap
from itertools import pairwise

from rich.console import Console
from rich.text import Text

from medgen.watch.view import shortened
from medgen.watch.why import Diagnosis, Finding

PLAIN_COLUMNS = 120
NAMES = {
    "OOM": "out of memory", "TIMEOUT": "time limit", "PREEMPTED": "preempted", "NODE_FAIL": "node failure", "SETUP": "set-up failed", "NAN": "not a number",
    "DISK_FULL": "disk full", "RENDEZVOUS": "ranks did not meet", "CANCELLED": "cancelled", "LOST": "nobody saw its end", "DEPENDENCY": "blocked", "INPUT": "wrong input", "USER": "failed",
}  # fmt: skip


def console() -> Console:
    """As wide as the terminal, or $COLUMNS; 120 where there is neither."""
    return Console(width=shutil.get_terminal_size((PLAIN_COLUMNS, 24)).columns, highlight=False, soft_wrap=False)


def show(diagnosis: Diagnosis) -> None:
    out = console()
    out.print(_title(diagnosis))
    blocked = [finding for finding in diagnosis.findings if finding.cause.kind == "DEPENDENCY"]
    for finding in diagnosis.findings:
        if finding.cause.kind != "DEPENDENCY":
            _show_finding(out, finding)
    if blocked:
        out.print()
        for finding in blocked:
            out.print(Text.assemble(("○ ", "bright_black"), (where(finding), "bold"), f"  DEPENDENCY  {finding.cause.detail}"))
        if len(blocked) == len(diagnosis.findings):
            _show_advice(out, blocked[0].advice)
    if diagnosis.again:
        out.print()
    for finding in diagnosis.again:
        attempt = f"attempt {finding.attempt}: " if finding.attempt is not None else ""
        out.print(Text.assemble(("↻ ", "yellow"), (where(finding), "bold"), f"  {attempt}{_name(finding)}, goes on; {finding.cause.detail}"), no_wrap=True, overflow="ellipsis")
    for note in diagnosis.notes:
        out.print()
        write(out, note, "bright_black", indent=0)


def _title(diagnosis: Diagnosis) -> Text:
    done = f"{diagnosis.done} of {diagnosis.tasks} tasks done"
    if diagnosis.findings:
        return Text.assemble((diagnosis.run_id, "bold"), f"   {done}")
    if diagnosis.done == diagnosis.tasks:
        words = "everything is done"
    elif diagnosis.alive:
        words = f"nothing is wrong; {done}, the rest runs or waits its turn"
    else:
        words = f"nothing is wrong; {done}, the rest was not started yet"
    return Text.assemble((diagnosis.run_id, "bold"), f"   {words}")


def where(finding: Finding) -> str:
    """`train`, or `images shards 3, 5-9` of a stage with several."""
    if finding.tasks == 1:
        return finding.stage
    runs: list[list[int]] = []
    for shard in sorted(finding.shards):
        if runs and shard == runs[-1][1] + 1:
            runs[-1][1] = shard
        else:
            runs.append([shard, shard])
    parts = [str(first) if first == last else f"{first}-{last}" for first, last in runs[:6]]
    more = f" and {sum(last - first + 1 for first, last in runs[6:])} more" if len(runs) > 6 else ""
    return f"{finding.stage} shard{'s' if len(finding.shards) > 1 else ''} {', '.join(parts)}{more}"


def _show_finding(out: Console, finding: Finding) -> None:
    cause = finding.cause
    out.print()
    out.print(Text.assemble(("✘ ", "bold red"), (where(finding), "bold"), "  ", (_name(finding), "bold red"), f"  {NAMES[cause.kind]}"))
    write(out, cause.detail)
    for item in cause.evidence:
        if item.said not in cause.detail:
            write(out, f"{item.record}: {item.said}", "bright_black")
    facts = [f"attempt {finding.attempt}" if finding.attempt is not None else "", f"job {finding.job_id}" if finding.job_id else "", f"on {finding.node}" if finding.node else ""]
    place = ", ".join(fact for fact in facts if fact)
    if finding.log:
        path = shortened(finding.log)
        out.print(Text(f"  {place}: {path}" if place else f"  {path}", style="bright_black"), soft_wrap=True)
    for line in finding.lines:
        out.print(Text.assemble(("  │ ", "red"), (line, "bright_black")), no_wrap=True, overflow="ellipsis")
    _show_advice(out, finding.advice)


def _name(finding: Finding) -> str:
    cause = finding.cause
    return cause.kind + (f" ({cause.where})" if cause.where else "") + ("" if cause.certain else ", probably")


def _show_advice(out: Console, advice: tuple[str, ...]) -> None:
    """Words are wrapped; what is to be copied stays one line however long, as a terminal wraps it."""
    for line, following in pairwise((*advice, "")):
        if _is_verbatim(line):
            out.print(Text(f"    {line}", style="cyan"), soft_wrap=True)
        else:
            style = "" if _is_verbatim(following) else "bright_black"
            write(out, f"→ {line}", style)


def _is_verbatim(line: str) -> bool:
    return line.startswith(("medgen ", " "))


def write(out: Console, text: str, style: str = "", indent: int = 2) -> None:
    """Wrapped, further lines below the first; no spaces at the ends of lines, which a file would keep."""
    for line in textwrap.wrap(text, max(20, out.width - indent), break_on_hyphens=False):
        out.print(Text(f"{' ' * indent}{line}", style=style), soft_wrap=True)
