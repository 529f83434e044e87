"""Some of the planted mistakes of tests/mutations.py are noticed; ``python tests/mutations.py`` plants them all."""

import pytest
from mutations import MUTATIONS, Mutation, caught_by

# Of the interpolation's adjoint, of the guarded mathematics, of the products on features, of the projection.
PLANTED = ("lost-row", "guarded-label", "small-parts", "between-tiles")


@pytest.mark.parametrize("name", PLANTED)
def test_noticed(name):
    (mutation,) = (m for m in MUTATIONS if m.name == name)
    assert caught_by(mutation) is not None


def test_the_check_can_fail():
    harmless = Mutation(
        "harmless", "nothing", "launch.py", "ROWS = 16", "ROWS = 16 ", "shapes and class and not classes"
    )
    assert caught_by(harmless) is None


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_applies(mutation):
    """The text that a mutation replaces is still there."""
    assert mutation.old in mutation.path().read_text()
