"""The recipe of a run in lines to read: data, augmentation, networks, losses and their weights, optimiser, schedule."""

from __future__ import annotations

from heteroakd.methods import LABELS_ALONE, METHODS, objective_of
from heteroakd.networks.shapes import tap_paths
from heteroakd.report.templates import render
from heteroakd.system.distributed import world_size
from heteroakd.training.run import Run


def recipe(run: Run) -> str:
    """The whole recipe, a line per subject and term of the loss; what is not said is as the options' help has it."""
    pairs, teacher_tap = objective_of(run.distiller).pairs, run.distiller.teacher_tap or ()
    return render(
        "recipe.txt.j2",
        {"g": "{:g}".format},
        **run.config | {"model": run.model},
        kind=run.kind,
        uses=METHODS[run.config.get("method", LABELS_ALONE)],
        distils=run.distiller.teacher is not None,
        pair=pairs[0] if pairs else None,
        taps=[*zip(tap_paths(run.config["student"]["tap"]), teacher_tap, strict=True)] if pairs else [],
        train_images=len(run.data.train),
        val_images=len(run.data.val),
        classes=len(run.data.classes),
        processes=world_size(),
    )
