"""Punishes medgen on a real Slurm: one small graph again and again under random faults, until the time is up; exit code 0 only if all held.

Run as `python -m tests.faults.punisher --minutes 30` or `make punish MINUTES=30`; needs root, unless SLURM_CONF names a cluster to use."""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from medgen import files

from .arena import DISK_MEBIBYTES, REPOSITORY, SANDBOX, Arena, Graph, Job, Log, Observer
from .punishments import PUNISHMENTS, RIVAL, SUBMITS

SITE = {
    "name": "lab", "scheduler": "slurm", "cpus": 8, "gpus": 4, "cpus_per_gpu": 1, "mem": "3G", "grace": "30s",
    "partitions": {"gpu": "GPUQ", "cpu": "GPUQ"}, "features": {"a100": "40G", "h100": "80G", "gpu40g": "40G", "gpu80g": "80G"},
}  # fmt: skip
NET = {
    "model": "diffusion", "strategy": "ddpm", "mode": "bravo", "epochs": 50, "batch_size": 8, "channels": [8, 16], "attention": [False, True], "head_channels": 8,
    "warmup_epochs": 0.5, "lr": 1.0e-3, "ema": {"beta": 0.9, "update_after_step": 1, "update_every": 1},
    "loop": {"log_steps": 10, "preview_images": 0, "validate_epochs": 50.0, "checkpoint_steps": 10},
}  # fmt: skip
SPEC: dict[str, Any] = {
    "version": 1, "name": "punished",
    "data": {"format": "phantom", "patients": 6, "size": 16, "positive_only": True, "every": 2},
    "stages": {
        "train": {"kind": "train", "config": NET, "resources": {"time": "30m", "mem": "3G"}},
        "images": {"kind": "generate", "from": "train", "condition": "test", "count": 16, "chunk": 2, "shards": 8, "parallel": 4, "sampling": {"sampler": "ddim", "steps": 2},
                   "resources": {"gpus": 1, "time": "10m", "mem": "1500M"}},
    },
}  # fmt: skip
TWO_NODES = ["-o", "stages.train.resources.nodes=2", "-o", "stages.train.resources.processes=1", "-o", "stages.train.resources.cpus=1"]
ONE_MACHINE = ["-o", "stages.train.resources.processes=2", "-o", "stages.train.resources.cpus=2"]
LOW = 'stages.{}.resources.slurm=["--partition=low"]'

STILL_SECONDS = 15.0  # nothing queued may go on, and it is not done: a user would look, and submit again
AFTER_FAILED_SUBMIT_SECONDS = 10.0
WATCH_SECONDS = 25.0
NO_PROGRESS_SECONDS = 600.0
GONE_SECONDS = 120.0  # until the last job has left the queue
FSCK_EXIT_DONE = 0


@dataclass
class Tally:
    """What the summary counts."""

    graphs: int = 0
    finished: int = 0
    equal: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    submits_needed: list[dict[str, Any]] = field(default_factory=list)
    released: int = 0  # jobs that Slurm itself had put on hold
    watched: int = 0
    looks_at_the_queue: int = 0
    seconds_of_graphs: list[float] = field(default_factory=list)


class Bag:
    """Every kind of fault once in a random order, then all of them again; what finds nothing to hit goes back."""

    def __init__(self, arena: Arena):
        self.arena, self.left = arena, list[str]()

    def strike(self, graph: Graph, observer: Observer) -> tuple[str, str] | None:
        if not self.left:
            self.left = list(PUNISHMENTS)
            self.arena.random.shuffle(self.left)
        for kind in self.left:
            hit = PUNISHMENTS[kind](graph, observer)
            if hit is not None:
                self.left.remove(kind)
                return kind, hit
        return None


