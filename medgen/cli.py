"""The command line: one small function per verb, no logic. `medgen` and `python -m medgen` start here.

Heavy imports stand inside the verbs, so that `medgen --help` answers at once."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from medgen import __version__, names, redact
from medgen.errors import Exit, InputError, MedgenError
from medgen.prepare.table import Balance, Preset
from medgen.weights import State

EPILOG = "Exit codes: 0 done, 1 a stage failed, 2 wrong input, 3 interrupted (run it again to go on), 4 not finished yet (watch --once)."

app = typer.Typer(
    help="Synthetic medical images from one job spec: train, generate, evaluate, report.",
    epilog=EPILOG, no_args_is_help=True, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]},
)

prepare = typer.Typer(help="From a raw cohort to files for training: match groups, split by subject, stack slices.", no_args_is_help=True)
app.add_typer(prepare, name="prepare", rich_help_panel="Data")
weights = typer.Typer(help="Published weights of networks in $MEDGEN_WEIGHTS: which are there, and are they what they should be.", no_args_is_help=True)
app.add_typer(weights, name="weights", rich_help_panel="Data")

SpecPath = Annotated[Path, typer.Argument(metavar="SPEC", help="the job spec, a YAML file", show_default=False)]
Override = Annotated[list[str] | None, typer.Option("--override", "-o", help="change one value: -o stages.train.config.lr=1e-4", show_default=False)]
SiteName = Annotated[str | None, typer.Option("--site", help="site profile: a name from cluster/, or a path", show_default=False)]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="a run: its name, id or folder", show_default=False)]
StageName = Annotated[str | None, typer.Option("--stage", help="which stage; needed if there are several of this kind", show_default=False)]
Shard = Annotated[int, typer.Option("--shard", help="which shard of the stage")]
Attempt = Annotated[int, typer.Option("--attempt", hidden=True)]
Again = Annotated[bool, typer.Option("--again", help="do it anew even if it is done")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON for scripts")]
TablePath = Annotated[Path, typer.Argument(metavar="TABLE", help="a CSV file with one row per image", show_default=False)]
NewFolder = Annotated[Path, typer.Option("--out", help="the folder to make; it must not exist", show_default=False)]
PresetName = Annotated[Preset, typer.Option("--preset", help="the columns' names: subject, group, sex, age; or Subject, Group, Sex, Age, Image Data ID of ADNI")]
SubjectColumn = Annotated[str | None, typer.Option("--subject", metavar="COLUMN", help="who is shown", show_default=False)]
GroupColumn = Annotated[str | None, typer.Option("--group", metavar="COLUMN", help="what the classes are", show_default=False)]
ImageColumn = Annotated[str | None, typer.Option("--image", metavar="COLUMN", help="what names each image once", show_default=False)]
SexColumn = Annotated[str | None, typer.Option("--sex", metavar="COLUMN", show_default=False)]
AgeColumn = Annotated[str | None, typer.Option("--age", metavar="COLUMN", help="years", show_default=False)]
Groups = Annotated[str | None, typer.Option("--groups", metavar="A,B", help="only these, in this order; default: all (adni: CN,AD)", show_default=False)]
BalanceOf = Annotated[Balance, typer.Option("--balance", help="what is compared")]
Seed = Annotated[int, typer.Option("--seed", min=0)]
CLICKS_INTERRUPTED = 130  # how the library of the command line ends at Ctrl-C
OF_STAGE = {"run", "stage", "shard", "attempt", "again"}  # parameters of `evaluate` that are of a run


def _version(wanted: bool) -> None:
    if wanted:
        print(f"medgen {__version__}")
        raise typer.Exit


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")] = False) -> None:
    pass


@app.command(rich_help_panel="Jobs")
def submit(
    spec: SpecPath, override: Override = None, site: SiteName = None,
    local: Annotated[bool, typer.Option("--local", help="run on this machine, which is the default where there is no sbatch")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan and every script, change nothing")] = False,
    detach: Annotated[bool, typer.Option("--detach", help="return at once; the run goes on when the terminal closes")] = False,
    as_json: AsJson = False,
) -> None:
    """Check a spec and queue all of it on Slurm, or run it here: train, generate, collect, evaluate, report. The same spec again goes on where it stopped."""
    from medgen import rundir
    from medgen.launch import verbs
    from medgen.watch import live

    code = verbs.submit(
        spec, override or [], site, rundir.runs_root(),
        display=live.display, watch=live.watch, here=local, dry_run=dry_run, detached=detach, as_json=as_json,
    )
    raise typer.Exit(code)


@app.command(rich_help_panel="Jobs")
def check(
    spec: SpecPath, override: Override = None, site: SiteName = None,
    local: Annotated[bool, typer.Option("--local", help="for this machine, which is the default where there is no sbatch")] = False,
    as_json: AsJson = False,
) -> None:
    """Try a spec before it is queued: every volume, the disk, Slurm's answer to every job, one step of every model; changes nothing but the cache."""
    from medgen import checks

    told = checks.check(spec, override or [], site, local)
    _print(told, as_json)
    raise typer.Exit(told.exit)


