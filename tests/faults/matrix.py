"""The fault matrix: every fault that medgen promises to survive, and how tests make it happen. Read by plugin.py and test_matrix.py.

A test shows a row with `@pytest.mark.fault("F5")` and tells with `record_property` that its fault happened (`fired`) and, where
it can be said, how long it took until all was well again (`recovery_seconds`)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One fault. `promise`: what must be true after it. `not_here`: why no test on one machine can show it."""

    number: str
    group: str
    fault: str
    injection: str
    promise: str
    not_here: str | None = None


SCHEDULER, SUBMISSION, OBSERVATION, STORAGE, COMPUTE = "scheduler and signals", "submission", "observation", "storage", "compute and numerics"

ROWS = [
    Row("F1", SCHEDULER, "the time limit comes near", "a training cut into jobs of one minute, queued again and as a chain", "saved in time, goes on by itself, bit-equal"),
    Row("F2", SCHEDULER, "the warning signal by itself", "scancel --signal=USR2", "one checkpoint, goes on, bit-equal"),
    Row("F3", SCHEDULER, "requeued without a warning", "scontrol requeue", "saved on TERM, goes on"),
    Row("F4", SCHEDULER, "killed without any grace", "kill -9 on all ranks", "goes on from the last checkpoint; counts as a crash"),
    Row("F5", SCHEDULER, "one rank dies in the middle of a step", "kill -9 on one of two ranks", "the job ends within 10 s, is tried again, bit-equal"),
    Row("F6", SCHEDULER, "one rank hangs", "SIGSTOP on one of two ranks", "told which rank is silent; ended after the limit, GPUs free"),
    Row("F7", SCHEDULER, "the node's step daemon is lost", "kill -9 slurmstepd", "watch says lost, not running; goes on after it ended"),
    Row("F8", SCHEDULER, "a signal before the handlers are there", "USR2 while the interpreter begins, and while it imports", "not killed; from Python on it stops at the first step boundary"),
    Row("F9", SCHEDULER, "a signal while a checkpoint is written", "a pause in the write and USR2", "exactly one valid checkpoint of that step, nothing half-written"),
    Row("F10", SCHEDULER, "a signal during a step longer than the grace", "a long step and USR2", "falls back to the last checkpoint; a warning says how much grace it needs"),
    Row("F11", SCHEDULER, "two interruptions in one epoch, a third while restoring", "USR2 twice, kill -9 at restore", "bit-equal, every sample once"),
    Row("F12", SCHEDULER, "child processes are there", "USR2 to everything, torchrun agents among it", "only the ranks act; agents unharmed"),
    Row("F13", SCHEDULER, "Slurm does not requeue", "scontrol that refuses", "told that submit goes on; never called a fault of the code"),
    Row("F14", SCHEDULER, "no progress", "a crash at the same step; a stop before the first", "stops after two crashes or three stops, nothing downstream starts"),
    Row("F15", SCHEDULER, "the user cancels", "medgen cancel", "all gone within 10 s, nothing comes back, can go on"),
    Row("F16", SCHEDULER, "suspended and resumed", "scontrol suspend", "told as suspended, ends well"),
    Row("F17", SCHEDULER, "held after a requeue", "scontrol requeuehold", "told as held, with the way out"),
    Row("F18", SCHEDULER, "a rank ends while rank 0 saves", "kill -9 of rank 1 during the write", "the save is whole or not there"),
    Row("F19", SUBMISSION, "the reply of sbatch is lost", "sbatch that submits and then fails", "one job, found again"),
    Row("F20", SUBMISSION, "submit is killed after sbatch", "kill -9 behind sbatch, before the record", "the next submit finds the job"),
    Row("F21", SUBMISSION, "four submits at once", "four processes", "each task once"),
    Row("F22", SUBMISSION, "submit is killed in the middle of the graph", "kill -9 at each sbatch", "nothing ran before the next submit, which completes it"),
    Row("F23", SUBMISSION, "an impossible request", "features, GPUs, partitions that are not there", "refused with the line of the spec; nothing queued"),
    Row("F24", SUBMISSION, "more than the cluster takes", "arrays over MaxArraySize, MaxSubmitJobs", "chunked, fewer and larger shards"),
    Row("F25", SUBMISSION, "submit from inside a job", "medgen submit under srun", "the same script, nothing of the outer job in it"),
    Row("F26", SUBMISSION, "an upstream stage fails", "exit 1", "dependents do not wait for ever; submit queues new ones"),
    Row("F27", SUBMISSION, "one array element fails", "element 2 of 4", "it alone is tried again; collect waits for all"),
    Row("F28", SUBMISSION, "set-up fails", "a module that is not there", "fails in seconds with the line, before any GPU is used"),
    Row("F29", SUBMISSION, "the code is edited after submit", "a changed package while queued", "the run uses its copy"),
    Row("F30", OBSERVATION, "no accounting, or half of it", "no slurmdbd; sacct that hangs; half a row", "watch goes on, no false failure"),
    Row("F31", OBSERVATION, "slurmctld does not answer", "squeue that fails or takes 20 s", "the last state and its age"),
    Row("F32", OBSERVATION, "Slurm has forgotten the job, or its number is another's now", "old and foreign records", "the outcome decides; foreign jobs are not believed"),
    Row("F33", STORAGE, "the disk is full", "a small tmpfs: checkpoint, shard, log", "the last checkpoint whole, no temporaries, cause told, not tried again"),
    Row("F34", STORAGE, "killed in the middle of a write", "kill -9 behind half of a checkpoint", "ignored and cleaned, the one before is used"),
    Row("F35", STORAGE, "the newest checkpoint is damaged", "cut, one bit, a file gone, bad JSON", "skipped and told, the one before is used, never step 0"),
    Row("F36", STORAGE, "a pointer to the latest checkpoint dangles", "a dead link among the steps", "folders count, no pointer does"),
    Row("F37", STORAGE, "a shard is damaged after it was done", "one bit", "collect refuses, makes exactly it again"),
    Row("F38", STORAGE, "a shard is made twice at the same time", "the same task started twice", "one manifest, identical bytes"),
    Row("F39", STORAGE, "files are seen late", "an outcome that appears after its job", "waited for, no failure"),
    Row("F40", STORAGE, "the run folder cannot be written", "read-only, no inodes", "told before anything is queued, with the path"),
    Row("F41", COMPUTE, "the loss is not finite", "NaN on one rank", "all ranks stop, never saved as good, cause NAN"),
    Row("F42", COMPUTE, "too little memory", "a memory limit that Slurm enforces", "told as OOM, once more with half as much again"),
    Row("F43", COMPUTE, "the ranks cannot meet", "a name that does not resolve, a port that is taken", "fails within two minutes with address and port"),
    Row("F44", COMPUTE, "wrong GPUs visible", "two jobs on one node", "disjoint sets"),
    Row("F45", COMPUTE, "the clock jumps", "other time zones, a clock that is wrong", "durations stay right"),
]  # fmt: skip
