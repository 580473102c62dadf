"""Are synthetic images copies of training slices? Nearest training slice, judged by held-out real slices. Used by privacy.py.

Works on rows of numbers, of pixels or of features; fidelity rises when a model memorises, so the evaluation never prints one without the other."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b

import numpy as np

COMPARED_PIXELS = 32
MOST_COMPONENTS = 64  # of whitened features; more are mostly grain, which a copy need not share
FEWEST_IMAGES_PER_COMPONENT = 4
WHITENING_FLOOR = 1e-3  # of the largest variance: what hardly varies in training must not decide
THRESHOLD_PERCENTILE = 1.0
FEWEST_HELD_OUT = 100  # a 1st percentile of fewer is their minimum
ITEM_BLOCK, TRAIN_BLOCK = 1024, 8192  # distances in memory at once


@dataclass(frozen=True)
class Rows:
    """Images as rows to compare, float32 [n,D], and the same images mirrored left to right: a mirrored copy is one as well."""

    plain: np.ndarray
    mirrored: np.ndarray

    def __len__(self) -> int:
        return len(self.plain)


@dataclass(frozen=True)
class Nearest:
    """Of each item, float64 and int64 [n]: the nearest training slice (`place`, `distance`), and the distance to the nearest
    slice of any other training patient, infinite if there is none."""

    place: np.ndarray
    distance: np.ndarray
    other_distance: np.ndarray

    @property
    def ratios(self) -> np.ndarray:
        """0 for an exact copy, near 1 for a stranger. A ratio, because a blurred image is near to everything; 1 where both are 0,
        which is two blank images."""
        return np.divide(self.distance, self.other_distance, out=np.ones(len(self.place)), where=self.other_distance > 0)


@dataclass(frozen=True)
class Copies:
    """How strongly each synthetic image singles out one training patient, and how strongly held-out real slices do."""

    synthetic: Nearest
    held_out: Nearest
    held_out_patients: np.ndarray
    own: np.ndarray  # [n]: how far the training slice that is nearest to each synthetic image is from other training patients
    held_out_own: np.ndarray

    @cached_property
    def threshold(self) -> float:
        """The 1st percentile of the held-out ratios."""
        return float(np.percentile(self.held_out.ratios, THRESHOLD_PERCENTILE))

    @property
    def suspects(self) -> np.ndarray:
        """bool [n]: synthetic images below the threshold."""
        return self.synthetic.ratios < self.threshold

    @cached_property
    def floor(self) -> float:
        """The share of held-out slices below a threshold that was set without their own patient: 1% if patients are alike."""
        ratios, below = self.held_out.ratios, 0
        for name in np.unique(self.held_out_patients):
            own = self.held_out_patients == name
            yardstick = ratios[~own] if not own.all() else ratios
            below += int((ratios[own] < np.percentile(yardstick, THRESHOLD_PERCENTILE)).sum())
        return below / len(ratios)

    @property
    def authentic(self) -> np.ndarray:
        """bool [n]: further from its nearest training slice than that one is from all other training patients.

        Alaa et al., ICML 2022 (arXiv:2102.08921), section 4, with patients for samples: slices of one patient are near each other anyway."""
        return self.synthetic.distance > self.own

    @property
    def held_out_authentic(self) -> np.ndarray:
        return self.held_out.distance > self.held_out_own


def find_copies(synthetic: Rows, held_out: Rows, held_out_patients: np.ndarray, train: np.ndarray, train_patients: np.ndarray) -> Copies:
    """All rows of one space; train float32 [m,D]; patients are names. Raises ValueError with one training patient, or nothing held out."""
    if len(np.unique(train_patients)) < 2:
        raise ValueError("a ratio needs two training patients")
    if len(held_out) == 0:
        raise ValueError("a threshold needs held-out slices")
    found, known = (_nearest_either_way(rows, train, train_patients) for rows in (synthetic, held_out))
    used = np.unique(np.concatenate([found.place, known.place]))
    own = nearest(train[used], train, train_patients).other_distance
    return Copies(found, known, held_out_patients, own[np.searchsorted(used, found.place)], own[np.searchsorted(used, known.place)])


def _nearest_either_way(rows: Rows, train: np.ndarray, patients: np.ndarray) -> Nearest:
    """Of an image or its mirror image, whichever comes nearer to a training slice."""
    plain, mirrored = (nearest(side, train, patients) for side in (rows.plain, rows.mirrored))
    is_mirrored = mirrored.distance < plain.distance
    return Nearest(
        np.where(is_mirrored, mirrored.place, plain.place),
        np.where(is_mirrored, mirrored.distance, plain.distance),
        np.where(is_mirrored, mirrored.other_distance, plain.other_distance),
    )


def nearest(items: np.ndarray, train: np.ndarray, patients: np.ndarray) -> Nearest:
    """The nearest row of `train` [m,D] and the nearest one of another patient, for each item [n,D]; Euclidean.

    Block by block: of 100,000 training images never more than 1024 x 8192 distances are in memory."""
    codes = np.unique(patients, return_inverse=True)[1]
    blocks = [_nearest_of_block(items[start : start + ITEM_BLOCK], train, codes) for start in range(0, len(items), ITEM_BLOCK)]
    if not blocks:
        return Nearest(np.empty(0, np.int64), np.empty(0), np.empty(0))
    places = np.concatenate(blocks)
    # computed again directly: the products lose digits for near-copies
    first, second = (_distances(items, train, column) for column in places.T)
    swapped = second < first
    return Nearest(np.where(swapped, places[:, 1], places[:, 0]), np.minimum(first, second), np.maximum(first, second))


def _nearest_of_block(items: np.ndarray, train: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Places int64 [n,2] of the two nearest rows of different patients; -1 where there is no second."""
    every = np.arange(len(items))
    places, values = np.full((len(items), 2), -1), np.full((len(items), 2), np.inf, dtype=np.float32)
    for start in range(0, len(train), TRAIN_BLOCK):
        block, of_block = train[start : start + TRAIN_BLOCK], codes[start : start + TRAIN_BLOCK]
        squared = (block**2).sum(1)[None] - 2 * items @ block.T  # the items' own norm does not move the minimum
        for _ in range(2):
            best = squared.argmin(axis=1)
            _insert(places, values, codes, start + best, squared[every, best])
            squared[of_block[None] == of_block[best][:, None]] = np.inf  # the rest of that patient
    return places