class Game:
    """One graph from its first submit until everything of it is done and checked."""

    def __init__(self, arena: Arena, graph: Graph, tally: Tally, bag: Bag, expected: str, every_seconds: float, no_faults_after: float):
        self.arena, self.graph, self.tally, self.bag, self.expected = arena, graph, tally, bag, expected
        self.every_seconds, self.no_faults_after = every_seconds, no_faults_after
        self.observer = Observer(arena, graph)
        self.failed_submits = 0

    def play(self) -> bool:
        """True if it was finished and everything held."""
        before = len(self.arena.findings)
        self.observer.start()
        try:
            self._first_submit()
            if self._until_done():
                self._check_the_end()
                self.tally.finished += 1
        finally:
            for _, what, undo in self.graph.later:
                self.arena.log.write("undo", graph=self.graph.number, of=what)
                undo()
            self.observer.ended.set()
            self.observer.join(timeout=60)
            self.tally.looks_at_the_queue += self.observer.looks
        return len(self.arena.findings) == before

    def _note(self, kind: str, hit: str) -> None:
        self.tally.faults[kind] += 1
        if kind in SUBMITS or kind.startswith("cancel, "):
            self.graph.since_submit.clear()
        self.graph.since_submit.append(kind)
        self.arena.log.write("fault", graph=self.graph.number, kind=kind, hit=hit)

    def _first_submit(self) -> None:
        if self.arena.random.random() < 0.5:
            kind = self.arena.random.choice(list(SUBMITS))
            self._note(kind, SUBMITS[kind](self.graph))
        else:
            self._submit()

    def _submit(self) -> bool:
        code, said = self.graph.submit()
        self.failed_submits = 0 if code == 0 else self.failed_submits + 1
        self.arena.log.write("submit", graph=self.graph.number, exit=code, **({} if code == 0 else {"said": said[-500:]}))
        if "Traceback" in said:
            self.arena.found("submit showed a traceback", graph=self.graph.number, said=said[-1500:])
        return code == 0

    def _until_done(self) -> bool:
        """False if the watchdog gave it up."""
        graph, observer = self.graph, self.observer
        next_fault = time.monotonic() + self.every_seconds * self.arena.random.uniform(0.2, 1.0)
        next_watch = time.monotonic() + WATCH_SECONDS
        last, moved_at, submit_not_before = graph.progress(), time.monotonic(), 0.0
        while not (graph.all_done() and not graph.later):
            time.sleep(1)
            self._undo_what_is_due()
            now = time.monotonic()
            if (progress := graph.progress()) != last:
                last, moved_at = progress, now
            if now - moved_at > NO_PROGRESS_SECONDS or self.failed_submits >= 10:
                self._give_up(f"{self.failed_submits} submits in a row failed" if self.failed_submits >= 10 else f"no progress for {NO_PROGRESS_SECONDS:.0f} s")
                return False
            if now >= next_watch:
                self._watch()
                next_watch = time.monotonic() + WATCH_SECONDS
            if observer.still_seconds > STILL_SECONDS and not graph.later and now >= submit_not_before and not graph.all_done():
                self._submit_because_it_stands_still()
                submit_not_before = time.monotonic() + (AFTER_FAILED_SUBMIT_SECONDS if self.failed_submits else 2 * STILL_SECONDS)
            elif now >= next_fault and time.time() < self.no_faults_after:
                if (struck := self.bag.strike(graph, observer)) is not None:
                    self._note(*struck)
                    next_fault = time.monotonic() + self.every_seconds * self.arena.random.uniform(0.5, 1.5)
                else:
                    next_fault = time.monotonic() + 3
        return True

    def _undo_what_is_due(self) -> None:
        for item in [item for item in self.graph.later if item[0] <= time.monotonic()]:
            self.graph.later.remove(item)
            item[2]()
            self.arena.log.write("undo", graph=self.graph.number, of=item[1])

    def _submit_because_it_stands_still(self) -> None:
        after, told = list(self.graph.since_submit), self.graph.told()
        waiting = sorted({f"{job.stage} {job.state} {job.reason}" for job in self.observer.jobs})
        if self._submit():
            needed = {"graph": self.graph.number, "after": after, "told": told, "in_the_queue": waiting}
            self.tally.submits_needed.append(needed)
            self.arena.log.write("needed", **needed)
            if not after:
                if any(job.reason == "JobHeldUser" for job in self.observer.jobs):  # a hold by Slurm is a person's to take away
                    self.arena.found("submit left on hold what medgen holds", **needed)
                elif not (held := [job for job in self.observer.jobs if "held" in job.reason.lower()]):
                    self.arena.found("a submit was needed again, and no fault came since the one before", **needed)
                else:
                    self._release(held)
            self.graph.since_submit.clear()

    def _release(self, held: list[Job]) -> None:
        """What `medgen why` tells a person to do about a hold that Slurm itself has made."""
        self.tally.released += len(held)
        self.arena.log.write("release", graph=self.graph.number, jobs=[f"{job.element} {job.reason}" for job in held], exit=self.arena.slurm("scontrol", "release", *{job.element for job in held}).returncode)

    def _watch(self) -> None:
        """What watch says must be true at that moment; no task is done with files that are not."""
        graph = self.graph
        if not graph.run.plan.exists():
            return
        code, said = graph.medgen("watch", graph.run.root, "--json")
        self.tally.watched += 1
        try:
            state = json.loads(said)
        except ValueError:
            self.arena.found("watch --json gave no JSON", graph=graph.number, exit=code, said=said[-1000:])
            return
        if state["verdict"] == "done" and not graph.all_done():
            self.arena.found("watch said done too early", graph=graph.number, done=len(graph.done_tasks()))
        if (wrong := graph.broken_promises()) and (wrong := [item for item in wrong if item in graph.broken_promises()]):
            self.arena.found("done, and the files do not verify", graph=graph.number, files=wrong)

    def _give_up(self, why: str) -> None:
        queue = self.arena.slurm("squeue", "-r", "-o", "%i %j %T %r %N").stdout[-3000:]
        self.arena.found("the graph does not get on", graph=self.graph.number, because=why, told=self.graph.told(), queue=queue, why=self.graph.medgen("why", self.graph.run.root)[1][-3000:])
        self.graph.medgen("cancel", self.graph.run.root)

    def _check_the_end(self) -> None:
        """Everything that must hold of a finished graph."""
        graph, number = self.graph, self.graph.number
        deadline = time.monotonic() + GONE_SECONDS
        looks = self.observer.looks
        while (self.observer.looks < looks + 2 or self.observer.jobs or graph.ranks()) and time.monotonic() < deadline:
            time.sleep(1)
        if left := [f"{job.stage} {job.element} {job.state} {job.reason}" for job in self.observer.jobs]:
            self.arena.found("all is done, and jobs are left", graph=number, jobs=left)
        if left := [f"{process.kind} shard {process.shard} attempt {process.attempt} pid {process.pid}" for process in graph.ranks()]:
            self.arena.found("all is done, and processes are left", graph=number, processes=left)
        graph.damaged.clear()
        if wrong := graph.broken_promises():
            self.arena.found("done, and the files do not verify", graph=number, files=wrong)
        code, said = graph.medgen("watch", graph.run.root, "--json")
        if code != 0 or json.loads(said)["verdict"] != "done":
            self.arena.found("all is done, and watch does not say so", graph=number, exit=code, verdict=said[:300])
        code, said = graph.medgen("fsck", graph.run.run_id, "--json")
        if code != FSCK_EXIT_DONE:
            self.arena.found("fsck finds damage", graph=number, exit=code, problems=_problems(said))
        if left := graph.temporaries():
            self.arena.found("temporary files are left", graph=number, paths=left)
        digest = tree_digest(graph.run.dataset("images"))
        self.tally.equal += digest == self.expected
        if digest != self.expected:
            self.arena.found("the dataset is another than that of the undisturbed run", graph=number, digest=digest, expected=self.expected)


