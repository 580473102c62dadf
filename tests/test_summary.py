"""What the page says first: sentences from numbers, also where there are few or none of them. And the tables and cards made of the same records."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from medgen.evaluate import scores
from medgen.evaluate.scores import Score, score
from medgen.report import card, evaluations, summary, topics
from medgen.report.card import Subject
from medgen.report.summary import IN_A_JOB, ImageSet, Measurement

COPIES = "nearest of 40 training slices; threshold 0.4321 = 1st percentile of 120 held-out slices; seed 7"
COUNTS = {"synthetic": 100, "synthetic_used": 100, "real": 60, "real_patients": 12, "train": 80, "train_patients": 20, "pairs": 0}


def record(*found: Score, skipped: dict[str, str] | None = None, **changes: Any) -> dict[str, Any]:
    """metrics.json of an evaluate stage, as evaluate writes it."""
    return {
        "schema": scores.METRICS_SCHEMA, "stage": "evaluate", "of": "images", "against": "test", "positive_only": False, "scores": scores.to_json(list(found)),
        "skipped": skipped or {}, "counts": COUNTS, "details": {"swd_levels": {}, "curves": {}, "copies": []},
        "samples": {"synthetic": [], "real": [], "pairs": []}, **changes,
    }  # fmt: skip


def measured(*measurements: Measurement) -> ImageSet:
    return ImageSet("images", measurements, IN_A_JOB)


def good(*found: Score, **changes: Any) -> str:
    return " ".join(summary.is_it_good(measured(Measurement("evaluate", "evaluate", record(*found, **changes)))))


def copied(*found: Score, **changes: Any) -> str:
    return " ".join(summary.is_it_a_copy(measured(Measurement("evaluate", "evaluate", record(*found, **changes)))))


def kid(value: float, interval: tuple[float, float] | None, floor: float | None, group: str | None = None) -> Score:
    return score("kid", "t1", value, interval, floor, 72, "kernel", group, "real-synthetic")


@pytest.mark.parametrize(
    ("item", "standing"),
    [
        (kid(0.2, (0.1, 0.3), 0.05), "worse"), (kid(-0.001, (-0.01, 0.004), 0.0), "at"), (kid(-0.05, (-0.08, -0.03), 0.01), "at"),
        (kid(0.2, None, 0.05), "unknown"), (kid(0.2, (0.1, 0.3), None), "unknown"),
        (score("swd", "t1", 0.0, (0.0, 0.0), 0.0, 9, "p"), "at"), (score("swd", "t1", 0.1, (0.05, 0.2), 0.0, 9, "p"), "worse"),
        (score("mae", "t1", 0.1, (0.05, 0.2), 0.4, 9, "p"), "better"), (score("ssim", "t1", 0.1, (0.05, 0.2), 0.4, 9, "p"), "worse"),
        (score("ssim", "t1", 0.9, (0.85, 0.95), 0.4, 9, "p"), "better"),
        (score("recall", "t1", 0.9, (0.85, 0.95), 0.4, 9, "p"), "apart"), (score("recall", "t1", 0.1, (0.05, 0.2), 0.4, 9, "p"), "apart"),
    ],
)  # fmt: skip
def test_a_score_stands_where_its_interval_says(item: Score, standing: str) -> None:
    assert summary.standing(item) == standing


def test_the_headline_has_its_numbers_and_the_others_are_sorted() -> None:
    text = good(
        kid(0.041, (0.02, 0.06), 0.038), score("psd", "t1", 3.2, (2.0, 4.0), 1.0, 60, "p"), score("swd", "t1", 0.1, (0.05, 0.2), 0.12, 60, "p"),
        score("coverage", "t1", 0.4, (0.3, 0.5), 0.95, 60, "p", None, "real-synthetic"), score("mae", "t1", 0.1, (0.05, 0.2), 0.4, 9, "p"),
        score("fd_small_n", "t1", 30.0, None, 10.0, 60, "p", None, "real-synthetic"), score("near_train", "t1", 0.5, (0.4, 0.6), 0.01, 60, COPIES),
    )  # fmt: skip
    assert text.startswith("Kernel distance (KID): 0.0410 (95% interval 0.0200 to 0.0600, n = 72) beside a floor of 0.0380: at its floor.")
    assert "Worse than their floors: power-spectrum distance (3.20, floor 1.00)." in text
    assert "Apart from their floors: coverage (0.400, floor 0.950)." in text
    assert "At their floors: sliced Wasserstein distance." in text and "Better than their floors: mean absolute error." in text
    assert "Without an interval, so not to be told from chance: Frechet distance (small n) (30.0, floor 10.0)." in text
    assert "copies" not in text


def test_the_worst_class_is_named() -> None:
    text = good(kid(0.05, (0.0, 0.1), 0.04), kid(0.04, (0.0, 0.1), 0.04, "glioma"), kid(0.2, (0.17, 0.23), 0.06, "meningioma"),
                skipped={"kid": "pituitary: 3 images on the smallest side, at least 8 are needed"})  # fmt: skip
    assert "Furthest from its floor is meningioma: 0.200 (95% interval 0.170 to 0.230, n = 72) beside a floor of 0.0600: 3.3 times its floor, outside the interval." in text
    assert "kid was not computed for all: pituitary: 3 images on the smallest side" in text, "a class that is missing is missed"


def test_negative_distances_and_floors_of_zero_are_told_as_they_are() -> None:
    assert "-0.00100 (95% interval -0.0100 to 0.00400, n = 72) beside a floor of 0: at its floor" in good(kid(-0.001, (-0.01, 0.004), 0.0))
    assert "0.100 (95% interval 0.0500 to 0.200, n = 9) beside a floor of 0: worse than its floor." in good(score("swd", "t1", 0.1, (0.05, 0.2), 0.0, 9, "p"))
    assert "without a floor to read it by" in good(kid(0.1, (0.0, 0.2), None))
    assert "beside a floor of 0: equal to the floor" in good(score("swd", "t1", 0.0, None, 0.0, 9, "p"))


def test_few_patients_are_said_to_be_few() -> None:
    text = good(kid(0.05, None, 0.04), counts={**COUNTS, "real_patients": 4})
    assert "(no interval, n = 72) beside a floor of 0.0400: 0.0100 above" in text
    assert "The real side is 4 patients" in text and "no interval can be given" in text


def test_what_was_not_computed_is_said_with_its_reason() -> None:
    everything = good(skipped={"swd": "only 3 images on the smaller side", "psd": "only 3 images on the smaller side", "mae": "no real partner"})
    assert everything.startswith("Not measured (swd, psd: only 3 images on the smaller side; mae: no real partner); kid or swd among the metrics would say it.")
    assert good() == "Not measured; kid or swd among the metrics would say it."
    unasked = good(score("auc_real", "t1", 0.9, (0.8, 1.0), None, 60, "p"))
    assert unasked.startswith("Not measured; kid or swd"), "how well classes are told apart is no distance"
    assert summary.is_it_good(measured()) == ["Not measured: add a stage of kind evaluate."]
    failed = measured(Measurement("evaluate", "evaluate", None, summary.missing_stage("evaluate", "failed"), ("out of memory",)))
    assert summary.is_it_good(failed) == summary.is_it_a_copy(failed) == ["Not measured: evaluate failed: out of memory."]
    assert summary.missing_stage("evaluate", "not run") == "evaluate has not run"


def search(suspects: int, images: int = 100, space: str = "pixels") -> dict[str, Any]:
    return {"space": space, "threshold": 0.4321, "images": images, "of_images": 100, "suspects": suspects, "floor": 0.01}


def examined(*searches: dict[str, Any], membership: list[dict[str, Any]] | None = None, guarantee: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"searches": list(searches), "membership": membership or [], "guarantee": guarantee}


def test_copies_are_told_with_threshold_and_number() -> None:
    none = copied(privacy=examined(search(0)), skipped={"membership": "too few patients"})
    assert none == "No copies found at threshold 0.432 (pixels) among 100 images. Membership inference was not tried: too few patients. No DP guarantee."
    some = copied(privacy=examined(search(7), search(1, 80, "features")))
    assert "7 suspected copies at threshold 0.432 (pixels) among 100 images" in some and "1 suspected copy at threshold 0.432 (features) among 80 of 100 images" in some
    skipped = copied(privacy=examined(), skipped={"near_train": "needs at least two training patients", "membership": "too few patients"})
    assert skipped.startswith("Copies were not counted: needs at least two training patients. Membership inference was not tried: too few patients.")
    assert copied().startswith("Told in the table of scores alone: an earlier version")


def test_membership_and_guarantee_are_told_where_they_are_there() -> None:
    attacks = [{"attack": "images", "unit": unit, "auc": {"value": 0.52, "interval": [0.41, 0.63]}} for unit in ("slice", "patient")]
    text = copied(score("membership_tpr", "t1, from the images", 0.013, (0.0, 0.04), 0.01, 400, "attack"),
                  privacy=examined(search(0), membership=attacks, guarantee={"epsilon": 8.0, "delta": 1e-5, "unit": "patient", "auc_at_most": 0.9997}))  # fmt: skip
    assert text.count("Membership inference from the images: AUC 0.52 (0.41 to 0.63) per patient") == 1
    assert "Members that it finds at 1% false alarms: from the images 1.3% (0.0% to 4.0%)." in text
    assert text.endswith("epsilon 8 at delta 1e-05 per patient; no attack may reach an AUC above 0.9997.")


def utility() -> dict[str, Any]:
    arms = {"real": 0.81, "augmented": 0.83, "synthetic": 0.7, "mixed 1": 0.82}
    found = [Score("utility_auc", "t1", value, (value - 0.05, value + 0.05), None, 90, "", "higher", "resnet18", arm) for arm, value in arms.items()]
    words = "no gain over real shown; a gain below 0.040 could not have been seen"
    return record(*found, stage="utility", details={"arms": [], "comparisons": [{"metric": "utility_auc", "arm": "mixed 1", "to": "real", "words": words},
                                                    {"metric": "utility_auc", "arm": "augmented", "to": "real", "words": "none"}]}, counts={"test": 90, "test_patients": 30})  # fmt: skip


def test_usefulness_is_every_arm_and_what_could_have_been_seen() -> None:
    structure = record(stage="structure", details={"words": "the segmenter reaches Dice 0.8 on real images and 0.6 on synthetic ones", "warnings": []})
    text = " ".join(summary.is_it_useful(measured(Measurement("utility", "utility", utility()), Measurement("structure", "structure", structure))))
    assert "on real test images (90), by what was trained on: real 0.810, augmented 0.830, synthetic 0.700, mixed 1 0.820." in text
    assert "mixed 1: no gain over real shown; a gain below 0.040 could not have been seen." in text and "augmented: none" not in text
    assert text.endswith("Masks: the segmenter reaches Dice 0.8 on real images and 0.6 on synthetic ones.")
    assert summary.is_it_useful(measured()) == ["Not measured: add a stage of kind utility, of images that were drawn on no mask of the val or test split."]
    assert summary.is_it_useful(measured(Measurement("utility", "utility", None, "utility has not run"))) == ["Not measured: utility has not run."]
    assert summary.is_it_useful(measured(Measurement("structure", "structure", structure)))[0] == "Not measured: add a stage of kind utility, of images that were drawn on no mask of the val or test split."


def test_sets_of_which_the_same_is_to_be_said_share_a_line() -> None:
    sets = [ImageSet(name, [], IN_A_JOB) for name in ("masks", "images")]
    answers = summary.answers(sets)
    assert [answer.question for answer in answers] == ["Is it good?", "Is it a copy?", "Is it useful?"]
    assert [(line.about, line.text) for line in answers[0].lines] == [("masks, images", "Not measured: add a stage of kind evaluate.")]
    assert [line.about for line in summary.answers(sets[:1])[0].lines] == [""]
    assert summary.answers([])[0].lines[0].text == "Not measured: no set of images was drawn."


def test_two_protocols_of_a_metric_are_never_in_one_table() -> None:
    found = [score("ssim", channel, 0.5, None, None, 9, protocol) for channel, protocol in (("t1", "a"), ("t2", "a"), ("t1", "b"))]
    shown = evaluations.evaluation("evaluate", record(*found, score("mae", "t1", 0.1, None, None, 9, "c"), score("psd", "t1", 1.0, None, None, 9, "d")))
    assert [[row.score.protocol for row in table.rows] for table in shown.tables] == [["d"], ["c", "a", "a"], ["b"]]
    assert [table.title for table in shown.tables] == ["Is the texture right?", *["Is each like its real partner?"] * 2]
    assert all(shown.protocols[row.note - 1] == row.score.protocol for table in shown.tables for row in table.rows)
    grouped = [score("kid", "t1", 0.1, None, 0.1, 9, protocol, group, comparison)
               for protocol in ("a", "b") for group in (None, "AD") for comparison in scores.COMPARISONS]  # fmt: skip
    assert [[row.group for row in table.rows] for table in evaluations.evaluation("e", record(*grouped)).comparisons] == [["all", "AD"]] * 2


def test_arms_stand_beside_each_other_and_unknown_metrics_are_shown() -> None:
    shown = evaluations.evaluation("utility", utility())
    assert [row.group for row in shown.groups[0].rows] == ["real", "augmented", "synthetic", "mixed 1"]
    assert shown.groups[0].heads == ("Value",) and shown.compared == "90 test, 30 test patients"
    assert any("mixed 1 against real: no gain over real shown" in remark for remark in shown.remarks)
    newer = Score("sparkle", "t1", 1.0, None, None, 3, "", "higher", "p")
    assert evaluations.evaluation("e", record(newer)).tables[0].rows[0].meaning.title == "sparkle"


def test_every_metric_has_a_place_of_its_own() -> None:
    assert {name for name in scores.MEANINGS if topics.topic_of(name).name == "other"} == set()


def test_the_table_gives_every_score_back_exactly() -> None:
    found = [kid(1 / 3, (-0.1, 2 / 3), 1e-17, "a, \"b\""), score("near_train", "t1", 0.0, None, None, 10, "one; two,\nthree"), score("psd", "t1", 0.1, (0.0, 0.2), 0.3, 4, "p")]
    rows = list(csv.DictReader(io.StringIO(scores.to_csv([record(*found), record(*found[:1], stage="again", of="others")]))))
    assert [(row["stage"], row["dataset"]) for row in rows] == [("evaluate", "images")] * 3 + [("again", "others")]
    back = [
        Score(row["metric"], row["channel"], float(row["value"]), (float(row["ci_low"]), float(row["ci_high"])) if row["ci_low"] else None,
              float(row["floor"]) if row["floor"] else None, int(row["n"]), row["unit"], row["better"], row["protocol"], row["group"] or None, row["comparison"] or None)  # type: ignore[arg-type]
        for row in rows
    ]  # fmt: skip
    assert back == [*found, found[0]]


def subject(*measurements: Measurement) -> Subject:
    return Subject("100 synthetic t1 images", "Drawn.", 100, [("images", "100"), ("odd | name", "a\nb")], [("checkpoint", "c0ffee")], [("split train", "20 patients")],
                   ["A limit."], measured(*measurements))  # fmt: skip


def test_a_card_holds_every_number_and_blanks_for_what_people_must_say() -> None:
    found = record(kid(0.05, None, 0.04), kid(0.2, (0.17, 0.23), 0.06, "meningioma"), score("near_train", "t1", 0.0, (0.0, 0.04), 0.01, 80, COPIES),
                   counts={**COUNTS, "real_patients": 4, "synthetic_used": 80}, skipped={"psd": "only masks were drawn"}, privacy=examined(search(0, 80)))  # fmt: skip
    text = card.dataset_card(subject(Measurement("evaluate", "evaluate", found), Measurement("utility", "utility", utility())))
    head, body = text.split("---\n", 2)[1:]
    assert yaml.safe_load(head) == {"license": None, "pretty_name": "100 synthetic t1 images", "tags": ["synthetic", "medical", "medgen"],
                                    "annotations_creators": ["machine-generated"], "size_categories": ["n<1K"]}  # fmt: skip
    for name in ("Congruence", "Coverage", "Constraint", "Completeness", "Compliance", "Comprehension", "Consistency"):
        assert f"## {name}: " in body
    assert "| Kernel distance (KID) | t1 | meningioma | 0.200 | 0.0600 | 0.170 to 0.230 | 72 | 1 |" in body
    assert "1. kernel" in body and COPIES in body and "| odd \\| name | a b |" in body
    for wanted in ("| licence | ________", "| contact | ________", "No copies found at threshold 0.432 (pixels) among 80 of 100 images", "No DP guarantee", "A limit.", "The real side is 4 patients",
                   "The scores are of 80 of the 100 images.", "Not computed: psd (only masks were drawn)", "synthetic | 0.700"):  # fmt: skip
        assert wanted in body, wanted
    widths = [line.count("|") - line.count("\\|") for line in body.splitlines() if line.startswith("| Kernel")]
    assert set(widths) == {9}


def test_a_card_without_any_measurement_says_so() -> None:
    text = card.dataset_card(subject())
    assert text.count("Not measured") >= 8 and "Not measured: usefulness for training a network." in text


def test_nothing_is_called_what_no_number_can_show() -> None:
    """The wording rule: what was looked for and found, with the threshold."""
    folder = Path(card.__file__).parent
    for path in [*folder.glob("*.py"), *folder.glob("*.html")]:
        assert not re.search(r"\b(is|are|images) (private|safe|anonymous)\b|no privacy risk", path.read_text()), path
