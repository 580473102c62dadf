"""LPIPS as a score: of pairs that belong together, and between random images of one set. Used by run.py."""

from __future__ import annotations

from medgen.evaluate import intervals, lpips_distance, paired, pairs
from medgen.evaluate.distributions import RandomPairs, random_pairs_of
from medgen.evaluate.feature_scores import pictures_of
from medgen.evaluate.inputs import Sides
from medgen.evaluate.lpips_distance import Lpips
from medgen.evaluate.scores import Score, ScoresOrReason, score
from medgen.spec_evaluate import Measures


def perceptual_scores(sides: Sides, names: list[str], measures: Measures) -> dict[str, ScoresOrReason]:
    """Scores of `lpips` and `lpips_diversity`, those of them that are asked for."""
    if not sides.dataset.image_channels:
        return dict.fromkeys(names, ([], "only masks were drawn, and LPIPS knows images"))
    assert measures.lpips is not None  # the spec refuses these metrics without
    lpips = lpips_distance.load(measures.lpips.model_dump(mode="json"))
    found: dict[str, ScoresOrReason] = {}
    if "lpips" in names:
        found["lpips"] = _quality(sides, lpips)
    if "lpips_diversity" in names:
        found["lpips_diversity"] = _diversity(sides, lpips)
    return found


def _quality(sides: Sides, lpips: Lpips) -> ScoresOrReason:
    """Each image with its real partner, beside that partner with the slice of another patient."""
    if sides.partners is None:
        return [], sides.pairing.missing
    strangers = pairs.nearest_of_another_patient(sides.store.rows, sides.partners)
    found: list[Score] = []
    for picture in sides.pictures:
        of_real, of_synthetic = pictures_of(sides, picture)
        real = of_real.read(sides.partners)
        values = lpips_distance.row_distances(lpips, real, of_synthetic.read(sides.positions))
        floor = None if strangers is None else lpips_distance.row_distances(lpips, real, of_real.read(strangers))
        found += paired.pair_means("lpips", picture, sides, values, floor, [lpips.name])
    return found, None


def _diversity(sides: Sides, lpips: Lpips) -> ScoresOrReason:
    drawn = random_pairs_of(sides)
    if not isinstance(drawn, RandomPairs):
        return [], drawn
    return [_within(sides, lpips, picture, drawn) for picture in sides.pictures], None


def _within(sides: Sides, lpips: Lpips, picture: str, drawn: RandomPairs) -> Score:
    of_real, of_synthetic = pictures_of(sides, picture)
    synthetic, real = of_synthetic.read(sides.positions), of_real.read(drawn.real_rows)
    values = lpips_distance.pair_distances(lpips, synthetic, synthetic, drawn.synthetic)
    floor = float(lpips_distance.pair_distances(lpips, real, real, drawn.real).mean()) if len(drawn.real) else None
    interval = intervals.mean_interval(values, drawn.members, sides.seed, f"interval_lpips_diversity_{picture}")
    return score("lpips_diversity", picture, values.mean(), interval, floor, len(values), f"{lpips.name}; {drawn.words}")

