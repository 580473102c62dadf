"""`medgen prepare`: tables of images in, matched groups, splits by subject and labelled stacks out."""

from __future__ import annotations

import csv
import itertools
import json
import math
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medgen import csv_files, files
from medgen.data import stacks
from medgen.errors import InputError, MedgenError
from medgen.prepare import split, stack
from medgen.prepare.match import Limits, Matching, _Pool, by_group, match_subjects
from medgen.prepare.split import Shares, deal, find_split
from medgen.prepare.statistics import age_test, compare, image_differences, sex_test
from medgen.prepare.table import PRESETS, Balance, Columns, Preset, Subject, columns_of, read_cohort

Medgen = Callable[..., subprocess.CompletedProcess[str]]
PLAIN = PRESETS[Preset.PLAIN]
ADNI_HEADER = ["Image Data ID", "Subject", "Group", "Sex", "Age"]


def adni_rows(seed: int, counts: dict[str, int], older_years: float = 3.5) -> list[list[str]]:
    """One to four images per subject in a mixed order; AD is older by `older_years` and more often male."""
    dice = np.random.default_rng(seed)
    rows = []
    for group, count in counts.items():
        for number in range(count):
            age = dice.normal(73 + (older_years if group == "AD" else 0), 6)
            sex = "M" if dice.random() < (0.58 if group == "AD" and older_years else 0.44) else "F"
            rows += [[f"I{len(rows) + visit}", f"{group}_S_{number:04d}", group, sex, f"{age + visit:.1f}"] for visit in range(int(dice.integers(1, 5)))]
    return [rows[position] for position in dice.permutation(len(rows))]