def _insert(places: np.ndarray, values: np.ndarray, codes: np.ndarray, place: np.ndarray, value: np.ndarray) -> None:
    """Keep the two nearest of different patients; infinite values are nobody's."""
    finite = np.isfinite(value)
    same = (places[:, 0] >= 0) & (codes[places[:, 0]] == codes[place])
    first = finite & (value < values[:, 0])
    pushed = first & ~same
    places[pushed, 1], values[pushed, 1] = places[pushed, 0], values[pushed, 0]
    places[first, 0], values[first, 0] = place[first], value[first]
    second = finite & ~first & ~same & (value < values[:, 1])
    places[second, 1], values[second, 1] = place[second], value[second]


def _distances(items: np.ndarray, train: np.ndarray, places: np.ndarray) -> np.ndarray:
    """float64 [n]; infinite where the place is -1."""
    found = np.empty(len(items))
    for start in range(0, len(items), ITEM_BLOCK):
        part = slice(start, start + ITEM_BLOCK)
        found[part] = np.sqrt(((items[part] - train[places[part]]) ** 2).sum(axis=1, dtype=np.float64))
    return np.where(places < 0, np.inf, found)


# --- what is compared -------------------------------------------------------------------------------------------------


def pixel_rows(images: np.ndarray) -> np.ndarray:
    """float [n,C,H,W] in [0,1] as rows float32 [n,D]: what another brightness or contrast, blur and grain leave as it was.

    Each image is made small (32 px, antialiased), and each channel brought to mean 0 and norm 1; a flat channel is all 0."""
    from medgen.data.resize import resize_images

    count, channels, height, _ = images.shape
    if height > COMPARED_PIXELS:
        images = resize_images(images.reshape(-1, *images.shape[2:]), COMPARED_PIXELS)
    flat = images.reshape(count, channels, -1)
    flat = flat - flat.mean(axis=2, keepdims=True)
    norms = np.linalg.norm(flat, axis=2, keepdims=True)
    is_flat = norms < 1e-4 * np.sqrt(flat.shape[2])
    return np.where(is_flat, 0, flat / np.where(is_flat, 1, norms)).reshape(count, -1).astype(np.float32)


