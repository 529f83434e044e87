"""The CUDA kernels' machine code for sm_90, where there is an nvcc: no spills, and a budget per element."""

import pytest

pytest.importorskip("triton")  # its package has the disassembler
from benchmarks import cuda_static  # noqa: E402

pytestmark = pytest.mark.skipif(cuda_static.nvcc() is None, reason="nvcc is not installed")

# Instructions and special functions per (pixel, class). A change that needs more says so here.
BUDGETS = {
    "hakd_kernel<1,2,0,1>": (113, 8.3),
    "hakd_kernel<1,2,1,1>": (131, 10.3),
    "hakd_kernel<1,2,0,0>": (129, 8.3),
    "segmentation_kernel<1,1,0,1>": (63, 2.4),
    "segmentation_kernel<0,1,0,1>": (36, 1.2),
    "segmentation_kernel<1,1,0,0>": (76, 2.4),
}


@pytest.fixture(scope="module")
def kernels():
    return cuda_static.compile_kernels("sm_90")


def test_nothing_is_spilled(kernels):
    assert len(kernels) >= 25
    assert {name: k.stack_bytes for name, k in kernels.items() if k.stack_bytes} == {}


def test_budgets(kernels):
    assert set(BUDGETS) == set(cuda_static.SHIPPED)
    for name, (instructions, special) in BUDGETS.items():
        k = kernels[name]
        assert k.registers <= 255 and k.warps("sm_90") >= 8
        assert k.instructions <= instructions and k.special_functions <= special, (name, k.instructions, k.loop)
