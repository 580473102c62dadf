"""A pair of published weight files becomes a checkpoint that training can start from and images be made from. Called by importing.py."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from medgen import checkpoint, commits, files
from medgen.checkpoint import Checkpoint
from medgen.data.stacks import CLASSES, named_classes
from medgen.errors import InputError
from medgen.launch.importing.writing import WIDE
from medgen.models.pacgan.config import FIRST_SIZE, PER_PHASE, Config
from medgen.models.pacgan.model import Grown
from medgen.published.job import channel_names, folder_of_weights
from medgen.published.options import Options
from medgen.published.tensors import (
    Form,
    Network,
    critic_names,
    embedding_key,
    form_of,
    generator_names,
    read_pair,
    state_of,
    trained_level,
)

OF_SIZE = re.compile(r"PACGAN_(\d+)x\1")  # the folder of a phase
GROUPS, SEED = 4, 0  # of generated images, by which the typical difference is measured


@dataclass(frozen=True)
class Level:
    """How far the networks are taken to be grown, and who says so."""

    number: int
    reason: str

    @property
    def size(self) -> int:
        return FIRST_SIZE * 2**self.number


def import_weights(paths: Sequence[Path], options: Options | None, size: int | None, out: Path | None) -> list[str]:
    """Write the checkpoint step-000000 in `out` and return what to tell, in lines. Raises InputError for files that do not fit together."""
    generator, critic = read_pair(paths)
    form = form_of(generator, critic)
    config, classes = _config(form, options), _class_names(form, options)
    networks = _filled(generator, critic, form)
    trained = trained_level(networks["generator"].state_dict(), len(form.widths))
    level = _level(generator.path, size, trained, len(form.widths))
    folder = (out if out is not None else Path(folder_of_weights(level.size))) / commits.folder_name(0)
    if folder.exists():
        raise InputError(f"{folder}: exists and is not overwritten; remove it, or choose another folder with --out")
    difference = typical_difference(networks, form, level.number, config.batch_sizes[level.number])
    networks["critic"].get_buffer("typical_difference").copy_(difference)
    grown = Grown()
    grown.level.fill_(level.number)
    objects = {f"modules.{name}": module.state_dict() for name, module in {**networks, "grown": grown}.items()}
    saved = checkpoint.save(folder.parent, 0, objects, _state(config, classes, (generator, critic)), {})
    return _told(saved, config, networks, (generator, critic), level, trained, difference)


def _filled(generator: Network, critic: Network, form: Form) -> dict[str, nn.Module]:
    """medgen's networks with the weights of the files; all but the critic's typical difference, which they do not hold."""
    levels, networks = len(form.widths), {"generator": form.generator(), "critic": form.critic()}
    states = {
        "generator": state_of(generator, generator_names(levels, embedding_key(generator)), {"initial_layer": "last_layer.0"}, networks["generator"]),
        "critic": state_of(critic, critic_names(levels), {"from_img4": f"from_img.{levels - 1}"}, networks["critic"]),
    }
    for name, network in networks.items():
        network.load_state_dict({**network.state_dict(), **states[name]})
    return networks


def _config(form: Form, options: Options | None) -> Config:
    """The published settings for networks of this form. Raises InputError if a config.json is of another form."""
    settings: dict[str, Any] = {
        "channels": channel_names(form.image_channels), "latent": form.latent, "embedding": form.embedding, "std_group": None,
        "in_channels": form.widths[0], "factors": [width / form.widths[0] for width in form.widths],
    }  # fmt: skip
    if options is not None:
        _require_form(form, options)
        settings |= {
            "in_channels": options.in_channels, "factors": [width / options.in_channels for width in options.widths],
            "epochs": options.progressive_epochs, "batch_sizes": options.batch_sizes, "critic_iterations": options.critic_iterations,
            "lr": options.learning_rate, "penalty": options.lambda_gp, "aimed_class": options.lambda_cls1, "other_class": options.lambda_cls2,
        }  # fmt: skip
    else:
        settings |= {name: [*published, *[published[-1]] * len(form.widths)][: len(form.widths)] for name, published in PER_PHASE.items()}
    try:
        return Config.model_validate(settings)
    except ValueError as error:
        raise InputError(f"medgen does not train networks of this form: {error}") from None


def _require_form(form: Form, options: Options) -> None:
    said = {
        "IN_CHANNELS and FACTORS": (list(options.widths), list(form.widths)), "Z_DIM": (options.z_dim, form.latent), "EMBEDDING_DIM": (options.embedding_dim, form.embedding),
        "CLASS_SIZE": (options.class_size, form.classes), "IMAGE_CHANNELS": (options.image_channels, form.image_channels),
    }  # fmt: skip
    problems = [f"{options.path}: {name}: {of_config} there, {of_weights} in the weights; is it the file of another training?"
                for name, (of_config, of_weights) in said.items() if of_config != of_weights]  # fmt: skip
    if problems:
        raise InputError("\n".join(problems))


def _level(path: Path, size: int | None, trained: int, levels: int) -> Level:
    """What the user says, else the folder that the published system puts a phase into, else the largest that was trained."""
    sizes = [FIRST_SIZE * 2**level for level in range(levels)]
    named = OF_SIZE.fullmatch(path.absolute().parent.name)
    if size is not None:
        if size not in sizes:
            raise InputError(f"--size {size}: these networks have {', '.join(map(str, sizes))} px")
        return Level(sizes.index(size), "--size says so")
    if named is not None and int(named[1]) in sizes:
        return Level(sizes.index(int(named[1])), f"the folder {named[0]} says so")
    return Level(trained, "the largest size that was trained")


@torch.no_grad()
def typical_difference(networks: dict[str, nn.Module], form: Form, level: int, group: int) -> Tensor:
    """What the critic sees between the images of a batch, over batches that the generator makes of all classes in turn.

    Training measures it on real images, which weights do not hold; the same noise every time, so that it depends on the weights alone."""
    noise, values = torch.Generator().manual_seed(SEED), []
    count = max(2, group)
    for _ in range(GROUPS):
        labels = torch.arange(count) % form.classes
        images = networks["generator"](torch.randn(count, form.latent, generator=noise), labels, level, 1.0)
        values.append(networks["critic"](images, level, 1.0).differences[0])
    return torch.stack(values).mean()


def _class_names(form: Form, options: Options | None) -> tuple[str, ...]:
    """As the folder of the configuration names them; the published system knows numbers only, and so does a folder without names."""
    named = Path(options.data_train_directory) / CLASSES if options is not None else None
    return named_classes(named, form.classes)[: form.classes] if named is not None and named.is_file() else tuple(str(number) for number in range(form.classes))


def _state(config: Config, classes: tuple[str, ...], sources: Sequence[Network]) -> dict[str, Any]:
    """What a reader of the checkpoint asks for. It is of no data and no seed of medgen's."""
    return {
        "config": {"model": "pacgan", **config.model_dump(mode="json", exclude={"loop"})}, "classes": classes, "vocabulary": {}, "size": config.sizes[-1], "data": None, "seed": None,
        "imported": [{"path": str(network.path), "sha256": files.sha256_file(network.path), "epoch": network.epoch} for network in sources],
    }  # fmt: skip


