"""The emulation itself: what it must notice, and that it runs what is right."""

import emulation
import pytest
from emulation import build

MISTAKES = {
    "race": "race on shared byte",
    "divergent_barrier": "barrier divergence: 32 threads wait, 32 have exited",
    "divergent_vote": "a collective waits for lane 3, which has exited",
    "exited_lane": "a collective waits for lane 3, which has exited",
    "other_collective": "is in another collective, or has another mask",
    "unwritten": "is read but was never written",
    "beyond_array": "index 64 of a shared array of 64",
    "beyond_memory": "an array beyond the block's shared memory",
    "beyond_buffer": "write outside every buffer",
    "misaligned": "an access of 16 bytes to workspace 0 is not aligned",
    "guard_zone": "the guard zone of workspace 0 was written to",
    "meeting_blocks": "of a launch meet in word",
    "early_copy": "is touched while a copy to it is under way",
    "copy_too_early": "race on shared byte .* read and this one writes",
    "warp_race": "race on shared byte|is read but was never written",
    "shuffles_order_nothing": "race on shared byte",
    "unasked_shared": "50000 bytes of shared memory on device 1, where it may have 49152",
    "lowered_limit": "its shared memory on device 0 is lowered from 50000 to 49999 bytes",
}


@pytest.fixture(params=range(3), ids=emulation.ORDERS)
def run(request):
    emulation.module().set_order(request.param, 7)
    return emulation.module().selftest


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_noticed(run, mistake):
    with pytest.raises(RuntimeError, match=MISTAKES[mistake]):
        run(mistake)


def test_correct_kernels_run(run):
    assert run("correct") == sum(range(64))
    assert run("shuffles") == run("copies") == run("products") == run("warps") == 64
    assert run("conversions") == run("special_factors") == 64
    assert run("unconverted_factors") == 0  # what tensor cores make of a NaN with low bits alone


def test_the_next_kernel_runs_after_a_mistake(run):
    for _ in range(3):
        with pytest.raises(RuntimeError):
            run("divergent_barrier")
        assert run("correct") == sum(range(64))


def test_orders_have_names():
    with pytest.raises(ValueError):
        emulation.hakd_loss(None, None, None, order="sideways")


def test_a_change_compiles_again_what_includes_it():
    """Objects are kept by what the compiler reads."""
    read = {source.stem: build.preprocessed(source) for source in build.sources()}

    def reads(word):
        return {stem for stem, text in read.items() if word in text}

    assert reads("pilot_kernel") == {"projection"}
    assert reads("hakd_scores_kernel") == {"pixel_losses_hakd", "pixel_losses_segmentation"}
    kernels = {"pixel_losses_hakd", "pixel_losses_segmentation", "projected_losses", "projection"}
    assert reads("SharedAllocator") == {*kernels, "selftest"}