def centred(images: np.ndarray) -> np.ndarray:
    """[n,C,H,W], each moved by whole pixels so that its centre of brightness is in the middle: a shifted copy is one as well.

    Of squared brightness, which noise in a dark background hardly moves."""
    weights = (images.astype(np.float64) ** 2).sum(axis=1)
    total = np.maximum(weights.sum(axis=(1, 2)), 1e-12)
    moved = np.empty_like(images)
    shifts = []
    for axis, length in ((2, images.shape[2]), (1, images.shape[3])):  # sums over columns leave rows, and the other way round
        middle = (length - 1) / 2
        found = (weights.sum(axis=axis) @ np.arange(length)) / total
        shifts.append(np.where(total > 1e-12, np.rint(middle - found), 0).astype(int))
    for number, image in enumerate(images):
        moved[number] = np.roll(image, (shifts[0][number], shifts[1][number]), axis=(1, 2))
    return moved


def mirrored(images: np.ndarray) -> np.ndarray:
    """[..., H, W] with left and right exchanged."""
    return np.ascontiguousarray(images[..., ::-1])


@dataclass(frozen=True)
class Whitening:
    """Features to coordinates in which those it was fitted to vary equally in every direction: otherwise a few loud ones are the distance."""

    mean: np.ndarray
    directions: np.ndarray  # [d, k]

    @classmethod
    def fitted(cls, features: np.ndarray) -> Whitening:
        """By the at most 64 principal components of standardised features [n,d], one per four images."""
        mean, spread = features.mean(axis=0, dtype=np.float64), features.std(axis=0, dtype=np.float64)
        scale = 1 / (spread + WHITENING_FLOOR * max(float(features.std(dtype=np.float64)), 1e-12))
        covariance = np.zeros((features.shape[1], features.shape[1]))
        for start in range(0, len(features), TRAIN_BLOCK):
            block = (features[start : start + TRAIN_BLOCK] - mean) * scale
            covariance += block.T @ block
        variances, vectors = np.linalg.eigh(covariance / max(1, len(features) - 1))
        kept = max(1, min(MOST_COMPONENTS, len(features) // FEWEST_IMAGES_PER_COMPONENT, features.shape[1]))
        largest = max(float(variances[-1]), 1e-12)
        directions = vectors[:, -kept:] / np.sqrt(np.maximum(variances[-kept:], 0) + WHITENING_FLOOR * largest)
        return cls(mean, scale[:, None] * directions)

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """float32 [n,k]."""
        return np.asarray((features - self.mean) @ self.directions, dtype=np.float32)


# --- one person under two names ---------------------------------------------------------------------------------------


def fingerprints(images: np.ndarray) -> np.ndarray:
    """A number [n] for each of float [n,C,H,W], equal for equal images; 0 for blank ones, which everybody has."""
    is_blank = images.min(axis=(1, 2, 3)) == images.max(axis=(1, 2, 3))
    digests = [bytes(8) if blank else blake2b(np.ascontiguousarray(image).tobytes(), digest_size=8).digest() for image, blank in zip(images, is_blank, strict=True)]
    return np.frombuffer(b"".join(digests), dtype=np.uint64)


def people(patients: np.ndarray, prints: np.ndarray) -> np.ndarray:
    """Patient names [n], with one name for all that share an identical slice: the second of two such patients is no stranger."""
    name_of = {str(name): str(name) for name in np.unique(patients)}

    def leader(name: str) -> str:
        while name_of[name] != name:
            name = name_of[name]
        return name

    first_with: dict[int, str] = {}
    for name, number in zip(patients, prints, strict=True):
        if number:
            one, other = leader(str(name)), leader(first_with.setdefault(int(number), str(name)))
            name_of[max(one, other)] = min(one, other)
    return np.array([leader(str(name)) for name in patients])
