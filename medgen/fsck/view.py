"""The screen of `medgen fsck`: a line per part, what is wrong and what comes of it, what is safe to delete. Called by fsck."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from medgen.fsck.leftovers import Leftover
from medgen.fsck.verify import FOLDERS, Part
from medgen.watch.why_view import console, write

if TYPE_CHECKING:
    from medgen.fsck import Examined

MARKS = {"whole": ("✔", "green"), "told": ("✔", "yellow"), "working": ("▶", "cyan"), "unfinished": ("◦", "bright_black"), "damaged": ("✗", "red")}
SHOWN = 8  # damages of one part, and leftovers of one kind; the JSON has them all


def show(found: Examined, cleaned: list[Leftover] | None) -> None:
    out = console()
    out.print(_title(found))
    out.print()
    out.print(_table(found.parts))
    for part in found.damaged:
        _show_damage(out, part)
    if found.at_work is not None:
        out.print()
        works, until = ("works", "that has ended") if found.at_work_is_certain else ("may work", "that can be told")
        write(out, f"Somebody {works} on this run now: {found.at_work}. Nothing is called safe to delete until {until}.", indent=0)
    elif cleaned is not None:
        _show_cleaned(out, cleaned)
    else:
        _show_safe(out, found)
    for note in found.notes:
        out.print()
        write(out, note, "bright_black", indent=0)


def _title(found: Examined) -> Text:
    states = {part.state for part in found.parts}
    count = sum(len(part.problems) for part in found.parts)
    if count:
        words, style = f"{count} damage{'s' if count > 1 else ''} found", "red"
    elif "unfinished" in states or "working" in states:
        words, style = "everything that is done verifies", "green"
    else:
        words, style = "everything verifies", "green"
    read = f"{found.files_read:,} files, {size(found.bytes_read)} read in {found.seconds:.0f} s"
    return Text.assemble((found.run_id, "bold"), "   ", (words, style), "   ", (read, "bright_black"))


def _table(parts: list[Part]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    for _ in range(2):
        table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for part in parts:
        mark, style = MARKS[part.state]
        table.add_row(Text(f"  {mark}", style=style), Text(part.name), Text(part.text, style="bright_black" if part.state == "unfinished" else ""))
    return table


def _show_damage(out: Console, part: Part) -> None:
    out.print()
    for problem in part.problems[:SHOWN]:
        write(out, f"✗ {part.name}: {problem.what}", "red", indent=0)
        write(out, f"→ the next submit: {problem.next}", indent=2)
        if problem.command is not None:
            out.print(Text(f"    {problem.command}", style="cyan"), soft_wrap=True)
    if len(part.problems) > SHOWN:
        out.print(f"  … and {len(part.problems) - SHOWN} more of {part.name}; --json has them all")


def _show_safe(out: Console, found: Examined) -> None:
    out.print()
    if any(part.name == "plan" and part.state != "whole" for part in found.parts):
        out.print("Without its plan nothing of a run is called safe to delete.")
        return
    if any(part.name == FOLDERS for part in found.parts):
        out.print("While a folder cannot be read nothing of a run is called safe to delete.")
        return
    if not found.safe:
        out.print("Nothing is left over that could be deleted.")
        return
    out.print(Text.assemble("Safe to delete: ", (size(sum(item.size_bytes for item in found.safe)), "bold"), f"   medgen fsck {found.run_id} --clean"), soft_wrap=True)
    _list(out, found.safe)


def _list(out: Console, items: list[Leftover]) -> None:
    """By reason; the long path of one is never broken, so that it can be copied."""
    for why in dict.fromkeys(item.why for item in items):
        alike = [item for item in items if item.why == why]
        out.print(Text(f"  {why}{', is emptied' if alike[0].is_emptied else ''}", style="bright_black"), soft_wrap=True)
        for item in alike[:SHOWN]:
            out.print(Text(f"    {size(item.size_bytes):>10}  {item.path}"), soft_wrap=True)
        if len(alike) > SHOWN:
            rest = alike[SHOWN:]
            out.print(f"    {size(sum(item.size_bytes for item in rest)):>10}  … {len(rest)} more")


def _show_cleaned(out: Console, cleaned: list[Leftover]) -> None:
    done = [item for item in cleaned if item.problem is None]
    out.print()
    if not cleaned:
        out.print("Nothing was left over that could be deleted.")
        return
    out.print(Text.assemble(f"Deleted {len(done)} leftover{'s' if len(done) != 1 else ''}: ", (size(sum(item.size_bytes for item in done)), "bold"), " freed"))
    _list(out, done)
    for item in cleaned:
        if item.problem is not None:
            write(out, f"✗ could not be deleted: {item.problem}", "red", indent=2)


def size(size_bytes: int) -> str:
    """`812 B`, `3.4 MiB`."""
    amount = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" or amount >= 100 else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:,.1f} TiB"
