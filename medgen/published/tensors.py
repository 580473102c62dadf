"""The published system's weight files, read without running anything, and their tensors by medgen's names. Used by weights.py.

Each file is one network: a state dict, bare or below "model_state_dict"; the head of 4 px is stored twice in it."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medgen.errors import InputError
from medgen.models.pacgan.networks import HIDDEN, Critic, Generator

WRAPPER, PARALLEL = "model_state_dict", "module."
OF_GENERATOR, OF_CRITIC = "initial_block.1.weight", "adv_layer.conv.weight"  # what only one of them has
STORED = ("conv.weight", "bias")  # an equalised layer keeps its bias outside of its convolution
SHOWN = 4


@dataclass(frozen=True, eq=False)
class Network:
    """One file. `tensors`: by the published names; `epoch`: as it was saved with, None if it does not say."""

    path: Path
    tensors: dict[str, Tensor]
    epoch: int | None


@dataclass(frozen=True)
class Form:
    """What the shapes of both files say. `widths`: channels at 4, 8, 16 ... px."""

    latent: int
    embedding: int
    classes: int
    image_channels: int
    widths: tuple[int, ...]

    def generator(self) -> nn.Module:
        return Generator(self.latent, self.embedding, self.classes, self.image_channels, self.widths)

    def critic(self) -> nn.Module:
        return Critic(self.classes, self.image_channels, self.widths)


def read_pair(paths: Sequence[Path]) -> tuple[Network, Network]:
    """Generator and critic, in whatever order they are given. Raises InputError unless there is one of each."""
    found = [_read(path) for path in paths]
    generators = [network for network in found if OF_GENERATOR in network.tensors]
    critics = [network for network in found if OF_CRITIC in network.tensors]
    for network in found:
        if network not in generators and network not in critics:
            raise InputError(f"{network.path}: neither a generator nor a critic of the published system: it has no {OF_GENERATOR} and no {OF_CRITIC}, "
                             f"but {_listed(list(network.tensors))}")  # fmt: skip
    if len(generators) != 1 or len(critics) != 1:
        what = "generators" if len(generators) > 1 else "critics" if len(critics) > 1 else "no generator" if not generators else "no critic"
        raise InputError(f"{' and '.join(str(path) for path in paths)}: {what}; give one generator_best.pt and the discriminator_best.pt of the same folder")
    return generators[0], critics[0]


def _read(path: Path) -> Network:
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except pickle.UnpicklingError:  # torch's own words advise to switch the protection off
        raise InputError(f"{path}: it holds more than tensors and numbers, or is no file of torch, so it was not loaded") from None
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise InputError(f"{path}: cannot be read as a file of torch ({str(error).splitlines()[0] if str(error) else type(error).__name__}); is it cut short? copy it again") from None
    epoch = stored.get("epoch") if isinstance(stored, dict) else None
    tensors = stored.get(WRAPPER, stored) if isinstance(stored, dict) else stored
    if not isinstance(tensors, Mapping) or not tensors or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in tensors.items()):
        raise InputError(f"{path}: expected tensors by name, or such below {WRAPPER!r}; found {_kind(stored)}")
    if all(key.startswith(PARALLEL) for key in tensors):
        tensors = {key.removeprefix(PARALLEL): value for key, value in tensors.items()}
    for key, value in tensors.items():
        if not value.is_floating_point() or not bool(torch.isfinite(value).all()):
            raise InputError(f"{path}: {key} is no tensor of finite floating-point numbers; it cannot be used")
    return Network(path, {key: value.detach().float().contiguous() for key, value in tensors.items()}, epoch if isinstance(epoch, int) else None)


def _kind(stored: Any) -> str:
    return f"an object with {_listed([str(key) for key in stored])}" if isinstance(stored, dict) else type(stored).__name__


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "") if names else "nothing"


# ----- what the shapes say


def form_of(generator: Network, critic: Network) -> Form:
    """Raises InputError if a tensor that says it is missing, or if the two are not of one training."""
    table = embedding_key(generator)
    widths = _widths(generator, "last_layer", 1)
    classes, embedding = generator.tensors[table].shape
    entered = _shape(generator, OF_GENERATOR)[0]
    if entered <= embedding:
        raise InputError(f"{generator.path}: {OF_GENERATOR} takes {entered} numbers, of which {embedding} would stand for the class; nothing is left for the noise")
    of_critic = tuple(reversed(_widths(critic, "from_img", 0)))
    if of_critic != widths:
        raise InputError(f"{generator.path} has {list(widths)} channels from 4 px on, {critic.path} has {list(of_critic)}; they are not of one training")
    heads = _shape(critic, "aux_layer.conv.weight")[0]
    if heads != classes:
        raise InputError(f"{generator.path} knows {classes} classes, {critic.path} tells {heads} apart; they do not go together"
                         + (", and the published critic always tells two apart" if heads == 2 else ""))  # fmt: skip
    hidden = _shape(critic, "aux_FC1.conv.weight")[0]
    if hidden != HIDDEN:
        raise InputError(f"{critic.path}: aux_FC1 has {hidden} units; the published critic has {HIDDEN}, and so has medgen's")
    return Form(entered - embedding, embedding, classes, _shape(generator, "last_layer.0.conv.weight")[0], widths)


def embedding_key(generator: Network) -> str:
    """The one table in the file, whatever its name: everything else is a bias or a convolution."""
    tables = [key for key, value in generator.tensors.items() if value.dim() == 2]
    if len(tables) != 1:
        raise InputError(f"{generator.path}: expected one table of the classes' numbers [classes, EMBEDDING_DIM], found {_listed(tables)}")
    return tables[0]


def _widths(network: Network, heads: str, axis: int) -> tuple[int, ...]:
    """Channels of every head of one network, in the order of the file."""
    count = len({key for key in network.tensors if re.fullmatch(rf"{heads}\.\d+\.conv\.weight", key)})
    if not count:
        raise InputError(f"{network.path}: no {heads}.0.conv.weight in it; it has {_listed(list(network.tensors))}")
    return tuple(_shape(network, f"{heads}.{place}.conv.weight")[axis] for place in range(count))


def _shape(network: Network, key: str) -> tuple[int, ...]:
    if key not in network.tensors:
        raise InputError(f"{network.path}: {key} is missing")
    shape = tuple(network.tensors[key].shape)
    if len(shape) != 4:
        raise InputError(f"{network.path}: {key} has shape {list(shape)}; expected that of a convolution")
    return shape


# ----- names


def generator_names(levels: int, table: str) -> dict[str, str]:
    """medgen's name -> the published one."""
    layers = {"start_conv": "initial_block.3"}
    layers |= {f"to_image.{level}": f"last_layer.{level}" for level in range(levels)}
    layers |= {f"blocks.{level}.{mine}": f"prog_blocks.{level}.{theirs}" for level in range(levels - 1) for mine, theirs in (("first", "conv1"), ("second", "conv2"))}
    plain = {"embedding.weight": table, "start.weight": "initial_block.1.weight", "start.bias": "initial_block.1.bias"}
    return {**plain, **_of_equalized(layers)}