def write_table(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as handle:
        csv.writer(handle).writerows([header, *rows])
    return path


def read_table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


# the table


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(2, 4).flatmap(lambda width: st.lists(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8), min_size=width, max_size=width), min_size=1, max_size=5)))
def test_any_cells_come_back_as_they_were(tmp_path: Path, cells: list[list[str]]) -> None:
    columns = [f"column {number}" for number in range(len(cells[0]))]
    csv_files.write_rows(tmp_path / "a.csv", columns, [dict(zip(columns, line, strict=True)) for line in cells])
    assert [list(row.values()) for _, row in csv_files.read_rows(tmp_path / "a.csv")] == cells


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60) | st.text("subject,gr\n\"\r;\t12.5ABMF", max_size=80).map(lambda text: b"subject,group,sex,age\n" + text.encode()))
def test_no_file_breaks_the_reader(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    try:
        cohort = read_cohort(tmp_path / "a.csv", PLAIN)
    except InputError as error:
        assert "a.csv" in str(error)
    else:
        assert cohort.rows and len(cohort.groups) >= 1


GOOD = ["a,A,M,70", "a,A,M,71", "b,A,F,72", "c,B,M,73", "d,B,F,74"]


@pytest.mark.parametrize(
    ("lines", "pattern"),
    [
        ([",A,M,70"], r"t.csv:7: subject is empty"),
        (["e,,M,70"], r"t.csv:7: group is empty"),
        (["e,A,,70"], r"t.csv:7: sex is empty"),
        (["e,A,M,"], r"t.csv:7: age is empty"),
        (["e,A,M,ninety"], r"t.csv:7: age is 'ninety'; write years as a number from 0 to 130, with a point: 73.5"),
        (["e,A,M,-1"], r"t.csv:7: age is '-1'"),
        (["e,A,M,nan"], r"t.csv:7: age is 'nan'"),
        (["e,A,M,1e9"], r"t.csv:7: age is '1e9'"),
        (["e,A,M,70,x"], r"t.csv:7: this line does not have the 4 columns"),
        (["a,B,M,70"], r"t.csv:7: subject a has group 'B', but 'A' in line 2; a subject has one group"),
        (["a,A,F,70"], r"t.csv:7: subject a has sex 'F', but 'M' in line 2; a subject has one sex"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, lines: list[str], pattern: str) -> None:
    (tmp_path / "t.csv").write_text("\n".join(["subject,group,sex,age", *GOOD, *lines]) + "\n")
    with pytest.raises(InputError, match=pattern):
        read_cohort(tmp_path / "t.csv", PLAIN)


def columns(**named: str) -> Columns:
    names: dict[str, str | None] = dict.fromkeys(("subject", "group", "image", "sex", "age", "groups"))
    return columns_of(Preset.PLAIN, Balance.BOTH, **{**names, **named})


@pytest.mark.parametrize(
    ("chosen", "pattern"),
    [
        (columns(subject="RID"), r"no column 'RID' \(for the subject\); the columns are: subject, group, sex, age; --preset plain fits this table"),
        (columns(groups="A,C"), r"column 'group' never is 'C'; the groups there are: A, B; choose with --groups"),
        (columns(image="subject"), r"t.csv:3: subject a stands in line 2 already"),
        (PRESETS[Preset.ADNI], r"no column 'Subject'.*--preset plain fits"),
    ],
)
def test_columns_that_do_not_fit(tmp_path: Path, chosen: Columns, pattern: str) -> None:
    (tmp_path / "t.csv").write_text("\n".join(["subject,group,sex,age", *GOOD]) + "\n")
    with pytest.raises(InputError, match=pattern):
        read_cohort(tmp_path / "t.csv", chosen)


def test_group_names_on_the_command_line() -> None:
    assert columns(groups="CN, AD").groups == ("CN", "AD")
    for text in ("CN,", "CN,CN", ""):
        with pytest.raises(InputError, match="give different names"):
            columns(groups=text)


def test_a_subject_has_the_mean_age_of_its_images(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("\ufeff" + "\r\n".join(["subject,group,sex,age", *GOOD, "", "x,C,F,"]) + "\r\n", encoding="utf-8")
    cohort = read_cohort(tmp_path / "t.csv", columns(groups="B,A"))  # the broken line is of a group nobody asked for
    assert cohort.left_out == {"C": 1} and cohort.groups == ("B", "A")
    first = cohort.subjects()[0]
    assert (first.name, first.age_years, first.images) == ("a", 70.5, (0, 1))


# statistics


def person(number: int, group: str, sex: str, age: float, images: int = 1) -> Subject:
    return Subject(f"s{number}", group, sex, age, tuple(range(images)))


def naive_differences(subjects: Sequence[Subject]) -> list[float]:
    """Written from the definition, pair by pair, the largest first."""
    found = []
    for one, other in itertools.combinations(list(by_group(subjects).values()), 2):
        pairs = [([float(s.sex == sex) for s in one], [float(s.sex == sex) for s in other], True) for sex in sorted({str(s.sex) for s in subjects})]
        pairs.append(([float(s.age_years or 0) for s in one], [float(s.age_years or 0) for s in other], False))
        for a, b, is_share in pairs:
            apart = abs(np.mean(a) - np.mean(b))
            spread = sum(np.mean(side) * (1 - np.mean(side)) if is_share else np.var(side, ddof=1) for side in (a, b)) / 2
            found.append(0.0 if apart < 1e-12 else float(apart / math.sqrt(spread)) if spread > 0 else math.inf)
    return sorted(found, reverse=True)


def tiny_cohort(seed: int, count: int, groups: str = "AB") -> list[Subject]:
    dice = np.random.default_rng(seed)
    return [
        person(number, groups[number % len(groups)], "MF"[int(dice.random() < 0.3 + 0.3 * (number % len(groups)))],
               float(dice.integers(60, 80) + 3 * (number % len(groups))), int(dice.integers(1, 3)))
        for number in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("groups", ["AB", "ABC"])
@pytest.mark.parametrize("seed", range(5))
def test_differences_are_the_textbook_ones(seed: int, groups: str) -> None:
    subjects = tiny_cohort(seed, 15, groups)
    found = compare(by_group(subjects))
    assert max(found.differences.values()) == pytest.approx(naive_differences(subjects)[0], rel=1e-9)
    assert set(found.differences) == {"age", "share of F", "share of M"} and set(found.tests) == {"age", "sex"}
    assert found.tests["age"].name == ("Mann-Whitney U" if groups == "AB" else "Kruskal-Wallis")
    repeated = [subject for subject in subjects for _ in subject.images]
    assert max(image_differences(by_group(subjects)).values()) == pytest.approx(naive_differences(repeated)[0], rel=1e-9)


def test_groups_without_any_spread_differ_infinitely_and_json_says_null() -> None:
    found = compare({"A": [person(0, "A", "M", 73.4), person(1, "A", "M", 73.4)], "B": [person(2, "B", "M", 80.1), person(3, "B", "M", 80.1)]})
    assert found.differences == {"age": math.inf, "share of M": 0.0}
    record = json.loads(json.dumps(found.record(), allow_nan=False))
    assert record["standardised_mean_differences"]["age"] is None and record["tests"]["sex"]["p"] == 1.0


def test_the_tests_are_the_named_ones() -> None:
    from scipy import stats

    young, old = [60.0, 61, 64, 66, 70, 71, 75, 77, 78], [66.0, 70, 74, 76, 79, 80, 81, 82, 90]
    assert age_test([young, old]).p == pytest.approx(float(stats.mannwhitneyu(young, old).pvalue))
    assert age_test([young, old, young]).p == pytest.approx(float(stats.kruskal(young, old, young).pvalue))
    assert age_test([[70.0, 70], [70.0, 70]]).p == 1.0
    assert sex_test(np.array([[30, 20], [20, 30]])).name == "chi-squared"
    few = sex_test(np.array([[3, 1], [1, 4]]))
    assert few.name == "Fisher's exact" and few.p == pytest.approx(0.2063, abs=1e-4)
    assert sex_test(np.array([[3, 1], [1, 4], [2, 2]])).name == "chi-squared"
    assert sex_test(np.array([[3], [5]])).p == 1.0


# match


LIMITS = Limits(0.25, 0.05)


@pytest.mark.parametrize("groups", ["AB", "ABC"])
@pytest.mark.parametrize("seed", range(8))
def test_every_step_is_the_best_single_one(seed: int, groups: str) -> None:
    """All who may go are tried by brute force: nobody's leaving would have made the differences smaller."""
    subjects = tiny_cohort(seed, 15, groups)
    matching = match_subjects(subjects, LIMITS, 0.5, 1)
    left = list(subjects)
    for gone in matching.removed:
        if naive_differences(left)[0] < LIMITS.max_difference:
            break  # from here on p-values decide
        sizes = {group: len(members) for group, members in by_group(left).items()}
        fewest = {group: max(2, math.ceil(len(members) / 2)) for group, members in by_group(subjects).items()}
        without = {s.name: [round(d, 8) for d in naive_differences([x for x in left if x is not s])] for s in left if sizes[s.group] > fewest[s.group]}
        assert without[gone.name] == min(without.values())
        left.remove(gone)


@pytest.mark.parametrize("seed", range(12))
def test_matching_against_all_subsets(seed: int) -> None:
    """Where some subset is within the limits one is found, with at most one subject more removed than needed; else the failure is true."""
    subjects = tiny_cohort(seed, 12)
    matching = match_subjects(subjects, LIMITS, 0.5, 1)
    needed = next((count for count in range(7) for gone in itertools.combinations(range(12), count) if fits(subjects, set(gone))), None)
    if needed is None:
        assert not LIMITS.met(matching.alikeness)
    else:
        assert LIMITS.met(matching.alikeness) and len(matching.removed) <= needed + 1
    names = [subject.name for subject in (*matching.kept, *matching.removed)]
    assert sorted(names) == sorted(subject.name for subject in subjects), "nobody is removed twice, and everybody is somewhere"


def fits(subjects: Sequence[Subject], gone: set[int]) -> bool:
    left = [subject for number, subject in enumerate(subjects) if number not in gone]
    groups = by_group(left)
    if len(groups) < 2 or min(len(members) for members in groups.values()) < 3:
        return False
    return naive_differences(left)[0] < LIMITS.max_difference and compare(groups).worst_p > LIMITS.min_p


def test_equal_subjects_go_by_images_then_by_seed() -> None:
    subjects = [person(number, "A", "M", 80, images=2 + (number == 0)) for number in range(6)]
    subjects += [person(10 + number, "A", "F", 70 + number) for number in range(6)] + [person(20 + number, "B", "F", 70 + number) for number in range(6)]
    removed = [[subject.name for subject in match_subjects(subjects, Limits(0.1, 0.05), 0.5, seed).removed] for seed in range(6)]
    assert all(names[0] in {f"s{number}" for number in range(1, 6)} for names in removed), "s0 has more images and goes after its equals"
    assert len({tuple(names) for names in removed}) > 1 and removed[0] == [s.name for s in match_subjects(subjects, Limits(0.1, 0.05), 0.5, 0).removed]


def test_groups_of_equal_mean_and_unlike_shape_are_matched_by_p() -> None:
    """Mean and spread alike, ranks not: here only the test can say who must go."""
    skewed = [*np.linspace(69, 71, 40), *np.linspace(89, 91, 12)]
    even = np.mean(skewed) + np.linspace(-6, 6, 44)
    subjects = [person(number, "A", "MF"[number % 2], age) for number, age in enumerate(map(float, skewed))]
    subjects += [person(100 + number, "B", "MF"[number % 2], float(age)) for number, age in enumerate(even)]
    before = compare(by_group(subjects))
    assert LIMITS.differences_met(before) and before.worst_p < 0.05
    matching = match_subjects(subjects, LIMITS, 0.5, 1)
    assert LIMITS.met(matching.alikeness)
    pool = _Pool.of(subjects, 0.5, 1)
    best = max(compare(by_group([s for s in subjects if s is not subjects[choice]])).worst_p for choice in pool.choices())
    left = [subject for subject in subjects if subject is not matching.removed[0]]
    assert compare(by_group(left)).worst_p == pytest.approx(best, rel=1e-9)


def test_what_cannot_be_matched_gives_the_best_that_was_met() -> None:
    subjects = [person(number, "A", "M", 60 + number) for number in range(8)] + [person(20 + number, "B", "M", 90 + number) for number in range(8)]
    matching: Matching = match_subjects(subjects, LIMITS, 0.5, 1)
    assert not LIMITS.met(matching.alikeness) and len(matching.kept) >= 8
    assert matching.alikeness.differences["age"] <= compare(by_group(subjects)).differences["age"]
    assert len(match_subjects(subjects, LIMITS, 0.0, 1).removed) == 0


def test_match_on_the_command_line(tmp_path: Path, medgen: Medgen) -> None:
    rows = adni_rows(3, {"AD": 45, "CN": 60, "MCI": 4})
    write_table(tmp_path / "ADNI.csv", ADNI_HEADER, rows)
    done = medgen("prepare", "match", "ADNI.csv", "--preset", "adni", "--out", "matched")
    assert "Not looked at: images of other groups" in done.stdout and "p of age (Mann-Whitney U)" in done.stdout
    folder = tmp_path / "matched"
    assert sorted(path.name for path in folder.iterdir()) == ["matched.csv", "removed.csv", "report.html", "report.json"]
    kept, removed = read_table(folder / "matched.csv"), read_table(folder / "removed.csv")
    wanted = [row for row in rows if row[2] != "MCI"]
    kept_ids = {row["Image Data ID"] for row in kept}
    assert [list(row.values()) for row in kept] == [row for row in wanted if row[0] in kept_ids], "every cell, in the order of the table"
    assert [list(row.values()) for row in removed] == [row for row in wanted if row[0] not in kept_ids]
    assert not {row["Subject"] for row in kept} & {row["Subject"] for row in removed}, "whole subjects"
    cohort = read_cohort(folder / "matched.csv", PRESETS[Preset.ADNI])
    assert Limits(0.1, 0.05).met(compare(by_group(cohort.subjects())))
    report = json.loads((folder / "report.json").read_text())
    assert report["before"]["tests"]["age"]["p"] < 0.05 < report["after"]["tests"]["age"]["p"]
    assert {entry["subject"] for entry in report["removed"]} == {row["Subject"] for row in removed}
    assert report["after"]["groups"]["AD"]["images"] == sum(row["Group"] == "AD" for row in kept)
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == 2 and "http" not in page.replace("http-equiv", "") and "Age, after" in page
    medgen("prepare", "match", "ADNI.csv", "--preset", "adni", "--out", "again")
    for name in ("matched.csv", "removed.csv", "report.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes(), "the same table and seed, the same result"
    told = medgen("prepare", "match", "ADNI.csv", "--preset", "adni", "--out", "matched", expect=2).stderr
    assert "matched exists; name a new folder with --out" in told


def test_a_match_that_fails_writes_nothing(tmp_path: Path, medgen: Medgen) -> None:
    write_table(tmp_path / "t.csv", ["who", "group", "sex", "age"], [[f"{g}{n}", g, "F", str(n % 9 + (60 if g == "a" else 80))] for g in "ab" for n in range(9)])
    told = medgen("prepare", "match", "t.csv", "--subject", "who", "--out", "m", expect=1).stderr
    assert "could not be matched; nothing was written" in told and "difference of age" in told and "--max-removed" in told
    assert [path.name for path in tmp_path.iterdir() if path.name != "t.csv" and "home" not in path.name] == []
    told = medgen("prepare", "match", "t.csv", "--subject", "who", "--balance", "none", "--out", "m", expect=2).stderr
    assert "leaves match nothing to compare" in told


# split


def test_the_grouped_deal_is_the_known_one() -> None:
    """50 subjects of two images, the label their parity: the last fold of five with seed 8 (scikit-learn 1.9.1)."""
    subjects = [number // 2 for number in range(100)]
    dealt = deal([str(subject % 2) for subject in subjects], [f"{subject:02d}" for subject in subjects], 5, 8)
    assert {subject for subject, fold in zip(subjects, dealt, strict=True) if fold == 4} == {4, 11, 19, 20, 25, 27, 34, 45, 46, 48}


@pytest.mark.parametrize(("test", "val"), [(0.2, 0.16), (0.2, 0.0), (0.0, 0.25), (0.15, 0.15), (0.1, 0.1), (0.5, 0.25)])
def test_shares_are_met_by_whole_subjects(tmp_path: Path, test: float, val: float) -> None:
    cohort = read_cohort(write_table(tmp_path / "t.csv", ADNI_HEADER, adni_rows(4, {"AD": 60, "CN": 80}, older_years=0)), PRESETS[Preset.ADNI])
    found = find_split(cohort, Shares(test, val), 0.0, 1, 5)
    for side, share in (("test", test), ("val", val), ("train", 1 - test - val)):
        assert found.side_of.count(side) / len(found.side_of) == pytest.approx(share, abs=0.04)
    sides_of: dict[str, set[str]] = {}
    for image, side in zip(cohort.images, found.side_of, strict=True):
        sides_of.setdefault(image.subject, set()).add(side)
    assert all(len(sides) == 1 for sides in sides_of.values())
    overall = sum(image.group == "AD" for image in cohort.images) / len(cohort.images)
    for side in set(found.side_of):
        groups = [image.group for image, own in zip(cohort.images, found.side_of, strict=True) if own == side]
        assert groups.count("AD") / len(groups) == pytest.approx(overall, abs=0.08)


def test_shares_that_leave_nothing_are_refused() -> None:
    for test, val in ((0.0, 0.0), (0.6, 0.4)):
        with pytest.raises(InputError, match="together they must be more than 0 and less than 1"):
            Shares(test, val)


def test_the_first_split_within_the_limits_is_taken(tmp_path: Path) -> None:
    cohort = read_cohort(write_table(tmp_path / "t.csv", ADNI_HEADER, adni_rows(6, {"AD": 40, "CN": 50}, older_years=0)), PRESETS[Preset.ADNI])
    shares = Shares(0.2, 0.16)
    alone = [find_split(cohort, shares, 1.0, 1, seed) for seed in range(12)]
    first = next(number for number, tried in enumerate(alone) if tried.worst_p > 0.3)
    assert first > 0, "a limit that not every split meets"
    assert find_split(cohort, shares, 0.3, 12, 0).side_of == alone[first].side_of
    best = max(alone, key=lambda tried: tried.worst_p)
    assert find_split(cohort, shares, 1.0, 12, 0).side_of == best.side_of, "where none passes, the best one is told"
    assert set(best.within) == {"train", "val", "test"} and set(best.between) == {"train and val", "train and test"}


def test_split_on_the_command_line(tmp_path: Path, medgen: Medgen) -> None:
    rows = adni_rows(6, {"AD": 40, "CN": 50, "MCI": 3}, older_years=0)
    write_table(tmp_path / "ADNI.csv", ADNI_HEADER, rows)
    done = medgen("prepare", "split", "ADNI.csv", "--preset", "adni", "--out", "split", "--test", 0.2, "--val", 0.2)
    assert "groups within test: sex" in done.stdout and "train and val: age" in done.stdout
    split = read_table(tmp_path / "split" / "split.csv")
    assert [[row[name] for name in ADNI_HEADER] for row in split] == [row for row in rows if row[2] != "MCI"]
    report = json.loads((tmp_path / "split" / "report.json").read_text())
    sides: dict[str, list[Subject]] = {side: [] for side in ("train", "val", "test")}
    for subject in read_cohort(tmp_path / "split" / "split.csv", PRESETS[Preset.ADNI]).subjects():
        sides[split[subject.images[0]]["split"]].append(subject)
    for side, subjects in sides.items():
        told, true = report["sides"][side], compare(by_group(subjects))
        assert told["tests"]["age"]["p"] == pytest.approx(true.tests["age"].p) and true.worst_p > 0.05
        assert sum(group["images"] for group in told["groups"].values()) == sum(row["split"] == side for row in split)
    for pair in ("val", "test"):
        assert compare({"train": sides["train"], pair: sides[pair]}).worst_p > 0.05
    assert (tmp_path / "split" / "report.html").read_text().count("<svg") == 4
    told_again = medgen("prepare", "split", "split/split.csv", "--preset", "adni", "--out", "b", expect=2).stderr
    assert "has a column 'split' already" in told_again


def test_a_split_that_fails_says_how_close_it_came_and_writes_nothing(tmp_path: Path, medgen: Medgen) -> None:
    write_table(tmp_path / "ADNI.csv", ADNI_HEADER, adni_rows(6, {"AD": 40, "CN": 50}, older_years=25))
    told = medgen("prepare", "split", "ADNI.csv", "--preset", "adni", "--out", "split", "--tries", 3, expect=1).stderr
    assert "none of 3 splits is balanced; nothing was written" in told and "groups within train: age" in told and "medgen prepare match first" in told
    assert not (tmp_path / "split").exists() and not list(tmp_path.glob(".split*"))


def test_a_table_without_age_and_sex_is_split_by_subject_and_group(tmp_path: Path, medgen: Medgen) -> None:
    write_table(tmp_path / "t.csv", ["subject", "group"], [[f"s{number // 2}", "ab"[number // 2 % 2]] for number in range(80)])
    assert "no column 'sex'" in medgen("prepare", "split", "t.csv", "--out", "s", expect=2).stderr
    medgen("prepare", "split", "t.csv", "--balance", "none", "--out", "s")
    split = read_table(tmp_path / "s" / "split.csv")
    assert {row["split"] for row in split} == {"train", "val", "test"} and "<svg" not in (tmp_path / "s" / "report.html").read_text()


def test_too_few_subjects_to_split(tmp_path: Path) -> None:
    rows = [["s1", "A"], ["s2", "A"], ["s3", "A"], *[[f"t{number}", "B"] for number in range(9)]]
    table = write_table(tmp_path / "t.csv", ["subject", "group"], rows)
    with pytest.raises(InputError, match="the group 'A' has 3 subjects; train, val, test need 2 each, so 6"):
        split.split(table, tmp_path / "o", columns_of(Preset.PLAIN, Balance.NONE, *[None] * 6), Shares(0.2, 0.2), 0.05, 5, 1)
    with pytest.raises(InputError, match="the group 'A' has one subject"):
        write_table(table, ["subject", "group"], rows[2:])
        split.split(table, tmp_path / "o", columns_of(Preset.PLAIN, Balance.NONE, *[None] * 6), Shares(0.2, 0.2), 0.05, 5, 1)
    with pytest.raises(MedgenError, match="none of 3 splits gave every side 2 subjects of every group"):
        write_table(table, ["subject", "group"], [[f"{g}{n}", g] for g in "AB" for n in range(6)])
        split.split(table, tmp_path / "o", columns_of(Preset.PLAIN, Balance.NONE, *[None] * 6), Shares(0.9, 0.05), 0.05, 3, 1)


# stack


GOLDEN_SUMS = {256: -44195.1402, 128: -11048.983, 64: -2762.263, 32: -690.540, 16: -172.621, 8: -43.147, 4: -10.781}
GOLDEN_CENTRES = {128: 0.00320551, 64: 0.00688557, 32: 0.00076269, 16: -0.02411448, 8: -0.11540652, 4: -0.36715409}
GOLDEN_CORNERS = {128: -0.99013644, 64: -0.98783875, 32: -0.98538774, 16: -0.97941935, 8: -0.96018481, 4: -0.87983572}


def golden_slice() -> np.ndarray:
    i, j = np.mgrid[:256, :256].astype(np.float64)
    wave = 100 * (1 + np.sin(0.0137 * (256 * i + j)))
    return (wave * np.exp(-((i - 127.5) ** 2 + (j - 127.5) ** 2) / (2 * 60**2))).astype(np.float32)


def save_volume(path: Path, volume: np.ndarray, affine: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4) if affine is None else affine), path)


def head(number: int, shape: tuple[int, int, int] = (12, 14, 5)) -> np.ndarray:
    """Positive everywhere, unlike in every voxel and every volume."""
    return np.random.default_rng(number).uniform(1, 900, shape).astype(np.float32)


def write_cohort(folder: Path, count: int = 12) -> Path:
    """`count` volumes of three quarters as many subjects, in two groups and three splits, the rows mixed."""
    rows = []
    for number in range(count):
        subject = number * 3 // 4
        rows.append([f"vol/{number}.nii.gz", f"s{subject}", ("CN", "AD")[subject % 2], ("train", "train", "test", "val")[subject // 2 % 4]])
        save_volume(folder / rows[-1][0], head(number), np.diag([2.0, 2, 3, 1]))
    return write_table(folder / "t.csv", ["path", "subject", "group", "split"], [rows[position] for position in np.random.default_rng(0).permutation(count)])


def settings_of(folder: Path, size: int = 16, slices: str = "central", clip_negative: bool = False) -> stack.Settings:
    return stack.Settings("path", folder, stack.slice_numbers(slices), size, clip_negative)


def stacked(table: Path, chosen: stack.Settings) -> Path:
    """The folder made from a table, in this process."""
    out = table.parent / f"stack-{len(list(table.parent.iterdir()))}"
    stack.stack(table, out, columns_of(Preset.PLAIN, Balance.NONE, *[None] * 6), chosen, lambda text: None)
    return out


def test_scaling_and_pyramid_give_the_known_numbers(tmp_path: Path) -> None:
    """Through the files: the display of a RAS volume runs backwards, so the known pixels lie on the other side."""
    raw = golden_slice()
    save_volume(tmp_path / "a.nii.gz", np.dstack([raw * 0 + 1, raw, raw * 0 + 1]))
    table = write_table(tmp_path / "t.csv", ["path", "subject", "group"], [["a.nii.gz", "s", "CN"]])
    opened = stacks.open_stack(stacked(table, settings_of(tmp_path, 256)))
    for size in opened.sizes:
        stored = opened.images(size)[0, 0].T[::-1, ::-1]  # nifti[w, h] in the volume's own direction
        assert stored.sum(dtype=np.float64) == pytest.approx(GOLDEN_SUMS[size], abs=0.02 if size == 256 else 2e-3)
        if size == 256:
            assert stored[100, 120] == pytest.approx(0.33747715, abs=1e-5)
        else:
            assert stored[size // 2, size // 2] == pytest.approx(GOLDEN_CENTRES[size], abs=1e-5)
            assert stored[0, 0] == pytest.approx(GOLDEN_CORNERS[size], abs=1e-5)


def test_stack_on_the_command_line(tmp_path: Path, medgen: Medgen) -> None:
    table = read_table(write_cohort(tmp_path))
    done = medgen("prepare", "stack", "t.csv", "--out", "stack", "--size", 16, "--groups", "CN,AD")
    assert "train CN" in done.stdout and "stack: train/, val/, test/, report.json, report.html" in done.stdout
    assert json.loads((tmp_path / "stack" / "train" / "classes.json").read_text()) == {"CN": 0, "AD": 1}
    for side in ("train", "val", "test"):
        rows = [row for row in table if row["split"] == side]
        opened = stacks.open_stack(tmp_path / "stack" / side)
        assert opened.sizes == (4, 8, 16) and opened.class_names == ("CN", "AD")
        assert opened.labels.tolist() == [("CN", "AD").index(row["group"]) for row in rows], "in the order of the table"
        assert list(opened.subjects) == [row["subject"] for row in rows]
        told = read_table(tmp_path / "stack" / side / "images.csv")
        assert [(row["ID"], row["file"], row["slice"], row["group"]) for row in told] == [(str(n), row["path"], "2", row["group"]) for n, row in enumerate(rows)]
        for number, row in enumerate(rows):
            volume = head(int(Path(row["path"]).name.split(".")[0]))
            plane = np.zeros((16, 16), np.float32)
            plane[1:15, 2:14] = volume[::-1, ::-1, 2].T
            half = float(plane.max()) / 2
            assert np.allclose(opened.images(16)[number, 0], (plane - half) / half, atol=1e-6), "slice and label are of the same file"
            assert told[number]["sha256"] == files.sha256_file(tmp_path / row["path"])
    record = json.loads((tmp_path / "stack" / "report.json").read_text())
    assert record["sizes"] == [16, 8, 4] and sum(group["slices"] for side in record["sides"].values() for group in side.values()) == len(table)
    assert (tmp_path / "stack" / "report.html").read_text().count("<img") == len(table) + 3
    stacks.require_disjoint(stacks.open_stack(tmp_path / "stack" / "train"), stacks.open_stack(tmp_path / "stack" / "test"))
    assert "stack exists; name a new folder" in medgen("prepare", "stack", "t.csv", "--out", "stack", expect=2).stderr
    told_text = medgen("prepare", "stack", "t.csv", "--out", "other", "--root", "elsewhere", expect=2).stderr
    assert "12 file(s) are missing" in told_text and "--root" in told_text and not (tmp_path / "other").exists()


def test_the_same_cohort_is_the_same_bytes(tmp_path: Path) -> None:
    table = write_cohort(tmp_path)
    one, other = (stacked(table, settings_of(tmp_path)) for _ in range(2))
    for path in sorted(one.rglob("*")):
        if path.is_file() and path.suffix != ".html":
            assert path.read_bytes() == (other / path.relative_to(one)).read_bytes(), path.name


@pytest.mark.parametrize("turn", [np.diag([-1.0, 1, 1, 1]), np.diag([1.0, 1, -1, 1]), np.array([[0.0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])])
def test_pixels_lie_where_the_affine_says_however_the_file_is_stored(tmp_path: Path, turn: np.ndarray) -> None:
    """The brightest voxel has the same patient coordinates in the volume and in every size large enough to show it."""
    volume = np.ones((12, 14, 5), np.float32)
    volume[3, 10, 2] = 1000
    affine = turn @ np.array([[2.0, 0, 0, -11], [0, 2, 0, 7], [0, 0, 3, 5], [0, 0, 0, 1]])
    save_volume(tmp_path / "a.nii.gz", volume, affine)
    table = write_table(tmp_path / "t.csv", ["path", "subject", "group"], [["a.nii.gz", "s", "CN"]])
    for size in (16, 8):  # padded, and shrunk
        image = nibabel.load(stacked(table, settings_of(tmp_path, size)) / f"Real{size}x{size}.nii.gz")
        stored = np.asarray(image.dataobj)[:, :, 0, 0]
        assert nibabel.aff2axcodes(image.affine)[:2] == ("L", "P"), "columns run to the left, rows to the back"
        weight = np.maximum(stored - np.median(stored), 0) if size == 8 else (stored == stored.max())
        place = np.array([(np.arange(size) @ weight.sum(axis=axis)) / weight.sum() for axis in (1, 0)])
        assert np.allclose((image.affine @ [*place, 0, 1])[:3], (affine @ [3, 10, 2, 1])[:3], atol=0.05 if size == 16 else 1.0)


def test_chosen_slices_of_one_volume(tmp_path: Path) -> None:
    table = write_cohort(tmp_path, count=8)
    out = stacked(table, settings_of(tmp_path, slices="1,3"))
    told = read_table(out / "train" / "images.csv")
    assert [row["slice"] for row in told] == ["1", "3"] * (len(told) // 2) and [row["file"] for row in told[::2]] == [row["file"] for row in told[1::2]]
    volume = head(int(Path(told[0]["file"]).name.split(".")[0]))
    for number, place in enumerate((1, 3)):
        assert stacks.open_stack(out / "train").images(16)[number].max() == 1
        assert np.unravel_index(stacks.open_stack(out / "train").images(16)[number, 0, 1:15, 2:14].argmax(), (14, 12)) == np.unravel_index(volume[::-1, ::-1, place].T.argmax(), (14, 12))


def test_what_is_too_large_is_shrunk_antialiased_and_stays_in_range(tmp_path: Path) -> None:
    stripes = np.zeros((40, 30, 1), np.float32)
    stripes[::2] = 100
    save_volume(tmp_path / "a.nii.gz", stripes)
    table = write_table(tmp_path / "t.csv", ["path", "subject", "group"], [["a.nii.gz", "s", "CN"]])
    image = stacks.open_stack(stacked(table, settings_of(tmp_path, 8))).images(8)[0, 0]
    assert image.max() == 1 and image.min() >= -1
    inside = image[2:6, 2:6]
    assert inside.std() < 0.02, "stripes thinner than a pixel become grey, not other stripes"


def test_pictures_grey_and_colour(tmp_path: Path) -> None:
    from PIL import Image as Pictures

    colour = np.random.default_rng(0).integers(0, 255, (9, 11, 3), np.uint8)
    for name in ("a.png", "b.jpg", "c.png"):
        Pictures.fromarray(colour).save(tmp_path / name)
    table = write_table(tmp_path / "t.csv", ["path", "subject", "group"], [["a.png", "s", "x"], ["b.jpg", "t", "y"], ["c.png", "u", "y"]])
    out = stacked(table, settings_of(tmp_path, 16))
    images = stacks.open_stack(out).images(16)
    half = colour.max() / 2
    assert images.shape == (3, 3, 16, 16)
    assert np.allclose(images[0][:, 3:12, 2:13], (colour.transpose(2, 0, 1) - half) / half, atol=1e-6), "the picture as it is, upright"
    Pictures.fromarray(colour[..., 0]).save(tmp_path / "c.png")
    with pytest.raises(InputError, match=r"c.png has 1 channel\(s\), but .*a.png has 3; make all of them grey"):
        stacked(table, settings_of(tmp_path, 16))
    Pictures.fromarray(colour).convert("CMYK").save(tmp_path / "b.jpg")
    with pytest.raises(InputError, match=r"b.jpg: is a CMYK picture; allowed are grey"):
        stacked(table, settings_of(tmp_path, 16))


def test_slices_that_cannot_be_scaled(tmp_path: Path) -> None:
    table = write_cohort(tmp_path, count=8)
    first = tmp_path / read_table(table)[0]["path"]
    volume = head(0)
    volume[2, 3, 2] = -7
    save_volume(first, volume, np.diag([2.0, 2, 3, 1]))
    with pytest.raises(InputError, match=r"nii.gz, slice 2: 1 pixels are negative \(down to -7\).*--clip-negative"):
        stacked(table, settings_of(tmp_path))
    stacked(table, settings_of(tmp_path, clip_negative=True))
    volume[:, :, 2] = 0
    save_volume(first, volume, np.diag([2.0, 2, 3, 1]))
    with pytest.raises(InputError, match=r"nii.gz, slice 2: nothing in it is above 0; choose another slice with --slices, or remove line 2"):
        stacked(table, settings_of(tmp_path))
    assert not list(tmp_path.glob(".stack*")), "nothing half-written stays"
    with pytest.raises(InputError, match=r"no axial slice 9; it has 5, numbered 0 to 4: choose with --slices"):
        stacked(table, settings_of(tmp_path, slices="1,9"))


def test_what_is_refused_before_any_voxel_is_read(tmp_path: Path) -> None:
    table = write_cohort(tmp_path, count=8)
    rows = [list(row.values()) for row in read_table(table)]
    header = ["path", "subject", "group", "split"]

    def refused(changed: list[list[str]], pattern: str) -> None:
        write_table(table, header, changed)
        with pytest.raises(InputError, match=pattern):
            stacked(table, settings_of(tmp_path))

    refused([*rows, [rows[0][0], "new", "CN", "train"]], r"nii.gz stands in more than one line")
    refused([*rows[:-1], ["", *rows[-1][1:]]], r"t.csv:9: path is empty")
    refused([*rows[:-1], [*rows[-1][:3], "training"]], r"t.csv:9: split is 'training'; write one of train, val, test")
    refused([*rows[:-1], ["none.nii.gz", *rows[-1][1:]]], r"1 file\(s\) are missing")
    twice = next(row for row in rows if sum(other[1] == row[1] for other in rows) > 1)
    refused([[*row[:3], "val" if row is twice else row[3]] for row in rows], rf"subject {twice[1]} is in (val|train|test), but in (val|train|test) in line")
    refused([[*row[:3], "test" if row[2] == "AD" else "train"] for row in rows], r"no line of the split train is in the group 'AD'")
    save_volume(tmp_path / rows[0][0], head(0, (12, 15, 5)), np.diag([2.0, 2, 3, 1]))
    refused(rows, r"the volumes must be registered: .* has shape")
    save_volume(tmp_path / rows[0][0], head(0), np.diag([2.0, 2, 4, 1]))
    refused(rows, r"the volumes must be registered: .* have different affines")
    for text in ("", "a", "1,1", "-3", "1, 2"):
        with pytest.raises(InputError, match="--slices"):
            stack.slice_numbers(text)
    for size in (0, 3, 48, -8):
        with pytest.raises(InputError, match="power of two"):
            settings_of(tmp_path, size)