def _told(
    saved: Checkpoint, config: Config, networks: dict[str, nn.Module], sources: Sequence[Network], level: Level, trained: int, difference: Tensor
) -> list[str]:  # fmt: skip
    counts = {name: sum(tensor.numel() for tensor in network.parameters()) for name, network in networks.items()}
    from_files = " and ".join(f"{network.path.name}{f' (epoch {network.epoch})' if network.epoch is not None else ''}" for network in sources)
    lines = [
        f"{saved.folder}: generator {counts['generator']:,} and critic {counts['critic']:,} parameters, from {from_files}",
        f"  classes {', '.join(saved.state()['classes'])}, {'grey' if len(config.channels) == 1 else 'colour'} images, latent {config.latent}, embedding {config.embedding}, "
        f"channels {', '.join(map(str, config.widths))} at {config.sizes[0]} to {config.sizes[-1]} px",
        f"  grown to {level.size} px: {level.reason}",
        "  left out: what Adam remembered; training goes on with a fresh one",
        f"  check typical difference {float(difference):.4g}: the weights do not say it; measured on {GROUPS} batches of generated images, training makes it that of real ones",
    ]
    if level.number > trained:
        lines.append(f"  check {level.size} px: the layers of {2 * FIRST_SIZE * 2 ** trained} px look untrained (their biases are 0); choose --size {FIRST_SIZE * 2 ** trained}")
    if level.number < trained:
        lines.append(f"  check {level.size} px: training went on to {FIRST_SIZE * 2 ** trained} px, and the head of {level.size} px was not kept up with it")
    return [*lines, f"  to go on, in a train stage: config: {_config_to_write(saved, config)}", f"  to classify images: medgen classify {shlex.quote(str(saved.folder))} IMAGES.nii.gz"]


def _config_to_write(saved: Checkpoint, config: Config) -> str:
    """What the config of a train stage needs to go on from here: the form of these networks, as far as it is not the usual one."""
    form = config.model_dump(mode="json", include={"channels", "in_channels", "factors", "latent", "embedding"}, exclude_defaults=True)
    return yaml.safe_dump({"model": "pacgan", "start_from": str(saved.folder), **form}, default_flow_style=True, sort_keys=False, width=WIDE).strip()
