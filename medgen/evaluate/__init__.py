"""Scores of a generated dataset against real, patient-disjoint data. Called by task.py; report reads the result.

Start at run.evaluate_run; one file per group of metrics: paired, distributions, by_class; curves for the charts."""

from __future__ import annotations

from medgen import files
from medgen.plan import collect_name
from medgen.task import Done, Work


def evaluate(work: Work) -> Done:
    """One evaluate stage: writes metrics.json. The facts are the scores by name, for watch and the outcome."""
    from medgen.evaluate import scores
    from medgen.evaluate.run import evaluate_run

    work.require(collect_name(work.stage.settings["of"]))
    written = evaluate_run(work.run, work.stage.name, work.run.cache, work.say, work.progress)
    found = scores.from_json(files.read_json(written[0])["scores"])
    return Done(written, {f"{score.metric} {score.channel}": round(score.value, 5) for score in found if score.is_headline})
