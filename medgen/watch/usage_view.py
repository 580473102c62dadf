"""The table of `medgen usage`: a row per stage with what fits into the width, then what was lost and what to ask for instead."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from medgen.watch.advice import size
from medgen.watch.usage import StageUsage, Usage, wasted
from medgen.watch.view import duration
from medgen.watch.why_view import NAMES, console, write

WIDE_COLUMNS = 110


def show(record: Usage) -> None:
    out = console()
    has_gpus = any(stage.unit == "GPU-hours" for stage in record.stages)
    out.print(_title(record, has_gpus))
    out.print()
    out.print(_table(record, has_gpus, out.width >= WIDE_COLUMNS))
    for line in _losses(record):
        out.print(line)
    for note in record.notes:
        out.print()
        write(out, note, "bright_black", indent=0)
    if record.hints:
        out.print()
        write(out, "→ Several times more memory is asked for than was ever used; jobs that ask for less may start sooner:", indent=0)
    for hint in record.hints:
        option, _, fact = hint.partition("  ")
        out.print(Text.assemble(("    ", ""), (option, "cyan"), "  ", (fact, "bright_black")), soft_wrap=True)


def _title(record: Usage, has_gpus: bool) -> Text:
    gpu_hours, cpu_hours = sum(stage.gpu_hours for stage in record.stages), sum(stage.cpu_hours for stage in record.stages)
    amounts = f"{hours(gpu_hours)} GPU-hours, {hours(cpu_hours)} CPU-hours" if has_gpus else f"{hours(cpu_hours)} CPU-hours"
    so_far = f" so far, {record.running} running" if record.running else ""
    return Text.assemble((record.run_id, "bold"), f"   {amounts}{so_far}   ", (f"from {'Slurm accounting' if record.source == 'accounting' else 'the events'}", "bright_black"))


def _table(record: Usage, has_gpus: bool, wide: bool) -> Table:
    table = Table(box=None, header_style="bright_black", padding=(0, 0, 0, 2), pad_edge=False)
    table.add_column("stage", no_wrap=True)
    table.add_column("done", justify="right", no_wrap=True)
    table.add_column("tries", justify="right", no_wrap=True)
    if has_gpus:
        table.add_column("GPU-h", justify="right", no_wrap=True)
    table.add_column("CPU-h", justify="right", no_wrap=True)
    for name in ("lost", "CPU", "memory", "waited"):
        table.add_column(name, justify="right", no_wrap=True)
    with_images = any(stage.images is not None for stage in record.stages)
    if wide and with_images:
        table.add_column("images", justify="right", no_wrap=True)
        table.add_column("per GPU-h" if has_gpus else "per CPU-h", justify="right", no_wrap=True)
    for stage in record.stages:
        cells = [stage.name, f"{stage.done}/{stage.tasks}", str(stage.attempts) if stage.attempts else ""]
        cells += [hours(stage.gpu_hours) if stage.gpu_hours else ""] if has_gpus else []
        cells += [hours(stage.cpu_hours) if stage.attempts else "", _lost(stage), _share(stage.cpu_efficiency), _memory(stage, wide), _waited(stage)]
        if wide and with_images:
            cells += [str(stage.images) if stage.images else "", _speed(stage)]
        table.add_row(*cells, style="" if stage.attempts else "bright_black")
    return table


def _losses(record: Usage) -> list[Text]:
    """What was lost in all, by cause."""
    lines = []
    for unit in ("GPU-hours", "CPU-hours"):
        total = wasted(record, unit)
        used = sum(stage.hours for stage in record.stages if stage.unit == unit)
        if total and used:
            causes = ", ".join(f"{NAMES[kind]} {hours(amount)}" for kind, amount in total.items())
            lost = sum(total.values())
            lines += [Text(), Text.assemble((f"lost: {hours(lost)} {unit}", "yellow"), f" ({lost / used:.0%}): {causes}")]
    return lines


def hours(amount: float) -> str:
    """Three digits, so that a demonstration of minutes and a run of weeks both say something."""
    if amount >= 100:
        return f"{amount:.0f}"
    return f"{amount:.1f}" if amount >= 10 else f"{amount:.2f}" if amount >= 0.1 or amount == 0 else f"{amount:.3f}"


def _lost(stage: StageUsage) -> str:
    lost = sum(stage.wasted_hours.values())
    return f"{lost / stage.hours:.0%}" if lost and stage.hours else ""


def _share(fraction: float | None) -> str:
    return "" if fraction is None else f"{fraction:.0%}"


def _memory(stage: StageUsage, wide: bool) -> str:
    if stage.memory_efficiency is None or stage.used_mebibytes is None or stage.asked_mebibytes is None:
        return ""
    return f"{size(stage.used_mebibytes)} of {size(stage.asked_mebibytes)}" if wide else f"{stage.memory_efficiency:.0%}"


def _waited(stage: StageUsage) -> str:
    return "" if stage.wait_seconds is None else duration(stage.wait_seconds)


def _speed(stage: StageUsage) -> str:
    return "" if stage.images_per_hour is None else f"{stage.images_per_hour:,.0f}"
