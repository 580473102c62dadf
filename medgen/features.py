"""The features stage: one task's share of the features that an evaluate stage compares, kept for it in the cache. Called by task.py.

What the cache already holds is not taken again, so that a task that was cut goes on; the evaluate stage takes what is missing still."""

from __future__ import annotations

import numpy as np

from medgen import collected, files
from medgen.evaluate import feature_scores, privacy
from medgen.evaluate.features import Bench
from medgen.evaluate.features import features as features_of
from medgen.evaluate.run import sides_of_stage
from medgen.plan import collect_name
from medgen.spec_evaluate import EvaluateStage
from medgen.task import Done, Work


def features(work: Work) -> Done:
    """Every n-th image of either side, of every picture that the network sees."""
    stage = EvaluateStage.model_validate(work.plan.stage(work.stage.settings["of"]).settings)
    work.require(collect_name(stage.of))
    bench = Bench(work.run.cache, work.say, work.progress)
    with collected.made_again_if_damaged(work.run, stage.of):
        sides = sides_of_stage(work.run, work.plan, stage, work.run.cache, work.say)
        need = feature_scores.needed(sides)
        taken = 0
        if need.parts:
            searched = privacy.passes_of(sides)
            for name in need.sides.pictures:
                extractor = feature_scores.extractor_of(need.sides, name, stage, bench)
                compared = zip(feature_scores.pictures_of(need.sides, name), (need.real_rows, need.synthetic_positions), strict=True)
                for pictures, rows in (*compared, *searched.get(name, ())):
                    share: np.ndarray = rows[work.task.shard :: len(work.stage.tasks)]
                    features_of(extractor, pictures, share, bench)
                    taken += len(share)
                    work.say(f"{name}: {len(share)} of {len(rows)} images")
    receipt = work.run.task_result(work.stage.name, work.task.shard)
    files.write_json(receipt, {"images": taken})
    return Done([receipt], {"images": taken})