@app.command("find-lr", rich_help_panel="Jobs")
def find_lr(
    spec: SpecPath, override: Override = None, stage: StageName = None,
    steps: Annotated[int | None, typer.Option("--steps", min=20, max=10_000, help="how many rates are tried; default: as the configuration says, else 100", show_default=False)] = None,
    out: Annotated[Path, typer.Option("--out", help="the folder to make; it must not exist")] = Path("find_lr"),
) -> None:
    """Look for the learning rate of a train stage: a sweep over a model that is thrown away, its curve, a suggestion. No run is made."""
    from medgen import find_lr as finding

    print(names.printable(finding.find_lr(spec, override or [], stage, steps, out)))


@app.command("find-steps", rich_help_panel="Jobs")
def find_steps(
    run: RunName, stage: StageName = None,
    sampler: Annotated[str | None, typer.Option("--sampler", metavar="A,B", help="which samplers are compared; default: that of the stage", show_default=False)] = None,
    low: Annotated[int, typer.Option("--low", min=1, help="fewest steps")] = 5,
    high: Annotated[int, typer.Option("--high", min=1, help="most steps")] = 100,
    images: Annotated[int, typer.Option("--images", min=16, max=2048, help="drawn at every number of steps")] = 256,
    against: Annotated[Literal["train", "val", "test"], typer.Option("--against", help="the split of the real images; test is refused")] = "val",
    extractor: Annotated[str | None, typer.Option("--extractor", help="whose features are compared; default: that of the run's evaluation, else encoder", show_default=False)] = None,
) -> None:
    """Look for the number of sampling steps of a trained model: the fewest whose images cannot be told from the best by KID to held-out ones."""
    from medgen import find_steps as finding

    samplers = None if sampler is None else [name.strip() for name in sampler.split(",")]
    print(names.printable(finding.find_steps(run, finding.Asked(stage, samplers, low, high, images, against, extractor))))


@app.command(rich_help_panel="Jobs")
def privacy(
    spec: SpecPath, override: Override = None,
    stage: Annotated[str | None, typer.Option("--stage", help="only this one; default: every train stage that is private", show_default=False)] = None,
) -> None:
    """Price the differentially private trainings of a spec before they run: their epsilon, and the noise, steps and batches of others."""
    from medgen import price

    print(names.printable(price.privacy(spec, override or [], stage)))


@app.command(rich_help_panel="Jobs")
def watch(
    run: RunName, as_json: AsJson = False,
    once: Annotated[bool, typer.Option("--once", help="print the state once and leave")] = False,
) -> None:
    """Show what runs, how far it is, what failed and why. q or Ctrl-C leaves; the jobs go on."""
    from medgen import rundir
    from medgen.watch import live

    raise typer.Exit(live.watch(rundir.find_run(run), once=once, as_json=as_json))


