"""The CUDA kernels without a GPU: run on the host by tests/emulation, and compiled by nvcc where there is one."""

import emulation
import pytest


@pytest.fixture(autouse=True)
def settings():
    """Every test begins with the defaults: forward order, a card of an H100's size."""
    names = ("order", "seed", "multiprocessors", "shared_per_block")
    before = {name: getattr(emulation.Settings, name) for name in names}
    yield
    for name, value in before.items():
        setattr(emulation.Settings, name, value)
