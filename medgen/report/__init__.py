"""One self-contained HTML page about a run. Called by task.py; renders what the other stages wrote and computes no score.

Start at build.build_report; pictures.py and charts.py draw, gather.py collects the facts, template.html is the page."""

from __future__ import annotations

from medgen.task import Done, Work


def report(work: Work) -> Done:
    """One report stage: writes report/index.html."""
    from medgen.report.build import build_report

    return Done(build_report(work.run, work.stage.name, work.run.cache, work.say))