@app.command("logs", rich_help_panel="Jobs")
def show_logs(
    what: Annotated[str, typer.Argument(metavar="RUN[/STAGE[/SHARD]]", help="a run, or one stage or shard of it", show_default=False)],
    follow: Annotated[bool, typer.Option("-f", "--follow", help="go on as it grows, also over restarts, until the task is over")] = False,
    rank: Annotated[int | None, typer.Option("--rank", min=0, help="of this rank; default: the one that failed, else 0", show_default=False)] = None,
    attempt: Annotated[int | None, typer.Option("--attempt", min=0, help="counted from 0, as in the log's name; default: the last", show_default=False)] = None,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="how many lines from the end")] = 50,
) -> None:
    """Print the log that matters most: of what failed, else of what runs. Its path goes to stderr."""
    from medgen.watch import logs

    raise typer.Exit(logs.logs(what, follow, rank, attempt, lines))


@app.command(rich_help_panel="Jobs")
def why(run: RunName, as_json: AsJson = False) -> None:
    """Tell what failed or cannot start, the records that say so, and what to do. Exit code 1 if anything did."""
    from medgen import rundir
    from medgen.watch import why as asking

    raise typer.Exit(asking.why(rundir.find_run(run), as_json))


@app.command(rich_help_panel="Jobs")
def usage(run: RunName, as_json: AsJson = False) -> None:
    """Add up the GPU-hours of a run by stage: what they made, what was lost and why, how well they were used, how long it waited."""
    from medgen import rundir
    from medgen.watch import usage as accounts

    accounts.usage(rundir.find_run(run), as_json)


@app.command(rich_help_panel="Jobs")
def tensorboard(
    run: Annotated[list[str], typer.Argument(metavar="RUN...", help="runs: names, ids or folders", show_default=False)],
    port: Annotated[int | None, typer.Option("--port", min=1024, max=65535, help="default: the first free one from 6006 on", show_default=False)] = None,
    here: Annotated[bool, typer.Option("--here", help="on this machine, which is the default")] = False,
    job: Annotated[bool, typer.Option("--job", help="in a small CPU job on the cluster, for eight hours")] = False,
    site: SiteName = None,
) -> None:
    """Show the training curves of runs in TensorBoard, and how to reach it from your own machine."""
    from medgen import rundir
    from medgen.watch import tensorboard as board

    board.tensorboard([rundir.find_run(name) for name in run], port, here, job, site)


@app.command("ls", rich_help_panel="Jobs")
def list_runs(
    name: Annotated[str | None, typer.Argument(metavar="[SWEEP]", help="with --sweep: only this one", show_default=False)] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="the points of each sweep side by side, with their scores")] = False,
    as_json: AsJson = False,
) -> None:
    """List the runs of this folder (or of $MEDGEN_RUNS)."""
    from medgen.watch import live
    from medgen.watch import sweep as sweeps

    if name is not None and not sweep:
        raise InputError(f"{name}: a name goes with --sweep; for one run: medgen watch {name}")
    raise typer.Exit(sweeps.list_sweeps(name, as_json) if sweep else live.list_runs(as_json))


@app.command(rich_help_panel="Jobs")
def study(sweep: Annotated[str, typer.Argument(metavar="SWEEP", help="the name of its spec", show_default=False)], out: NewFolder) -> None:
    """Draw the scores of a sweep against each value that was varied, with a table, and name the best point by validation."""
    from medgen.watch import study as studies

    print(redact.text(studies.study(sweep, out)))


@app.command(rich_help_panel="Jobs")
def compare(
    run: Annotated[list[str], typer.Argument(metavar="RUN...", help="runs, or folders that `medgen evaluate` made", show_default=False)], as_json: AsJson = False,
) -> None:
    """Put the scores of several runs side by side: only what was measured alike, and which differences are larger than their noise."""
    from medgen.watch import compare as comparing

    comparing.compare(run, as_json)


