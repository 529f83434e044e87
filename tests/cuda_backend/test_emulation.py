"""The emulation itself: what it must notice, and that it runs what is right."""

import ast
import importlib.util
import re
from pathlib import Path

import emulation
import pytest
import torch
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
    assert run("conversions") == run("special_factors") == run("subnormals") == 64
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


# CuTe's MMA_Traits<SM80_16x8x8_F32TF32TF32F32_TN>: which element of A [16, 8], B [8 columns, 8 rows] and C [16, 8] a
# lane has in each of its registers, as shapes and strides of (lane, register), counted down the columns of those.
TRAITS = {
    "ALayout": (((4, 8), (2, 2)), ((16, 1), (8, 64))),
    "BLayout": (((4, 8), 2), ((8, 1), 32)),
    "CLayout": (((4, 8), (2, 2)), ((32, 1), (16, 8))),
}


def places(layout):
    """[lane, register]: the place of each."""

    def flat(x):
        return x if isinstance(x, tuple) else (x,)

    (lanes, registers), (lane_strides, register_strides) = layout

    def offsets(shape, strides):  # the first axis is the fastest
        out = [0]
        for size, stride in zip(flat(shape), flat(strides), strict=True):
            out = [at + i * stride for i in range(size) for at in out]
        return torch.tensor(out)

    return offsets(lanes, lane_strides)[:, None] + offsets(registers, register_strides)


def test_fragments_lie_as_in_cute():
    """Products of the emulation, which the kernels are written for, by where CuTe says that the elements are."""
    torch.manual_seed(0)
    at = {name: places(layout) for name, layout in TRAITS.items()}
    matrices = {"ALayout": torch.zeros(8, 16), "BLayout": torch.zeros(8, 8), "CLayout": torch.zeros(8, 16)}
    for name, matrix in matrices.items():
        assert sorted(at[name].flatten().tolist()) == list(range(matrix.numel()))
        matrix.copy_(torch.randint(-30, 30, matrix.shape))
    a, b, c = (matrix.flatten()[at[name]] for name, matrix in matrices.items())
    out = emulation.module().multiply_tf32(a.flatten().tolist(), b.flatten().tolist(), c.flatten().tolist())
    columns = matrices["CLayout"] + matrices["BLayout"].T @ matrices["ALayout"]  # all of them are [column, row]
    assert torch.equal(torch.tensor(out), columns.flatten()[at["CLayout"]].flatten())


def test_traits_are_cutes():
    """Where nvidia-cutlass is installed, the header itself."""
    spec = importlib.util.find_spec("cutlass_library")
    if spec is None or spec.origin is None:
        pytest.skip("nvidia-cutlass is not installed")
    header = Path(spec.origin).parent / "source" / "include" / "cute" / "atom" / "mma_traits_sm80.hpp"
    text = header.read_text()
    traits = text[text.index("struct MMA_Traits<SM80_16x8x8_F32TF32TF32F32_TN>") :]
    found = {}
    for name in TRAITS:
        value = re.search(rf"using {name}\s*=\s*([^;]+);", traits)[1]
        if "<" not in value:  # the name of one
            value = re.search(rf"using {value}\s*=\s*([^;]+);", text)[1]
        numbers = re.sub(r"(Layout|Shape|Stride)\s*<", "(", value).replace(">", ")").replace("_", "")
        found[name] = ast.literal_eval(re.sub(r"\s+", "", numbers))
    assert found == TRAITS
