"""What a metric reports, and what each metric means in plain words. Filled by evaluate, rendered by report."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from medgen.errors import MedgenError

Better = Literal["lower", "higher", "closer to floor"]
Comparison = Literal["real-real", "real-synthetic", "synthetic-synthetic"]
COMPARISONS: tuple[Comparison, ...] = get_args(Comparison)
METRICS_FILE = "metrics.json"
METRICS_SCHEMA = 2  # 1 had no group and no comparison: it is read as well


@dataclass(frozen=True)
class Score:
    """One number with what is needed to read it.

    `floor` is the same metric between real images and other real images; `ci` a 95% interval or None when there are too
    few patients to give one (the protocol says so); `protocol` names everything that changes the number. A metric that is also
    reported between real and real, and synthetic and synthetic images says which in `comparison`; `group` is a class, None all."""

    metric: str
    channel: str
    value: float
    ci: tuple[float, float] | None
    floor: float | None
    n: int
    unit: str
    better: Better
    protocol: str
    group: str | None = None
    comparison: Comparison | None = None

    @property
    def name(self) -> str:
        """What tells it from the other scores of a stage."""
        return " ".join(word for word in (self.metric, self.channel, self.comparison, self.group) if word)

    @property
    def is_headline(self) -> bool:
        """What stands for the dataset as a whole, in tables with one row per metric."""
        return self.group is None and self.comparison in (None, "real-synthetic")


@dataclass(frozen=True)
class Meaning:
    """A metric in words: title for the table, what it measures, how to read the value next to its floor."""

    title: str
    unit: str
    better: Better
    measures: str
    reading: str


BEAT_THE_FLOOR = (
    "The floor is what the nearest slice of another real patient scores. Better than the floor means that the image "
    "follows its own patient and not just any patient; a mask does not fix the anatomy, so a large gap is not to be expected."
)

FRECHET_READING = (
    "The floor is the same between different real patients with as many images: the value of a perfect model at this number. Any "
    "other number of images, extractor or data gives values that cannot be compared with it."
)

NEIGHBOUR_READING = (
    "For reading beside its floor only, what real images of other patients give: the value depends on the number of images and the extractor, and on a few "
    "unusual images."
)

MASK_READING = "The floor is what the mask of another real patient scores. Small structures have lower values for the same outline error."

COPIES_READING = (
    "The floor is that share for the held-out slices, about 1%: so many are suspected by chance. Much more points to copied training images; look at "
    "the nearest pairs. Nothing found means no copies at this threshold, of the kinds that this comparison sees."
)

CEILING = (
    "The floor is what the same segmenter reaches on real held-out images: more is not to be had. The shuffled control says what chance gives. "
    "Published bands (above 0.7 is good) say nothing, as small structures reach less in real images, too."
)

ARM = (
    "Each group is an arm: what it was trained on, with the same number of steps. Compare with real, and with duplicated and augmented, which cost nothing; "
    "the difference to real, its interval and what could have been seen stand beside."
)

MEANINGS: dict[str, Meaning] = {
    "mae": Meaning(
        "Mean absolute error", "of the window", "lower",
        "Average difference per pixel between a synthetic slice and the real slice whose mask it was given.",
        BEAT_THE_FLOOR,
    ),
    "mae_foreground": Meaning(
        "Mean absolute error inside the head", "of the window", "lower",
        "The same, only where the real slice is not background. Empty background flatters the error over the whole slice.",
        BEAT_THE_FLOOR,
    ),
    "mae_lesion": Meaning(
        "Mean absolute error inside the mask", "of the window", "lower",
        "The same, only inside the mask: errors of a small lesion vanish in an average over the slice.",
        BEAT_THE_FLOOR,
    ),
    "psnr": Meaning(
        "Peak signal-to-noise ratio", "dB", "higher",
        "Squared error per pixel on a logarithmic scale, against a fixed data range of 1.",
        BEAT_THE_FLOOR,
    ),
    "ssim": Meaning(
        "Structural similarity", "", "higher",
        "Agreement of local brightness, contrast and structure between a synthetic slice and its real partner; 1 is identical.",
        BEAT_THE_FLOOR,
    ),
    "ms_ssim": Meaning(
        "Multi-scale structural similarity", "", "higher",
        "Structural similarity over several resolutions; 1 is identical.",
        BEAT_THE_FLOOR,
    ),
    "ms_ssim_diversity": Meaning(
        "Similarity within the set", "", "closer to floor",
        "Multi-scale structural similarity between random pairs of different images of one set.",
        "The floor is the same between slices of different real patients. Higher than the floor: the images resemble each "
        "other more than real ones do (mode collapse). Lower is no merit: noise scores low as well.",
    ),
    "swd": Meaning(
        "Sliced Wasserstein distance", "SD of real patches", "lower",
        "Distance between the distributions of small patches, from coarse shape to fine texture; needs no trained network.",
        "The floor is the distance between two groups of different real patients. At the floor, patches cannot be told "
        "from real ones; several times the floor is a visible difference (blur, noise, wrong contrast).",
    ),
    "fid": Meaning(
        "FID", "", "lower",
        "Frechet distance between the Inception features of real and synthetic images: of their means and of how they vary.",
        FRECHET_READING,
    ),
    "fd": Meaning(
        "Frechet distance", "", "lower",
        "Distance between the features of real and synthetic images: of their means and of how they vary. Not called FID: that takes "
        "published Inception features of at least 10,000 images a side.",
        FRECHET_READING,
    ),
    "fd_small_n": Meaning(
        "Frechet distance (small n)", "", "lower",
        "The same from fewer images than give a value of its own. Most of the number is then the lack of images, not the model.",
        FRECHET_READING,
    ),
    "kid": Meaning(
        "Kernel distance (KID)", "", "closer to floor",
        "Squared distance between the features of real and synthetic images in the space of a cubic kernel, without the bias of a small set.",
        "The floor is the distance between different real patients. Near 0 and near the floor: the extractor sees no difference; "
        "small negative values are chance. Compare only values of the same extractor.",
    ),
    "cmmd": Meaning(
        "Gaussian kernel distance (CMMD-style)", "", "closer to floor",
        "Squared distance between the features of real and synthetic images, with the kernel and scale of CMMD. Comparable with published values for CLIP features only.",
        "As for the kernel distance above. With this wide a kernel it is mostly the distance between the mean features.",
    ),
    "precision": Meaning(
        "Precision", "share of images", "closer to floor",
        "Share of synthetic images that lie among the real ones: within the distance to the 5th nearest neighbour of some real image.",
        NEIGHBOUR_READING,
    ),
    "recall": Meaning(
        "Recall", "share of images", "closer to floor",
        "Share of real images that lie among the synthetic ones: what the model can make at all.",
        NEIGHBOUR_READING,
    ),
    "density": Meaning(
        "Density", "", "closer to floor",
        "In how many neighbourhoods of real images a synthetic image lies, on average, over 5. Unlike precision, one stray real image does not move it much.",
        NEIGHBOUR_READING,
    ),
    "coverage": Meaning(
        "Coverage", "share of images", "closer to floor",
        "Share of real images with a synthetic one nearer than their own 5th nearest real neighbour.",
        NEIGHBOUR_READING + " Images drawn from one distribution on both sides, all independent, give 0.97.",
    ),
    "mse": Meaning(
        "Mean squared error", "of the window squared", "lower",
        "Average squared difference per pixel between a synthetic image and its real partner: large errors count more than small ones.",
        BEAT_THE_FLOOR,
    ),
    "psd": Meaning(
        "Power-spectrum distance", "dB", "lower",
        "Difference of the radially averaged power spectra of real and synthetic images, root mean square over spatial frequencies. Needs no trained network.",
        "The floor is the difference between two groups of real patients. Above it the texture is wrong: too smooth (missing high frequencies), noisy or striped.",
    ),
    "registration": Meaning(
        "Distance between the channels", "mm", "closer to floor",
        "How far the two images of one slice lie from each other: the shift at which their edges agree best, averaged over the images.",
        "The floor is that of the real slices, whose edges differ with the contrast as well. Above it: the images of a pair do not show the same anatomy.",
    ),
    "lpips": Meaning(
        "LPIPS", "", "lower",
        "Distance between the features of a synthetic image and its real partner, weighted as people judge differences between photographs; 0 is identical.",
        BEAT_THE_FLOOR,
    ),
    "lpips_diversity": Meaning(
        "LPIPS within the set", "", "closer to floor",
        "LPIPS between random pairs of different images of one set.",
        "The floor is the same between slices of different real patients. Lower than the floor: the images resemble each other more than real ones do. Higher "
        "is no merit: noise is far from everything.",
    ),
    "dice": Meaning("Dice", "", "higher", "Overlap of two masks that belong together: twice the common area over the sum of both.", MASK_READING),
    "iou": Meaning("Intersection over union", "", "higher", "Overlap of two masks that belong together: common area over the area of both.", MASK_READING),
    "hd95": Meaning(
        "HD95", "mm", "lower", "95th percentile of the distances between the outlines of two masks that belong together.", MASK_READING
    ),
    "region_mean": Meaning(
        "Mean value in a region", "of the window", "closer to floor",
        "The value of an image in a region is the mean over its pixels; this is the mean of that over the images of a class, or of the difference of two regions within each.",
        "The floor is that of real images. The interval holds the uncertainty of both sides: where it leaves out the floor, the values are wrong on average.",
    ),
    "region_spread": Meaning(
        "Spread of the value in a region", "of the window", "closer to floor",
        "Standard deviation between images of the value of each in a region.",
        "The floor is that of real images, and the ratio of both is told in words. Below the floor: patients differ more than the images do, however right their mean is.",
    ),
    "region_distance": Meaning(
        "Distance of the values in a region", "of the window", "lower",
        "Wasserstein distance between the values of real and of synthetic images in a region: by how much one side must be moved, on average, to become the other.",
        "The floor is the same between different real patients at the same number of images. Mean and spread say in what they differ.",
    ),
    "auc_real": Meaning(
        "Real images classified (AUC)", "", "higher",
        "Area under the ROC curve of the model's own classes of real images that it was not trained on, one class against the rest.",
        "1: the classes never overlap; 0.5: no better than guessing. It says that the model has learned what tells the classes apart.",
    ),
    "auc_synthetic": Meaning(
        "Synthetic images classified (AUC)", "", "higher",
        "The same for the synthetic images: does the model take each for the class that it was made as?",
        "The judge is the one that the images were trained to please, so a high value proves little; a low one says that the classes are mixed up.",
    ),
    "ssim_pairs": Meaning(
        "Similarity of random pairs", "", "closer to floor",
        "Structural similarity between random images of one class that do not belong together.",
        "The floor is that of pairs of different real patients. Synthetic pairs well above it: the images of a class resemble each "
        "other more than patients do (mode collapse). Real and synthetic well below it: they look different.",
    ),
    "near_train": Meaning(
        "Suspected copies (pixels)", "share of images", "lower",
        "Share of synthetic images that single out one training patient: the nearest training slice is so much nearer than the "
        "nearest slice of any other training patient that 99% of held-out real slices show less. Position, mirroring, brightness and contrast do not count.",
        COPIES_READING,
    ),
    "near_train_features": Meaning(
        "Suspected copies (features)", "share of images", "lower",
        "The same by the features of an extractor, whitened by the training slices.",
        COPIES_READING,
    ),
    "closer_to_train": Meaning(
        "Closer to training slices than unseen patients are", "", "closer to floor",
        "How often a random synthetic image is nearer to its nearest training slice than a random held-out real slice is to its own.",
        "0.5: as near as unseen patients are. Well above: the images are drawn towards the training patients; so are blurred ones, "
        "which are near to everything, so look at suspected copies as well.",
    ),
    "authentic": Meaning(
        "Authentic images", "share of images", "closer to floor",
        "Share of synthetic images that are further from their nearest training slice than that slice is from every other training patient.",
        "The floor is the same of held-out real slices. Well below it: many images are nearer to one training patient than patients are to each other.",
    ),
    "membership_auc": Meaning(
        "Membership inference (AUC)", "", "closer to floor",
        "Can an attacker tell training patients from patients whom the model has not seen? Area under the ROC curve of the attack.",
        "0.5: no better than guessing. An interval above 0.5: something of the training patients is given away. A weak attack proves little; a better one may exist.",
    ),
    "membership_tpr": Meaning(
        "Membership inference (found at 1% false alarms)", "share of members", "closer to floor",
        "The share of training members that the attack names while it wrongly names 1% of the others: what matters if a few people are exposed.",
        "The floor is guessing.",
    ),
    "structure_dice": Meaning(
        "Structure consistency (Dice)", "", "higher",
        "Overlap of what a segmenter, trained on real images only, finds in a synthetic image with the mask that this image was drawn on.",
        CEILING,
    ),
    "structure_iou": Meaning("Structure consistency (IoU)", "", "higher", "The same as intersection over union.", CEILING),
    "structure_hd95": Meaning(
        "Structure consistency (HD95)", "mm", "lower",
        "95th percentile of the distances between the outlines of what the segmenter finds and of the mask.",
        CEILING,
    ),
    "structure_dice_real": Meaning(
        "Segmenter on real images (Dice)", "", "higher", "What the segmenter reaches on real images that it was not trained on: the ceiling.",
        "Far below what is usual for such structures: train it longer before anything else here is read.",
    ),
    "structure_dice_shuffled": Meaning(
        "Shuffled control (Dice)", "", "higher", "The same synthetic images, held against the masks of others.",
        "What an image that ignores its mask would score. Only the part above it is agreement.",
    ),
    "structure_dice_ratio": Meaning(
        "Share of the ceiling", "", "higher", "Dice on the synthetic images, divided by Dice on real held-out ones.",
        "1: the masks are found in synthetic images as well as in real ones. Above 1: they are easier to find, which real lesions are not.",
    ),
    "structure_false_positives": Meaning(
        "Found where nothing was drawn", "share of images", "lower", "Of the synthetic images on empty masks, those in which the segmenter finds something.",
        "The floor is the same share of real held-out slices without a lesion.",
    ),
    "utility_balanced_accuracy": Meaning("Balanced accuracy of a classifier", "", "higher", "Mean over the classes of the share of real test images that is told right.", ARM),
    "utility_macro_f1": Meaning("Macro-F1 of a classifier", "", "higher", "Mean over the classes of the harmonic mean of precision and recall, on real test images.", ARM),
    "utility_auc": Meaning("AUC of a classifier", "", "higher", "Area under the ROC curve on real test images, one class against the rest, averaged.", ARM),
    "utility_dice": Meaning("Dice of a segmenter", "", "higher", "Mean over the real test slices that have a lesion, or show the region: of several regions each by itself, and their mean.", ARM),
    "utility_false_positives": Meaning("Found in empty slices", "share of slices", "lower", "Of the real test slices without a lesion, those in which the segmenter finds something.", ARM),
}


Skipped = str | None  # why something was left out
ScoresOrReason = tuple[list[Score], Skipped]


def score(metric: str, channel: str, value: float, interval: tuple[float, float] | None, floor: float | None, n: int,
          protocol: str, group: str | None = None, comparison: Comparison | None = None, unit: str | None = None) -> Score:
    """A Score with the direction of its metric, and its unit where that is always the same. Raises MedgenError if a number is not finite."""
    meaning = MEANINGS[metric]
    numbers = [value, *(interval or ()), *(() if floor is None else (floor,))]
    if not all(math.isfinite(number) for number in numbers):
        raise MedgenError(f"{metric} of {channel} is not a finite number ({numbers}); look at the images of this dataset")
    rounded = None if interval is None else (float(interval[0]), float(interval[1]))
    return Score(metric, channel, float(value), rounded, None if floor is None else float(floor), int(n), meaning.unit if unit is None else unit,
                 meaning.better, protocol, group, comparison)


def to_json(scores: list[Score]) -> list[dict[str, Any]]:
    return [asdict(item) for item in scores]


def from_json(records: list[dict[str, Any]]) -> list[Score]:
    return [Score(**{**record, "ci": None if record["ci"] is None else (record["ci"][0], record["ci"][1])}) for record in records]


CSV_COLUMNS = (
    "stage", "dataset", "metric", "channel", "group", "comparison", "value", "ci_low", "ci_high", "floor", "n", "unit", "better", "protocol",
)  # fmt: skip


def to_csv(records: Iterable[dict[str, Any]]) -> str:
    """Every score of these metrics.json as a line; nothing where a score has no group, comparison, interval or floor. Numbers are exact."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for record in records:
        for item in from_json(record["scores"]):
            writer.writerow([record["stage"], record["of"], item.metric, item.channel, item.group, item.comparison, item.value,
                             *(item.ci or (None, None)), item.floor, item.n, item.unit, item.better, item.protocol])  # fmt: skip
    return text.getvalue()
