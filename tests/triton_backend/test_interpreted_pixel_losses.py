"""The Triton pixel losses against the float64 reference, values and gradients, through the public functions.

An interpreted program takes 10 ms and more, so grids are small; the tile of 128 columns is crossed where it matters.
"""

import pytest
import torch
from cases import make_labels
from gpu_cases import SHAPES, TRITON, make_case, run_hakd
from gpu_pixel_losses import PixelLossTests
from triton import jit
from triton import language as tl
from triton.runtime.interpreter import InterpretedFunction

from hetero_kernels import functional

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy on what is masked later


class TestInterpreted(PixelLossTests):
    losses = TRITON

    @pytest.fixture(autouse=True)
    def three_blocks_of_classes(self, monkeypatch):
        """Of a loop that takes 300 as it takes a thousand: their number is given to the kernel (test_options.py)."""
        monkeypatch.setitem(SHAPES, "a thousand classes", (1, 300, *SHAPES["a thousand classes"][2:]))


def test_launches(launches):
    """One launch of the loss and a small one after it; "spatial" two before it. Nothing else does the work."""
    student, teacher, labels = make_case("stride 4", "randn")
    student.requires_grad_()
    functional.hakd_loss(student, teacher, labels, backend="triton").backward()
    assert launches == ["hakd_kernel", "finish_kernel"]
    launches.clear()
    functional.segmentation_loss(student, labels, teacher, backend="triton").backward()
    assert launches == ["segmentation_kernel", "finish_kernel"]
    launches.clear()
    functional.hakd_loss(student, teacher, labels, kem="spatial", backend="triton").backward()
    assert launches == ["scores_kernel", "combine_scores_kernel", "hakd_kernel", "finish_kernel"]
    launches.clear()
    # Different divisors that the gradient needs at once: they are counted first.
    functional.hakd_loss(
        student, teacher, labels, proj_weight=1.0, normalizer={"hakd": torch.tensor(7.0)}, backend="triton"
    )
    assert launches == ["divisors_kernel", "hakd_kernel", "finish_kernel"]
    launches.clear()
    # And where a gradient is in place, which would else be read and written again.
    functional.hakd_loss(student, teacher, labels, resolution="feature", backend="triton")
    assert launches == ["divisors_kernel", "hakd_kernel", "finish_kernel"]


def test_slots_of_several_rounds():
    """Coarse grids nearly as fine as the loss's: a tile of 64 pixels reaches more columns than a product has."""
    torch.manual_seed(0)
    student, teacher = torch.randn(1, 2, 2, 80), torch.randn(1, 2, 1, 90)
    TRITON.compare(run_hakd, "hakd_loss", (student, teacher, make_labels(1, (3, 100), 2, block=2)))


@pytest.mark.parametrize("resolution", ["label", "feature"])
def test_the_loss_is_the_last_launchs_first_program(monkeypatch, resolution):
    """It waits for no gradient: alone, that program leaves the whole loss."""
    student, teacher, labels = make_case("stride 4", "randn")
    student.requires_grad_()
    options = {"resolution": resolution, "backend": "triton"}
    whole = functional.hakd_loss(student, teacher, labels, **options)
    run, programs = InterpretedFunction.run, []

    def first(self, *arguments, grid, **constants):
        if self.fn.__name__ == "finish_kernel":
            programs.append(grid[0])
            grid = (1, 1, 1)
        return run(self, *arguments, grid=grid, **constants)

    monkeypatch.setattr(InterpretedFunction, "run", first)
    assert functional.hakd_loss(student, teacher, labels, **options) == whole
    assert programs[0] > 1 if resolution == "label" else programs == [1]  # a gradient in place needs none


def test_a_launch_is_prepared_once(monkeypatch):
    """Whatever it calls: ``triton.language`` in four pieces, and with its core in six for Triton's own functions."""
    from triton.runtime import interpreter

    pieces, patch = [], interpreter._patch_builtin
    monkeypatch.setattr(interpreter, "_patch_builtin", lambda *arguments: pieces.append(1) or patch(*arguments))
    functional.hakd_loss(*make_case("one pixel", "randn"), backend="triton")
    assert 0 < len(pieces) <= 3 * (4 + 6)  # as many launches: at the loss grid divisors are counted first


@jit
def raise_by(number, BY: tl.constexpr):
    tl.store(number, tl.load(number) + BY)


def test_integers_that_leave_their_type_are_noticed():
    """Which a GPU would not say, and the interpreter only computes."""
    number = torch.tensor([2**31 - 2], dtype=torch.int32)
    raise_by[(1,)](number, 1)
    assert number == 2**31 - 1
    with pytest.raises(Exception, match="int32 overflow detected for operation add"):
        raise_by[(1,)](number, 1)


def test_wrong_labels_raise_on_the_cpu():
    student, teacher, labels = make_case("stride 4", "randn")
    labels[1, 3, 2] = 77
    with pytest.raises(RuntimeError, match=r"labels\[1, 3, 2\] is 77, expected a class in \[0, 5\)"):
        functional.hakd_loss(student, teacher, labels, backend="triton")
    with pytest.raises(RuntimeError, match=r"labels\[1, 3, 2\] is 77"):
        functional.segmentation_loss(student, labels, teacher, backend="triton")
    # At feature resolution only the labels that are sampled are looked at.
    assert functional.hakd_loss(student, teacher, labels, resolution="feature", backend="triton").isfinite()
