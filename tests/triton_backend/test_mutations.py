"""Two of the planted mistakes of tests/mutations.py, others every day, are noticed."""

import datetime

import pytest
from mutations import MUTATIONS, Mutation, caught_by

TODAY = datetime.date.today().toordinal()


@pytest.mark.parametrize(
    "mutation", [MUTATIONS[(TODAY * 2 + i) % len(MUTATIONS)] for i in range(2)], ids=lambda m: m.name
)
def test_noticed(mutation):
    assert caught_by(mutation) is not None


def test_the_check_can_fail():
    harmless = Mutation("harmless", "nothing", "launch.py", "ROWS = 16", "ROWS = 16 ", "one and pixel")
    assert caught_by(harmless) is None


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_applies(mutation):
    """The text that a mutation replaces is still there."""
    assert mutation.old in mutation.path().read_text()
