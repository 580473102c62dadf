"""One rank of test_checkpoint_sharded.py: a tiny FSDP2 model that trains, saves and loads as it is told.

    sharded_worker.py <checkpoints> <out> <steps> [word ...]

Resumes from what is there, trains to <steps> with a checkpoint after each; rank 0 writes everything whole to <out>/<step>.pt,
at the start and after each step."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh

from medgen import checkpoint, dist
from medgen.dist import Ranks
from medgen.errors import MedgenError

BATCH = 8


def build(ranks: Ranks) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Odd sizes, so that parts are uneven; a buffer, which is not sharded."""
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(6, 11), nn.GELU(), nn.Linear(11, 3, bias=False))
    model.register_buffer("seen", torch.zeros(()))
    if "plain" not in sys.argv:
        mesh = init_device_mesh("cpu", (ranks.world_size,))
        for layer in (model[0], model[2]):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, ranks: Ranks) -> None:
    inputs = torch.randn(BATCH, 6, generator=torch.Generator().manual_seed(step))
    share = BATCH // ranks.world_size
    model(inputs[ranks.rank * share :][:share]).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    model.get_buffer("seen").add_(1)


def save(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
    objects = {"modules.network": model.state_dict(), "optimizers.network": optimizer.state_dict()}
    checkpoint.save(folder, step, objects, {"step": step}, {"val": {"value": 1 / step, "better": "lower"}}, ranks)


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks) -> int:
    found = dist.on_main(lambda: checkpoint.newest(folder, print), ranks)
    if found is None:
        return 0
    model.load_state_dict(found.tensors("modules.network", like=model.state_dict()))
    optimizer.load_state_dict(found.tensors("optimizers.network", like=checkpoint.layout_of(optimizer)))
    return found.step


def whole(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: whole(child) for name, child in value.items()}
    return value.full_tensor() if isinstance(value, DTensor) else value


def write_whole(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
    state = whole({"model": model.state_dict(), "optimizer": optimizer.state_dict()["state"]})
    if ranks.is_main:
        path.parent.mkdir(exist_ok=True)
        torch.save(state, path)


def main() -> None:
    folder, out, steps = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    with dist.joined_ranks(threads=1) as ranks:
        model, optimizer = build(ranks)
        first = load(folder, model, optimizer, ranks)
        write_whole(out / f"{first}.pt", model, optimizer, ranks)
        for step in range(first + 1, steps + 1):
            train_step(model, optimizer, step, ranks)
            if "nan" in sys.argv and step == steps and ranks.rank == ranks.world_size - 1:
                with torch.no_grad():
                    parameter = model[2].weight
                    parameter.to_local().fill_(torch.nan)
            save(folder, step, model, optimizer, ranks)
            write_whole(out / f"{step}.pt", model, optimizer, ranks)


if __name__ == "__main__":
    try:
        main()
    except MedgenError as error:
        print(f"told: {error}", flush=True)
        sys.exit(int(error.exit_code))