@app.command(rich_help_panel="Jobs")
def fsck(
    run: RunName, as_json: AsJson = False,
    clean: Annotated[bool, typer.Option("--clean", help="delete what is listed as safe, without asking")] = False,
) -> None:
    """Read a whole run again: what is damaged, what the next submit will do about it, what is safe to delete. Exit code 1 if anything is."""
    from medgen import fsck as checking

    raise typer.Exit(checking.fsck(run, clean, as_json))


@app.command(rich_help_panel="Jobs")
def cancel(run: RunName) -> None:
    """Stop a run; what is finished stays, and submitting the spec again goes on."""
    from medgen import rundir
    from medgen.launch import verbs

    print(verbs.cancel(rundir.find_only_run(run)))


@app.command(rich_help_panel="Jobs")
def nodes(
    avoid: Annotated[str | None, typer.Option("--avoid", metavar="NODE", help="keep away from it for a week", show_default=False)] = None,
    reason: Annotated[str | None, typer.Option("--reason", help="why, for whoever reads it later", show_default=False)] = None,
    forget: Annotated[str | None, typer.Option("--forget", metavar="NODE", help="use it again", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """List the nodes that failed tasks of this folder's runs: new jobs keep away from them for a week."""
    from medgen.launch import verbs

    verbs.nodes(avoid, reason, forget, as_json)


@app.command("import", rich_help_panel="Jobs")
def import_files(
    paths: Annotated[list[Path], typer.Argument(metavar="FILE...", help="sbatch scripts; or config.json, or generator_best.pt and discriminator_best.pt of the published PACGAN", show_default=False)],
    out: Annotated[Path | None, typer.Option("--out", help="folder of the specs (default: jobs), or a name that ends in .yaml; of weights: folder of the checkpoint", show_default=False)] = None,
    portable: Annotated[bool, typer.Option("--portable", help="scripts: resources in portable words and a site profile, instead of the directives as they are")] = False,
    size: Annotated[int | None, typer.Option("--size", metavar="PIXELS", help="weights: what size they were trained to; default: what their folder or their layers say", show_default=False)] = None,
) -> None:
    """Turn sbatch scripts or a published configuration into job specs, published weights into a checkpoint; what has no equivalent is listed."""
    from medgen.importing import run_import

    print(names.printable(redact.text(run_import(paths, out, portable, size))))


@app.command(rich_help_panel="Stages (what every backend calls)")
def train(run: RunName, stage: StageName = None, shard: Shard = 0, attempt: Attempt = 0) -> None:
    """Train a model, or go on where an earlier attempt stopped."""
    _perform("train", run, stage, shard, attempt)


@app.command(rich_help_panel="Stages (what every backend calls)")
def generate(run: RunName, stage: StageName = None, shard: Shard = 0, attempt: Attempt = 0) -> None:
    """Make one shard of images."""
    _perform("generate", run, stage, shard, attempt)


@app.command(rich_help_panel="Stages (what every backend calls)")
def collect(run: RunName, stage: StageName = None, shard: Shard = 0, attempt: Attempt = 0, again: Again = False) -> None:
    """Verify what the tasks of a stage made: publish images as one dataset, or compute the scores of trials."""
    _perform("collect", run, stage, shard, attempt, again)


@app.command(rich_help_panel="Data")
def evaluate(
    context: typer.Context,
    run: Annotated[str, typer.Argument(metavar="SYNTHETIC", help="a folder of images; or a run, whose evaluate stage is then done", show_default=False)],
    real: Annotated[Path | None, typer.Argument(metavar="REAL", help="a folder of real images to compare with; or a job spec, whose test split it is then", show_default=False)] = None,
    out: Annotated[Path, typer.Option("--out", help="the folder to make; it must not exist")] = Path("evaluation"),
    train: Annotated[Path | None, typer.Option("--train", metavar="FOLDER", help="what the model was trained on: looks for copies", show_default=False)] = None,
    pair: Annotated[Literal["name", "index"] | None, typer.Option("--pair", help="each image belongs to the real one of the same name, or place", show_default=False)] = None,
    metrics: Annotated[str | None, typer.Option("--metrics", metavar="A,B", help="default: all that can be computed here", show_default=False)] = None,
    extractor: Annotated[str | None, typer.Option("--extractor", help="whose features are compared, or {kind: torchscript, file: F, size: 224, range: [0, 1]}; default: inception if its weights are here", show_default=False)] = None,
    lpips: Annotated[Literal["alex", "vgg", "squeeze"] | None, typer.Option("--lpips", help="also LPIPS, by this network: medgen weights", show_default=False)] = None,
    allow_small_n: Annotated[bool, typer.Option("--allow-small-n", help="a Frechet distance of few images, under a name that says so")] = False,
    synthetic_masks: Annotated[Path | None, typer.Option("--synthetic-masks", metavar="FOLDER", help="masks with the names of the images", show_default=False)] = None,
    real_masks: Annotated[Path | None, typer.Option("--real-masks", metavar="FOLDER", show_default=False)] = None,
    train_masks: Annotated[Path | None, typer.Option("--train-masks", metavar="FOLDER", show_default=False)] = None,
    positive_only: Annotated[bool, typer.Option("--positive-only", help="only images whose mask is not empty")] = False,
    by: Annotated[Literal["class", "lesion_size"] | None, typer.Option("--by", help="also each group alone", show_default=False)] = None,
    size: Annotated[int | None, typer.Option("--size", metavar="PIXELS", min=8, max=2048, help="bring all images to one size", show_default=False)] = None,
    window: Annotated[str | None, typer.Option("--window", metavar="LOW,HIGH", help="what is black and white in NIfTI and npy", show_default=False)] = None,
    gray: Annotated[bool, typer.Option("--gray", help="colour pictures as gray ones")] = False,
    patient: Annotated[str | None, typer.Option("--patient", metavar="REGEX", help="its group is the patient, in a file's path", show_default=False)] = None,
    channel: Annotated[str | None, typer.Option("--channel", metavar="NAME", help="with the data of a job: which of its images these are", show_default=False)] = None,
    unlike_files: Annotated[bool, typer.Option("--unlike-files", help="compare 8 with 16 bits, or JPEG with PNG, all the same")] = False,
    seed: Seed = 42, stage: StageName = None, shard: Shard = 0, attempt: Attempt = 0, again: Again = False,
) -> None:
    """Compare any two folders of images: FID, KID, SSIM and more, each beside its real-real floor. With a run alone: do its evaluate stage."""
    given = {name for name in context.params if _was_given(context, name)}
    if real is None:
        if Path(run).is_dir() and not (Path(run) / "plan.json").is_file():
            raise InputError(f"{run}: a folder, and no run; name the folder of real images as well: medgen evaluate {run} REAL")
        _refuse(given - OF_STAGE, "is for two folders, medgen evaluate SYNTHETIC REAL; what the evaluate stage of a run does stands in its spec")
        _perform("evaluate", run, stage, shard, attempt, again)
        return
    _refuse((given & OF_STAGE) - {"run"}, "is for the evaluate stage of a run: medgen evaluate RUN")
    from medgen import two_folders

    asked = {"metrics": metrics and [name.strip() for name in metrics.split(",")], "extractor": extractor, "lpips": lpips, "by": by, "positive_only": positive_only, "allow_small_n": allow_small_n}
    print(names.printable(two_folders.evaluate(
        Path(run), real, out, train=train, masks=(synthetic_masks, real_masks, train_masks), pair=pair, size=size, window=window, gray=gray, patient=patient,
        channel=channel, unlike_files=unlike_files, measures={name: value for name, value in asked.items() if value}, seed=seed,
    )))  # fmt: skip


@app.command(rich_help_panel="Stages (what every backend calls)")
def features(run: RunName, stage: StageName = None, shard: Shard = 0, attempt: Attempt = 0) -> None:
    """Take one share of the features that an evaluate stage compares."""
    _perform("features", run, stage, shard, attempt)


@app.command(rich_help_panel="Stages (what every backend calls)")
def structure(run: RunName, stage: StageName = None, shard: Shard = 0, attempt: Attempt = 0) -> None:
    """Train a segmenter on real images, and ask it for the masks of synthetic ones: one seed."""
    _perform("structure", run, stage, shard, attempt)


@app.command(rich_help_panel="Stages (what every backend calls)")
def utility(run: RunName, stage: StageName = None, shard: Shard = 0, attempt: Attempt = 0) -> None:
    """Train a classifier or segmenter on one mixture of real and synthetic images, and test it on real ones: one arm, one seed."""
    _perform("utility", run, stage, shard, attempt)


@app.command(rich_help_panel="Stages (what every backend calls)")
def report(run: RunName, stage: StageName = None, shard: Shard = 0, attempt: Attempt = 0, again: Again = False) -> None:
    """Write the run's page: pictures, curves, scores, provenance."""
    _perform("report", run, stage, shard, attempt, again)


@app.command(rich_help_panel="Stages (what every backend calls)")
def command(run: RunName, stage: StageName = None, shard: Shard = 0, attempt: Attempt = 0, again: Again = False) -> None:
    """Run a stage that is a shell command."""
    _perform("command", run, stage, shard, attempt, again)


@app.command(hidden=True)
def attempt(
    moment: Annotated[str, typer.Argument(metavar="begin|end|refused")], run: RunName,
    stage: Annotated[str, typer.Option("--stage")], shard: Annotated[int, typer.Option("--shard")], number: Annotated[int, typer.Option("--attempt")],
    exit_code: Annotated[int, typer.Option("--exit-code")] = 0, started: Annotated[float, typer.Option("--started")] = 0,
    job: Annotated[str, typer.Option("--job")] = "",
) -> None:
    """What job scripts on a cluster call: tell that an attempt begins, or how it ended and whether to start again."""
    from medgen.launch import attempt as attempts
    from medgen.rundir import RunDir

    folder = RunDir(Path(run))
    if moment == "end":
        raise typer.Exit(attempts.end(folder, stage, shard, number, exit_code, started, job))
    raise typer.Exit({"begin": attempts.begin, "refused": attempts.refused}[moment](folder, stage, shard, number))


@app.command(rich_help_panel="Data")
def data(
    spec: SpecPath, override: Override = None, as_json: AsJson = False,
    out: Annotated[Path, typer.Option("--out", help="folder for the contact sheet and the histogram")] = Path("data_summary"),
) -> None:
    """Show what the spec's data are: patients and slices per split, sizes, spacings, intensities, a contact sheet."""
    from medgen import checks

    checks.show_data(spec, override or [], out, as_json)


@app.command(rich_help_panel="Data")
def phantoms(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="the folder to make; it must not exist", show_default=False)],
    patients: Annotated[int, typer.Option(min=3, help="how many patients to draw")] = 16,
    seed: Annotated[int, typer.Option(min=0)] = 42,
    kind: Annotated[Literal["brain", "cardiac"], typer.Option("--kind", help="brain: <split>/<patient>/*.nii.gz; cardiac: <date>/Patient (N)/T1_Mapping_/*.dcm with contours")] = "brain",
) -> None:
    """Draw brain-like volumes (bravo, t1_pre, t1_gd and lesion masks) as NIfTI, or cardiac T1 and T2 maps as DICOM, to try everything without data."""
    from medgen import files
    from medgen.data.cardiac_phantoms import TRUTH, write_cardiac_phantoms
    from medgen.data.phantoms import TABLE, write_phantoms, write_table

    if folder.exists():
        raise InputError(f"{folder} exists; name a new folder, two cohorts must not mix")
    with files.folder_in_one_move(folder) as temporary:
        if kind == "cardiac":
            write_cardiac_phantoms(temporary, patients, seed)
        else:
            write_phantoms(temporary, patients, seed)
            write_table(temporary)
    listed = f"areas and times as drawn in {folder / TRUTH}" if kind == "cardiac" else f"their bravo volumes by line in {folder / TABLE}"
    print(f"{patients} patients in {folder}; {listed}")


@app.command(rich_help_panel="Data")
def classify(
    which: Annotated[str, typer.Argument(metavar="RUN", help="a run, or the folder of a checkpoint", show_default=False)],
    images: Annotated[Path, typer.Argument(metavar="IMAGES", help="a NIfTI stack [W, H, channels, N] in [-1, 1], or a folder of `prepare stack`", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="the folder to make; it must not exist")] = Path("predictions"),
    stage: StageName = None,
    checkpoint: Annotated[str, typer.Option("--checkpoint", help="last, or best-<metric>, such as best-auc_64px")] = "last",
    labels: Annotated[Path | None, typer.Option("--labels", help="ID, Label, Subject_ID of the images; default: labels.csv beside them", show_default=False)] = None,
) -> None:
    """Tell the class of each image by a trained model; with labels also how right it is: ROC, confusion matrix, calibration."""
    from medgen import classify as classifying

    print(names.printable(classifying.classify(which, images, stage, checkpoint, labels, out)))


@prepare.command("match")
def prepare_match(
    table: TablePath, out: NewFolder, preset: PresetName = Preset.PLAIN,
    subject: SubjectColumn = None, group: GroupColumn = None, image: ImageColumn = None, sex: SexColumn = None, age: AgeColumn = None,
    groups: Groups = None, balance: BalanceOf = Balance.BOTH,
    max_smd: Annotated[float, typer.Option("--max-smd", min=0, help="every standardised mean difference must lie below")] = 0.1,
    min_p: Annotated[float, typer.Option("--min-p", min=0, max=1, help="every p-value must lie above")] = 0.05,
    max_removed: Annotated[float, typer.Option("--max-removed", min=0, max=1, help="share of the subjects of any group that may go")] = 0.5,
    seed: Seed = 42,
) -> None:
    """Remove subjects until the groups are alike in age and sex. Exit code 1, and nothing written, if that is not possible."""
    from medgen.prepare import match
    from medgen.prepare import table as tables

    columns = tables.columns_of(preset, balance, subject, group, image, sex, age, groups)
    print(names.printable(match.match(table, out, columns, balance, match.Limits(max_smd, min_p), max_removed, seed)))


@prepare.command("split")
def prepare_split(
    table: TablePath, out: NewFolder, preset: PresetName = Preset.PLAIN,
    subject: SubjectColumn = None, group: GroupColumn = None, image: ImageColumn = None, sex: SexColumn = None, age: AgeColumn = None,
    groups: Groups = None, balance: BalanceOf = Balance.BOTH,
    test: Annotated[float, typer.Option("--test", min=0, max=1, help="share of all images")] = 0.2,
    val: Annotated[float, typer.Option("--val", min=0, max=1, help="share of all images")] = 0.16,
    min_p: Annotated[float, typer.Option("--min-p", min=0, max=1, help="every p-value must lie above")] = 0.05,
    tries: Annotated[int, typer.Option("--tries", min=1, help="how many splits to look at")] = 100,
    seed: Seed = 42,
) -> None:
    """Split by subject into train, val and test, balanced in group, age and sex. Exit code 1, and nothing written, if no split is."""
    from medgen.prepare import split
    from medgen.prepare import table as tables

    columns = tables.columns_of(preset, balance, subject, group, image, sex, age, groups)
    print(names.printable(split.split(table, out, columns, split.Shares(test, val), min_p, tries, seed)))


@prepare.command("stack")
def prepare_stack(
    table: TablePath, out: NewFolder, preset: PresetName = Preset.PLAIN,
    subject: SubjectColumn = None, group: GroupColumn = None, groups: Groups = None,
    path: Annotated[str, typer.Option("--path", metavar="COLUMN", help="the files: volumes, or pictures")] = "path",
    root: Annotated[Path | None, typer.Option("--root", help="what relative paths count from; default: the table's folder", show_default=False)] = None,
    slices: Annotated[str, typer.Option("--slice", "--slices", metavar="N,N", help="axial slices, counted from the lowest, from 0 on")] = "central",
    size: Annotated[int, typer.Option("--size", help="pixels of the largest size, a power of two; halves down to 4 come with it")] = 256,
    clip_negative: Annotated[bool, typer.Option("--clip-negative", help="set negative pixels to 0 instead of refusing them")] = False,
) -> None:
    """Stack axial slices of registered volumes, per split and at every size, with labels.csv; a table with a column split makes a folder of each."""
    from medgen.prepare import stack
    from medgen.prepare import table as tables

    columns = tables.columns_of(preset, Balance.NONE, subject, group, None, None, None, groups)
    settings = stack.Settings(path, root if root is not None else table.parent, stack.slice_numbers(slices), size, clip_negative)
    print(names.printable(stack.stack(table, out, columns, settings, print)))


@weights.command("list")
def weights_list(as_json: AsJson = False) -> None:
    """Show which files are there, what each is for, and where the missing ones come from. Sizes are compared, hashes not."""
    from medgen import weights as published

    _show_weights(published.states(read_all=False), as_json)


@weights.command("add")
def weights_add(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="as its authors publish it", show_default=False)],
    name: Annotated[str | None, typer.Option("--name", help="which weights it is; default: what its tensors say", show_default=False)] = None,
) -> None:
    """Check that a file is what it claims to be, copy it into the folder and record its hash: later uses must find the same."""
    from medgen import weights as published

    added = published.add(file, name)
    print(f"{added.entry.name} for {added.entry.purpose}: {names.printable(str(added.file))}, sha256 {added.digits}")


