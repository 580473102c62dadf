"""One self-contained HTML page about a run, or about two folders. Called by task.py and two_folders.py; renders what was written and computes no score.

Start at build.build_report; pictures.py and charts.py draw, gather.py collects the facts, base.html is the frame of a page."""

from __future__ import annotations

from medgen.errors import InputError, Interrupted
from medgen.task import Done, Work


def report(work: Work) -> Done:
    """One report stage: writes report/index.html. Before the other stages are done the page is written, but the stage is not."""
    from medgen.report.build import build_report

    written = build_report(work.run, work.stage.name, work.run.cache, work.say)
    try:
        for needed in work.stage.needs:
            work.require(needed)
    except InputError as error:
        raise Interrupted(f"{written[0]} shows the run as it is now; {error}") from None
    return Done(written)
