"""A published configuration as one job spec: every number in its place, and beside it the option that it comes from. Called by importing.py."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field

from medgen import document, spec
from medgen.errors import InputError
from medgen.launch.importing.writing import comment_lines, text_scalar, value_scalar
from medgen.models.pacgan.config import FIRST_SIZE
from medgen.published.folders import Data, data_of
from medgen.published.options import DEFAULTS, Note, Options
from medgen.spec import RUN_NAME

TRAIN_TIME, IMAGES_TIME = "12h", "1h"


def folder_of_weights(size: int) -> str:
    """Where the weights of a size are converted to, and where a spec that goes on from them looks for them."""
    return f"weights/pacgan_{size}px"


def channel_names(count: int) -> tuple[str, ...]:
    """Of grey or coloured images."""
    return ("red", "green", "blue") if count == 3 else ("image",)


@dataclass
class Job:
    """A spec in the making. `left_out`: options that stand nowhere in it, and why."""

    options: Options
    data: Data
    notes: list[Note] = field(default_factory=list)
    left_out: list[Note] = field(default_factory=list)
    stages: list[str] = field(default_factory=list)  # in a few words each

    @property
    def name(self) -> str:
        name = re.sub(r"[^A-Za-z0-9_-]+", "_", f"pacgan_{self.data.name}")[:60]
        assert RUN_NAME.fullmatch(name)
        return name

    def note(self, option: str, text: str) -> None:
        self.notes.append(Note(option, text))

    def leave_out(self, option: str, text: str) -> None:
        self.left_out.append(Note(option, text))


def job_of(options: Options) -> tuple[Job, str]:
    """And the text of its spec. Raises InputError if medgen would refuse it."""
    data = data_of(options)
    job = Job(options, data, [*options.notes, *data.notes])
    body = [*_data_lines(job), "stages:", *_train_lines(job), *_images_lines(job), "  report: {kind: report}"]
    job.stages.append("report")
    for name in ("IMAGE_DIRECTORY", "MODEL_DIRECTORY"):
        job.leave_out(name, "images and weights lie in the run's folder")
    job.leave_out("CLASS_SIZE", "medgen counts the classes in labels.csv")
    text = "\n".join([*_head(job), "version: 1", f"name: {job.name}", *body]) + "\n"
    try:
        spec.check(document.parse(text, f"{job.name}.yaml", spec.BASH_KEYS))  # what medgen itself would refuse is not written
    except InputError as error:
        raise InputError(f"{options.path}: medgen does not take what it says:\n{error}") from None
    return job, text


def summary(job: Job) -> str:
    return f"{job.options.given} of {len(DEFAULTS)} options; {', '.join(job.stages)}"


def _head(job: Job) -> list[str]:
    lines = [f"Imported by medgen from {job.options.path}: {summary(job)}."]
    for title, notes in (("To check:", job.notes), ("Options that stand nowhere in it:", job.left_out)):
        if notes:
            lines += ["", title, *(line for note in notes for line in f"  {note.option}: {note.text}".replace("\n", "\n    ").split("\n"))]
    return [*comment_lines(lines), ""]


def _data_lines(job: Job) -> list[str]:
    options = job.options
    root = job.data.root
    if not root.startswith(("/", "~")):
        job.note("DATA_TRAIN_DIRECTORY", "a relative path: it counts from where you call medgen submit")
    lines = ["data:", "  format: stack", f"  root: {text_scalar(root)}  # DATA_TRAIN_DIRECTORY, DATA_TEST_DIRECTORY, LABEL_TRAIN_DIRECTORY, LABEL_TEST_DIRECTORY"]
    lines.append(f"  images: {{{', '.join(f'{name}: {place}' for place, name in enumerate(channel_names(options.image_channels)))}}}  # IMAGE_CHANNELS")
    shares = "{train: 0.8, val: 0.2, test: 0}" if _selects(options) else "{train: 1, val: 0, test: 0}"
    return [*lines, f"  size: {options.sizes[-1]}  # as many doublings from {FIRST_SIZE} px as FACTORS has entries", f"  splits: {shares}  # VALIDATE, TESTING"]


def _selects(options: Options) -> bool:
    """Best epochs are looked for: to validate, or to know how long the final training is to be."""
    return options.validate or (options.testing and options.test_using_best_model)


def _train_lines(job: Job) -> list[str]:
    options = job.options
    job.stages.append(f"train ({options.sizes[0]} to {options.sizes[-1]} px)")
    resources = _resources(job, TRAIN_TIME, _gpus(job))
    lines = ["  train:", "    kind: train", "    config:", *(f"      {line}" for line in _config_lines(job)), f"    resources: {resources}  # DEVICE, GPUS_N"]
    job.note("DEVICE", f"medgen asks for {TRAIN_TIME} at a time, which is a guess; as many jobs as it takes follow each other")
    if options.validate and options.testing:
        job.note("TESTING", "counts only with VALIDATE false, as its README says; the stage for it would be\nfinal: {kind: train, repeat: train}")
    elif options.testing and options.test_using_best_model:
        job.stages.append("final (train again on all, as long as was best)")
        lines.append(f"  final: {{kind: train, repeat: train, resources: {resources}}}  # TESTING, TEST_USING_BEST_MODEL")
    if options.testing and job.data.has_test:
        stage = f" --stage {_final(job)}" if _final(job) != "train" else ""
        job.note("TESTING", f"how well the test side is classified is asked after the run:\nmedgen classify {job.name} {shlex.quote(options.data_test_directory)}{stage}")
    return lines


def _final(job: Job) -> str:
    options = job.options
    return "final" if options.testing and not options.validate and options.test_using_best_model else "train"


def _config_lines(job: Job) -> list[str]:
    options = job.options
    epochs = list(options.progressive_epochs)
    lines = ["model: pacgan"]
    if options.load_model and options.start_train_at_img_size > FIRST_SIZE:
        below = options.start_train_at_img_size // 2
        epochs = [0 if size <= below else count for size, count in zip(options.sizes, epochs, strict=True)]
        lines.append(f"start_from: {folder_of_weights(below)}/step-000000  # LOAD_MODEL, START_TRAIN_AT_IMG_SIZE")
        job.note("LOAD_MODEL", f"first convert the weights of {below} px, which lie in a folder PACGAN_{below}x{below} below MODEL_DIRECTORY:\n"
                               f"medgen import generator_best.pt discriminator_best.pt --size {below} --out {folder_of_weights(below)}")  # fmt: skip
    else:
        job.leave_out("LOAD_MODEL", f"there is nothing to load at {FIRST_SIZE} px" if options.load_model else "nothing is loaded")
        if options.start_train_at_img_size > FIRST_SIZE:
            job.note("START_TRAIN_AT_IMG_SIZE", f"counts only with LOAD_MODEL true, as its README says; trained is from {FIRST_SIZE} px on")
        else:
            job.leave_out("START_TRAIN_AT_IMG_SIZE", f"{FIRST_SIZE} px is the beginning")
    lines += [
        f"channels: [{', '.join(channel_names(options.image_channels))}]",
        f"in_channels: {options.in_channels}  # IN_CHANNELS",
        f"factors: {_list([width / options.in_channels for width in options.widths])}  # FACTORS",
        f"latent: {options.z_dim}  # Z_DIM",
        f"embedding: {options.embedding_dim}  # EMBEDDING_DIM",
        f"epochs: {_list(epochs)}  # PROGRESSIVE_EPOCHS",
        f"batch_sizes: {_list(options.batch_sizes)}  # BATCH_SIZES",
        f"critic_iterations: {_list(options.critic_iterations)}  # CRITIC_ITERATIONS",
        f"lr: {_number(options.learning_rate)}  # LEARNING_RATE",
        "betas: [0.5, 0.999]  # this and the next two are fixed there",
        "fade_share: 0.5",
        "drift: 0.001",
        f"penalty: {_number(options.lambda_gp)}  # LAMBDA_GP",
        f"aimed_class: {_number(options.lambda_cls1)}  # LAMBDA_CLS1",
        f"other_class: {_number(options.lambda_cls2)}  # LAMBDA_CLS2",
        "std_group: null  # images are compared over the whole batch",
    ]
    lines.append(f"select: {value_scalar(_selects(options))}  # VALIDATE, TESTING, TEST_USING_BEST_MODEL")
    if _selects(options):
        lines.append(f"select_from: {_number(options.start_check_at)}  # START_CHECK_AT")
    else:
        job.leave_out("START_CHECK_AT", "no best epoch is looked for")
    return [*lines, "loop: {precision: fp32}"]


def _images_lines(job: Job) -> list[str]:
    options = job.options
    if not options.generate:
        job.leave_out("N_IMAGES_GENERATED", "GENERATE is false")
        return []
    counts = _per_class(options)
    job.stages.append(f"{sum(counts)} images")
    lines = [
        "  images:", "    kind: generate", f"    from: {_final(job)}", f"    per_class: {_list(counts)}  # GENERATE, N_IMAGES_GENERATED",
        "    stack: true  # in one file besides, as there", f"    resources: {_resources(job, IMAGES_TIME, 1)}",
    ]  # fmt: skip
    if not job.data.has_test:
        return lines
    job.stages.append("evaluate")
    job.note("GENERATE", "FID and KID need the weights of Inception, which docs/evaluation.md says how to get; then add to evaluate:\n"
                         "metrics: [fid, kid, ssim_pairs, auc], extractor: inception, allow_small_n: true")  # fmt: skip
    return [*lines, "  evaluate: {kind: evaluate, of: images, against: test, metrics: [ssim_pairs, auc]}"]


def _per_class(options: Options) -> list[int]:
    """One number is divided as the published system does it: what is left over goes to the last class."""
    if len(options.n_images_generated) > 1 or options.class_size < 2:
        return list(options.n_images_generated)
    share, left = divmod(options.n_images_generated[0], options.class_size)
    return [share] * (options.class_size - 1) + [share + left]


def _resources(job: Job, time: str, gpus: int) -> str:
    return f"{{gpus: {gpus}, time: {time}}}" if job.options.device == "cuda" else f"{{time: {time}}}"


def _gpus(job: Job) -> int:
    """Of a training; one if its batches cannot be shared by all that are named."""
    options = job.options
    gpus = len(set(options.gpus_n)) or 1
    if not any(size % gpus for size in options.batch_sizes):
        return gpus
    job.note("GPUS_N", f"{gpus} GPUs cannot share batches of {', '.join(map(str, options.batch_sizes))} evenly; one is asked for")
    return 1


def _list(values: Sequence[float]) -> str:
    return f"[{', '.join(_number(value) for value in values)}]"


def _number(value: float) -> str:
    """Whole ones without a point, others as YAML reads them back exactly."""
    return str(int(value)) if value == int(value) else value_scalar(float(value))
