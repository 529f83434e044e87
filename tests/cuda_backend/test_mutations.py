"""Two of the planted mistakes of tests/mutations.py, others every day, are noticed."""

import datetime

import pytest
from mutations import CUDA, CUDA_MUTATIONS, Mutation, caught_by

TODAY = datetime.date.today().toordinal()


@pytest.mark.parametrize(
    "mutation", [CUDA_MUTATIONS[(TODAY * 2 + i) % len(CUDA_MUTATIONS)] for i in range(2)], ids=lambda m: m.name
)
def test_noticed(mutation):
    assert caught_by(mutation) is not None


def test_the_check_can_fail():
    old, new = "float sum = 0.f;", "float  sum = 0.f;"
    harmless = Mutation("harmless", "nothing", "tile.cuh", old, new, "one and pixel", suite=CUDA)
    assert caught_by(harmless) is None


@pytest.mark.parametrize("mutation", CUDA_MUTATIONS, ids=lambda m: m.name)
def test_applies(mutation):
    """The text that a mutation replaces is still there."""
    assert mutation.old in mutation.path().read_text()
