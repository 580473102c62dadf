"""AUC of the model that made the images: does it tell real held-out images apart, and does it take its own for what they were made as? Used by run.py."""

from __future__ import annotations

import numpy as np

from medgen import spec
from medgen.evaluate import classification, intervals
from medgen.evaluate.classification import Classifier
from medgen.evaluate.inputs import Sides
from medgen.evaluate.maker import maker
from medgen.evaluate.scores import Score, ScoresOrReason, score
from medgen.plan import Plan
from medgen.rundir import RunDir

Images = dict[str, np.ndarray]


def auc_scores(run: RunDir, plan: Plan, sides: Sides) -> ScoresOrReason:
    """Of real images of the split that is compared with, and of the synthetic ones; or why there is none.

    Raises MedgenError if the checkpoint that made the images is not there any more."""
    source = plan.stage(plan.stage(sides.dataset.name).settings["from"])
    if not spec.family_config(source.settings["config"]).classifies:
        return [], f"the model of {source.name} does not tell classes apart"
    classifier = classification.load(maker(run, source.name, sides.dataset))
    real = {name: sides.store.images(name, sides.reference) for name in classifier.channels}
    images = {name: sides.dataset.read(name, sides.chosen) for name in classifier.channels}
    found = [
        _score("auc_real", classifier, real, sides.store.rows["label"].to_numpy()[sides.reference], sides.patients(sides.reference), "patient", sides),
        _score("auc_synthetic", classifier, images, sides.dataset.index["label"].to_numpy()[sides.chosen], sides.synthetic_groups(), "image", sides),
    ]
    missing = None if all(found) else f"some class has no image on one of the sides; the classes are {', '.join(classifier.classes)}"
    return [item for item in found if item is not None], missing


def _score(metric: str, classifier: Classifier, images: Images, names: np.ndarray, groups: np.ndarray, unit: str, sides: Sides) -> Score | None:
    """None if some class has no image."""
    labels = np.array([classifier.classes.index(name) for name in names])
    estimate = classification.auc_estimate(labels, classifier.predict(images), groups, sides.seed)
    if estimate.value is None:
        return None
    side = f"real {sides.against} split" if metric == "auc_real" else "synthetic set"
    protocol = f"class probabilities of the model itself, one class against the rest, averaged; {side}; {intervals.describe(groups, unit)}; seed {sides.seed}"
    return score(metric, ", ".join(classifier.channels), estimate.value, estimate.interval, None, len(labels), protocol)
