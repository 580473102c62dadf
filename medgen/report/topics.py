"""Which question a metric answers: the order and the headings of every table of scores. Used by evaluations.py, summary.py and card.py."""

from __future__ import annotations

from dataclasses import dataclass

from medgen.evaluate.scores import MEANINGS, Meaning, Score


@dataclass(frozen=True)
class Topic:
    """`metrics` in the order in which they are shown; one that ends with _ stands for all that begin so."""

    name: str
    title: str
    metrics: tuple[str, ...]


TOPICS = (
    Topic("distribution", "As a set, are they like real ones?", ("kid", "fid", "fd", "fd_small_n", "cmmd", "swd", "precision", "density")),
    Topic("texture", "Is the texture right?", ("psd",)),
    Topic("regions", "Are the values in each region right?", ("region_mean", "region_spread", "region_distance")),
    Topic("diversity", "Are they as varied?", ("recall", "coverage", "ms_ssim_diversity", "ssim_pairs", "lpips_diversity")),
    Topic("pairs", "Is each like its real partner?", ("mae", "mae_foreground", "mae_lesion", "mse", "psnr", "ssim", "ms_ssim", "lpips", "registration", "dice", "iou", "hd95")),
    Topic("classes", "Are the classes told apart?", ("auc_real", "auc_synthetic")),
    Topic("copies", "Do they repeat training images?", ("near_train", "near_train_features", "closer_to_train", "authentic", "membership_")),
    Topic("structure", "Do they show what their masks say?", ("structure_",)),
    Topic("utility", "Can a network learn from them?", ("utility_",)),
    Topic("other", "Other scores", ("",)),
)
FIDELITY = ("distribution", "texture", "regions", "diversity", "pairs")


def topic_of(metric: str) -> Topic:
    return next(topic for topic in TOPICS if _place(topic, metric) is not None)


def in_order(found: list[Score]) -> list[Score]:
    """By topic, then in the order of its metrics; scores of one metric stay as they were."""
    return sorted(found, key=lambda item: (TOPICS.index(topic_of(item.metric)), _place(topic_of(item.metric), item.metric) or 0))


def _place(topic: Topic, metric: str) -> int | None:
    return next((place for place, name in enumerate(topic.metrics) if name == metric or ((name.endswith("_") or not name) and metric.startswith(name))), None)


def meaning_of(item: Score) -> Meaning:
    """Its words; the name alone of a metric that another version of medgen wrote."""
    if item.metric in MEANINGS:
        return MEANINGS[item.metric]
    return Meaning(item.metric.replace("_", " "), item.unit, item.better, "Written by another version of medgen, which says what it means.", "")
