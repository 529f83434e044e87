"""Some of the planted mistakes of tests/mutations.py are noticed: always the same, one of each kind, in different
kernels. `python tests/mutations.py` plants all."""

import pytest
import witnesses
from mutations import CUDA, CUDA_MUTATIONS, Mutation, caught_by

CHOSEN = {
    "no-barrier-after-band",  # a race of a block's threads: the losses on coarse logits
    "short-wait",  # a copy that is not waited for: the loss on features and its second read
    "back-beyond",  # a write out of bounds: project_back
    "unscaled-scores",  # a wrong formula, where blocks are combined: kem="spatial"
}


@pytest.mark.parametrize("mutation", [m for m in CUDA_MUTATIONS if m.name in CHOSEN], ids=lambda m: m.name)
def test_noticed(mutation):
    assert caught_by(mutation) is not None


def test_the_chosen_ones_are_there():
    assert len({m.name for m in CUDA_MUTATIONS} & CHOSEN) == len(CHOSEN)


def test_the_check_can_fail():
    old, new = "float sum = 0.f;", "float  sum = 0.f;"
    harmless = Mutation("harmless", "nothing", "tile.cuh", old, new, "shapes and class and not classes", suite=CUDA)
    assert caught_by(harmless) is None


@pytest.mark.parametrize("mutation", CUDA_MUTATIONS, ids=lambda m: m.name)
def test_applies(mutation):
    """The text that a mutation replaces is still there."""
    assert mutation.old in mutation.path().read_text()


def test_what_noticed_is_still_run(request):
    """The tests that tests/README.md names beside the mistakes."""
    witnesses.check(CUDA, request.session)