def critic_names(levels: int) -> dict[str, str]:
    """The same for the critic, whose published lists begin with the largest size."""
    layers = {"end_conv": "final_block.0", "end_pool": "final_block.2", "score": "adv_layer", "class_hidden": "aux_FC1", "class_logits": "aux_layer"}
    layers |= {f"from_image.{level}": f"from_img.{levels - 1 - level}" for level in range(levels)}
    layers |= {f"blocks.{level}.{mine}": f"prog_blocks.{levels - 2 - level}.{theirs}" for level in range(levels - 1) for mine, theirs in (("first", "conv1"), ("second", "conv2"))}
    return _of_equalized(layers)


def _of_equalized(layers: dict[str, str]) -> dict[str, str]:
    return {f"{mine}.{part}": f"{theirs}.{stored}" for mine, theirs in layers.items() for part, stored in zip(("weight", "bias"), STORED, strict=True)}


def state_of(network: Network, names: dict[str, str], copies: dict[str, str], like: nn.Module) -> dict[str, Tensor]:
    """medgen's state dict without its buffers. `copies`: a layer -> the layer that it is another name of.

    Raises InputError naming what is missing, too much, of another shape, or stored twice and not alike."""
    _require_keys(network, {*names.values(), *(f"{layer}.{part}" for layer in copies for part in STORED)})
    wanted = dict(like.named_parameters())
    state = {name: network.tensors[published] for name, published in names.items()}
    for name, tensor in state.items():
        if tensor.shape != wanted[name].shape:
            raise InputError(f"{network.path}: {names[name]} has shape {list(tensor.shape)}; with the other layers it would be {list(wanted[name].shape)}")
    for layer, original in copies.items():
        for part in STORED:
            if not torch.equal(network.tensors[f"{layer}.{part}"], network.tensors[f"{original}.{part}"]):
                raise InputError(f"{network.path}: {layer}.{part} and {original}.{part} are one layer and must be equal, but they differ; was the file changed?")
    return state


def _require_keys(network: Network, wanted: set[str]) -> None:
    missing = sorted(wanted - network.tensors.keys())
    extra = sorted(network.tensors.keys() - wanted)
    words = [f"missing: {_listed(missing)}" if missing else "", f"not of the published system: {_listed(extra)}" if extra else ""]
    if missing or extra:
        raise InputError(f"{network.path}: {'; '.join(word for word in words if word)}")


def trained_level(generator: dict[str, Tensor], levels: int) -> int:
    """The largest level that was trained, by medgen's names: the biases of a new block are exactly 0 until its first step."""
    return max((level for level in range(1, levels) if bool(generator[f"blocks.{level - 1}.first.bias"].any())), default=0)
