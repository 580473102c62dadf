"""The plan: pure, complete, and the same run for the same science."""

from __future__ import annotations

from typing import Any

from conftest import tiny_spec
from hypothesis import given
from hypothesis import strategies as st

from medgen import document, plan, planning, spec
from medgen.plan import Plan
from medgen.site import Site

SITE = Site(name="test", cpus=4, gpus=0)


def planned(**changes: Any) -> Plan:
    import yaml

    return planning.make_plan(spec.check(document.parse(yaml.safe_dump(tiny_spec(**changes)), "job.yaml")), SITE)


def with_stage(stage: str, **changes: Any) -> Plan:
    stages = tiny_spec()["stages"]
    stages[stage] = {**stages[stage], **changes}
    return planned(stages=stages)


def test_the_plan_is_pure_and_survives_json() -> None:
    first, second = planned(), planned()
    assert first == second
    import json

    assert plan.from_json(json.loads(json.dumps(plan.to_json(first))), "plan.json") == first


def test_resources_keep_the_run_and_science_changes_it() -> None:
    base = planned().run_id
    assert with_stage("train_seg", resources={"cpus": 2, "time": "3h", "mem": "8G"}).run_id == base
    assert with_stage("images", shards=7).run_id == base
    assert with_stage("images", parallel=1).run_id == base
    assert planned(seed=43).run_id != base
    assert with_stage("images", count=13).run_id != base
    assert with_stage("images", chunk=1).run_id != base, "the chunk decides bytes"
    assert planned(name="other").run_id.startswith("other-")


def test_collect_stands_behind_every_generate_and_readers_wait_for_it() -> None:
    stages = {stage.name: stage for stage in planned().stages}
    assert stages["collect_masks"].needs == ["masks"]
    assert stages["images"].needs == ["train_bravo", "collect_masks"]
    assert stages["evaluate"].needs == ["collect_images"]
    assert set(stages["report"].needs) == set(stages) - {"report"}
    order = list(stages)
    assert all(order.index(needed) < order.index(name) for name, stage in stages.items() for needed in stage.needs)


def test_task_hashes_follow_what_the_task_does() -> None:
    one, three = with_stage("images", shards=1), with_stage("images", shards=3)
    assert len({task.hash for stage in three.stages for task in stage.tasks}) == sum(len(stage.tasks) for stage in three.stages)
    assert one.stage("images").tasks[0].hash != three.stage("images").tasks[0].hash
    assert one.stage("collect_images").tasks[0].hash == three.stage("collect_images").tasks[0].hash


@given(count=st.integers(1, 5000), chunk=st.integers(1, 64), data=st.data())
def test_shards_are_whole_chunks_and_cover_everything_once(count: int, chunk: int, data: st.DataObject) -> None:
    chunks = -(-count // chunk)
    shards = planning.shard_ranges(count, chunk, data.draw(st.integers(1, chunks)))
    assert [image for shard in shards for image in range(shard.first, shard.stop)] == list(range(count))
    assert all(shard.first % chunk == 0 and shard.stop > shard.first for shard in shards)
    sizes = [-(-(shard.stop - shard.first) // chunk) for shard in shards]
    assert max(sizes) - min(sizes) <= 1


def test_a_stage_with_a_network_takes_a_gpu_where_there_is_one() -> None:
    import yaml

    checked = spec.check(document.parse(yaml.safe_dump(tiny_spec()), "job.yaml"))
    with_gpus = {stage.name: stage for stage in planning.make_plan(checked, Site(name="test", cpus=8, gpus=2)).stages}
    assert [with_gpus[name].gpus_per_node for name in ("train_seg", "images", "evaluate", "report")] == [1, 1, 0, 0]
    assert {stage.gpus_per_node for stage in planned().stages} == {0}
    assert with_stage("images", resources={"gpus": 0}).stage("images").gpus_per_node == 0