def _problems(said: str) -> object:
    try:
        return [problem for part in json.loads(said)["parts"] for problem in part["problems"]]
    except (ValueError, KeyError):
        return said[-2000:]


def tree_digest(folder: Path) -> str:
    """One hash over the names and bytes of every file."""
    listed = {str(path.relative_to(folder)): files.sha256_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    return files.sha256_json(listed) if listed else "nothing is there"


def make_reference(arena: Arena, spec: Path, runs: Path) -> tuple[str, str]:
    """The undisturbed run on this machine, with the same ranks and threads: (run id, digest of its dataset). One that is there is verified and used."""
    command = [sys.executable, "-m", "medgen", "submit", str(spec), "--local", "--json", *ONE_MACHINE]
    done = subprocess.run(command, cwd=arena.folder, env={**arena.environment, "MEDGEN_RUNS": str(runs)}, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"the undisturbed run failed, so there is nothing to compare with:\n{done.stdout}\n{done.stderr}")
    run_id = str(json.loads(done.stdout.splitlines()[-1])["run_id"])
    return run_id, tree_digest(runs / run_id / "images" / "dataset")


def options_of(generator: random.Random) -> list[str]:
    """Both ranks on two nodes, in the preemptible partition as a rule; the images there now and then."""
    options = list(TWO_NODES)
    if generator.random() < 0.7:
        options += ["-o", LOW.format("train")]
    if generator.random() < 0.3:
        options += ["-o", LOW.format("images")]
    return options


def punish(arena: Arena, reference: Path, minutes: float, every_seconds: float) -> Tally:
    """Graph after graph until the time is up; the last one ends in peace."""
    spec = arena.folder / f"{SPEC['name']}.yaml"
    spec.write_text(yaml.safe_dump({**SPEC, "seed": arena.random.randrange(2**31)}, sort_keys=False))
    (arena.folder / "lab.yaml").write_text(yaml.safe_dump(SITE))
    began = time.time()
    run_id, expected = make_reference(arena, spec, reference)
    arena.log.write("reference", run=run_id, digest=expected[:12], seconds=round(time.time() - began))
    tally, bag, until = Tally(), Bag(arena), time.time() + minutes * 60
    while time.time() < until:
        tally.graphs += 1
        graph = Graph(arena, tally.graphs, spec, run_id, options_of(arena.random))
        began, held = time.time(), False
        arena.log.write("graph", number=graph.number, options=graph.options[len(TWO_NODES) :], disk_mebibytes=DISK_MEBIBYTES if graph.has_own_disk else None)
        try:
            held = Game(arena, graph, tally, bag, expected, every_seconds, until).play()
        finally:
            _clear_the_queue(arena, graph)
            graph.leave(keep=not held)
        tally.seconds_of_graphs.append(round(time.time() - began, 1))
        arena.log.write("end", graph=graph.number, held=held, seconds=tally.seconds_of_graphs[-1])
    return tally


def _clear_the_queue(arena: Arena, graph: Graph) -> None:
    """Nothing of a graph that was given up, and no rival, meets the next one."""
    observer = Observer(arena, graph)
    observer.look()
    rows = (line.split(" ", 1) for line in arena.slurm("squeue", "-h", "-o", "%A %j").stdout.splitlines())
    rivals = [job for job, name in rows if name == RIVAL]
    if jobs := sorted({str(job.id) for job in observer.jobs}) + rivals:
        arena.slurm("scancel", *jobs)


def summary(arena: Arena, tally: Tally, seed: int, minutes: float) -> dict[str, Any]:
    return {
        "seed": seed, "minutes": round(minutes, 1), "graphs": tally.graphs, "graphs_finished": tally.finished, "hashes_equal": tally.equal,
        "seconds_of_graphs": tally.seconds_of_graphs, "faults": sum(tally.faults.values()), "faults_by_kind": dict(sorted(tally.faults.items())),
        "never_struck": sorted(set(PUNISHMENTS) - set(tally.faults)), "submits_needed": len(tally.submits_needed), "submits": tally.submits_needed,
        "submits_needed_after_the_last_fault": dict(Counter(item["after"][-1] if item["after"] else "" for item in tally.submits_needed)),
        "released_by_hand": tally.released, "looks_at_the_queue": tally.looks_at_the_queue, "watch_asked": tally.watched, "findings": arena.findings,
        "held": not arena.findings and 0 < tally.graphs == tally.finished == tally.equal,
    }  # fmt: skip


def in_words(facts: dict[str, Any]) -> str:
    lines = [
        f"{facts['minutes']} minutes, seed {facts['seed']}: {facts['graphs']} graphs, {facts['graphs_finished']} finished, {facts['hashes_equal']} datasets equal to the undisturbed one",
        f"{facts['faults']} faults: " + ", ".join(f"{count} {kind}" for kind, count in facts["faults_by_kind"].items()),
        f"{facts['submits_needed']} more submits were needed" + (": " if facts["submits_needed"] else "") + "; ".join(f"{count} after {after or 'nothing'}" for after, count in facts["submits_needed_after_the_last_fault"].items()),
        f"{facts['released_by_hand']} jobs that Slurm had put on hold were released",
        f"the queue was looked at {facts['looks_at_the_queue']} times, watch was asked {facts['watch_asked']} times",
        f"{len(facts['findings'])} findings",
        *(f"  {json.dumps(finding)[:1500]}" for finding in facts["findings"]),
        "all held" if facts["held"] else "NOT all held",
    ]
    return "\n".join(lines) + "\n"


@contextmanager
def cluster(folder: Path) -> Iterator[tuple[Path | None, str]]:
    """(our own sandbox or None, SLURM_CONF); what was brought up here is taken down."""
    if "SLURM_CONF" in os.environ:
        yield None, os.environ["SLURM_CONF"]
        return
    sandbox = folder / "slurm"
    script = [sys.executable, str(SANDBOX)]
    try:
        done = subprocess.run([*script, "up", "--folder", str(sandbox)], capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"no Slurm could be brought up here: {done.stderr.strip()}")
        yield sandbox, str(sandbox / "slurm.conf")
    finally:
        subprocess.run([*script, "down", "--folder", str(sandbox)], check=False, stdout=subprocess.DEVNULL)


def environment_of(slurm_conf: str) -> dict[str, str]:
    """What a user's shell holds, on this cluster and no other."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_", "SQUEUE_", "SACCT_", "MEDGEN_"))}
    return {**outside, "SLURM_CONF": slurm_conf, "OMP_NUM_THREADS": "1", "COLUMNS": "160", "PYTHONPATH": str(REPOSITORY)}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30, help="default: %(default)s; the last graph is finished in peace after that")
    parser.add_argument("--seed", type=int, default=None, help="of the faults and of the spec; default: a new one, which is told")
    parser.add_argument("--every", type=float, default=40, metavar="SECONDS", help="between two faults, half as much more or less; default: %(default)s")
    parser.add_argument("--reference", type=Path, default=None, help="a runs folder with the undisturbed run of the same seed; default: it is made first")
    parser.add_argument("--folder", type=Path, default=None, help="for everything; default: a new one in /tmp")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    seed = arguments.seed if arguments.seed is not None else int.from_bytes(os.urandom(3), "big")
    folder = (arguments.folder or Path(f"/tmp/medgen-punish-{os.getpid()}")).absolute()
    if folder.exists() and any(folder.iterdir()):
        raise SystemExit(f"{folder} is not empty; choose another --folder")
    folder.mkdir(parents=True, exist_ok=True)
    log, began, held = Log(folder / "log.jsonl"), time.time(), False
    log.write("seed", seed=seed, folder=str(folder))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the cluster is taken down
    with cluster(folder) as (sandbox, slurm_conf):
        arena = Arena(folder, sandbox, environment_of(slurm_conf), log, random.Random(seed))
        tally = punish(arena, (arguments.reference or folder / "reference").absolute(), arguments.minutes, arguments.every)
        facts = summary(arena, tally, seed, (time.time() - began) / 60)
        files.write_json(folder / "summary.json", facts)
        files.write_text(folder / "summary.txt", in_words(facts))
        print(in_words(facts) + f"log and summary: {folder}", flush=True)
        held = bool(facts["held"])
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