@weights.command("verify")
def weights_verify(as_json: AsJson = False) -> None:
    """Read every file again and compare its hash. Exit code 1 if one has changed."""
    from medgen import weights as published

    found = published.states(read_all=True)
    _show_weights(found, as_json)
    raise typer.Exit(Exit.FAILED if any(state.mark == "changed" for state in found) else Exit.DONE)


def _show_weights(found: list[State], as_json: bool) -> None:
    from medgen import weights as published

    if as_json:
        print(json.dumps([state.record for state in found], indent=1))
    else:
        published.show(found)


def _perform(kind: str, run: str, stage: str | None, shard: int, attempt: int, again: bool = False) -> None:
    from medgen import rundir, task

    raise typer.Exit(task.perform(rundir.find_run(run), kind, stage, shard, attempt, again))


def _was_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _refuse(given: set[str], why: str) -> None:
    """Options that would have no effect."""
    if given:
        raise InputError(f"--{sorted(given)[0].replace('_', '-')} {why}")


def _print(value: Any, as_json: bool) -> None:
    """A record as JSON, or its text."""
    print(json.dumps(value.record, indent=1) if as_json else value.text)


def main() -> None:
    """Run the command line; every foreseen failure is one message and an exit code."""
    try:
        app()
    except SystemExit as ended:
        if ended.code == CLICKS_INTERRUPTED:
            print("medgen: interrupted", file=sys.stderr)
            sys.exit(Exit.INTERRUPTED)
        raise
    except MedgenError as error:
        print(f"medgen: {names.printable(redact.text(str(error)))}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # `medgen ls | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(Exit.DONE)
    except OSError as error:
        from medgen.task import explain_os_error

        print(f"medgen: {names.printable(redact.text(explain_os_error(error)))}", file=sys.stderr)
        sys.exit(Exit.BAD_INPUT)
    except KeyboardInterrupt:
        print("medgen: interrupted", file=sys.stderr)
        sys.exit(Exit.INTERRUPTED)
