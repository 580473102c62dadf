"""Two ranks with half of each batch train the same model as one rank with all of it, for every family."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_models import VARIANTS, assert_same, make, state_of, train

from medgen import dist
from medgen.errors import MedgenError


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def trained_by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, str(Path(__file__).with_name("rank_worker.py")), str(folder)]
    workers = [subprocess.Popen(command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]
    assert [worker.wait(timeout=300) for worker in workers] == [0, 0]
    return folder


@pytest.mark.fault("F43")
def test_a_rank_that_finds_nobody_says_where_it_looked(record_property: Callable[[str, object], None]) -> None:
    port = free_port()
    with pytest.raises(MedgenError, match=rf"rank 1 on .* could not reach rank 0 at 127.0.0.1:{port} within 1 s: Connection refused"):
        dist.meet(1, 2, "127.0.0.1", port, 1)
    record_property("fired", "nobody listens there")
    with pytest.raises(MedgenError, match=r"rank 1 on .* could not reach rank 0 at no-such-node.invalid:\d+ within 1 s: the name no-such-node.invalid"):
        dist.meet(1, 2, "no-such-node.invalid", port, 1)


@pytest.mark.fault("F43")
def test_rank_0_says_that_nobody_came_or_that_the_port_is_taken(record_property: Callable[[str, object], None]) -> None:
    with pytest.raises(MedgenError, match=r"rank 0 on .* 2 ranks expected within 1 s"):
        dist.meet(0, 2, "127.0.0.1", free_port(), 1)
    with socket.socket() as busy:
        busy.bind(("0.0.0.0", 0))
        busy.listen()
        record_property("fired", "nobody came")
        with pytest.raises(MedgenError, match="could not meet: rank 0"):
            dist.meet(0, 2, "127.0.0.1", busy.getsockname()[1], 1)


@pytest.mark.parametrize(("family", "name"), VARIANTS)
def test_two_ranks_train_the_same_model_as_one(trained_by_two: Path, family: str, name: str) -> None:
    states = [torch.load(trained_by_two / f"{family}-{name}-{rank}.pt", weights_only=True) for rank in range(2)]
    assert_same(states[0], states[1])
    config, alone = make(family, name)
    train(alone, config, range(3), size=8)
    for key, module in state_of(alone).items():
        if key.startswith("modules."):
            for parameter, tensor in module.items():
                assert torch.allclose(tensor.float(), states[0][key][parameter].float(), atol=2e-5), f"{key}.{parameter}"
