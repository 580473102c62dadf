"""What synthetic images are worth: a network is trained on one mixture of real and synthetic images, and tested on real ones. Called by task.py.

One task is one arm with one seed; start at `utility`, then fitting.fit. structure.py trains its segmenter with the same parts; comparison.py
and consistency.py compute the scores when all trials are done; collect.py calls them."""

from __future__ import annotations

from medgen.task import Done, Work


def utility(work: Work) -> Done:
    """One trial: its answers for the test split, which is read once, after everything is chosen."""
    from medgen import rng
    from medgen.spec_utility import UtilityStage
    from medgen.utility import arms, fitting, learners, trials
    from medgen.utility.sides import open_sides

    settings = UtilityStage.model_validate(work.stage.settings)
    arm, seed_number = settings.trial(work.task.shard)
    kept = trials.finished(work)
    if kept is not None:
        return kept
    with trials.on_its_device(work) as device:
        sides = open_sides(work, settings.of, "labels" if settings.task == "classification" else "masks")
        training_set = arms.training_set(sides, settings, arm, seed_number)
        work.say(f"{work.stage.name}: arm {arm.name}, seed {seed_number}: {training_set.describe()}; {settings.steps} steps of {settings.batch_size}")
        seed = rng.derive_seed(work.plan.seed, work.stage.name, seed_number)  # the same for all arms: they begin with the same weights
        learner = learners.of_task(settings, sides, training_set, sides.rows("val"), seed, arm.kind == "augmented")
        fitted = fitting.fit(work, learner, fitting.Recipe(settings.steps, settings.batch_size, settings.lr), sides.identity, device)
        test = sides.rows("test")
        answers = learner.answers(fitted.network, test, device)
    record = {
        "sides": sides.facts, "classes": list(sides.store.classes) if settings.task == "classification" else [],
        "arm": arm.name, "seed": seed_number, "images": {"real": training_set.real, "synthetic": training_set.synthetic},
        "chosen_step": fitted.chosen_step, "val": fitted.looks,
        "test": {"id": sides.store.aliases[test].tolist(), "patient": sides.patient_numbers(test).tolist(), **answers},
    }  # fmt: skip
    return trials.finish(work, record, settings.steps)
