"""What predicted times of the loss on features and of the projection are made of (benchmarks/cuda_model.py): bytes,
cuts, products."""

import collections

import pytest
from test_emulated_projected_losses import total, traffic
from test_emulated_projection import traffic as projection_traffic

from benchmarks import cuda_model


@pytest.mark.parametrize(
    "channels, classes, grid, multiprocessors",
    [((256, 512), 19, 16, 3), ((512, 512), 19, 16, 3), ((64, 96), 40, 12, 4), ((64, 96), 150, 12, 4)],
    ids=["one read", "two reads", "forty classes", "many classes"],
)
def test_the_emulation_counts_the_same_bytes(channels, classes, grid, multiprocessors):
    """But for biases, read and summed by every block, which the emulation's call lacks. Packed weights have an odd
    number of tiles of classes, so that it tells how many are multiplied side by side (``TILES_AT_ONCE``)."""
    moved = traffic(channels, classes, (grid, grid), 1.0, multiprocessors)[0]
    call = cuda_model.Call(1, classes, (grid, grid), channels)
    plan = cuda_model.plan_of(call, "sm_90", multiprocessors)
    predicted = cuda_model.launch_bytes(call, plan, multiprocessors)
    biases = (3 * plan["blocks"] + 1) * 8 * classes
    assert sum(predicted.values()) - biases == pytest.approx(total(moved), rel=0.002), (predicted, moved)


@pytest.mark.parametrize(
    "channels, classes, grid, multiprocessors",
    [(256, 19, (16, 32), 3), (96, 150, (12, 12), 4), (48, 200, (12, 16), 2)],
    ids=["few classes", "many classes", "chunks"],
)
def test_the_emulation_counts_the_same_bytes_of_a_projection(channels, classes, grid, multiprocessors):
    moved, _, _ = projection_traffic(channels, classes, grid, multiprocessors=multiprocessors)
    call = cuda_model.Projection(1, classes, grid, channels, True)
    plan = cuda_model.projection_plan_of(call, "sm_90", multiprocessors)
    predicted = cuda_model.projection_bytes(call, plan, multiprocessors)
    assert sum(predicted.values()) == pytest.approx(total(moved), rel=0.002), (predicted, moved, plan)


class Counted:
    """A kernel of 20 instructions for each product, and for each (pixel, class); none that stage."""

    instructions_of_a_product = instructions = 20.0
    instructions_of_a_fragment = 0.0


@pytest.mark.parametrize("classes, weights", [(24, "projected_hakd_kernel"), (64, "weight_gradients_kernel")])
def test_products_are_those_of_the_matrices(classes, weights):
    """Three for each multiplication of the projections, of the weights' gradient and of the features', on one
    multiprocessor, where nothing is padded."""
    call = cuda_model.Call(1, classes, (8, 32), (256, 512))
    plan = cuda_model.plan_of(call, "sm_90", 1)
    work = cuda_model.launch_work(call, plan, collections.defaultdict(Counted), 1)
    once = 3 * 256 * classes * 768 / cuda_model.MULTIPLICATIONS
    assert sum(w.products for w in work.values()) == once * 2 + once / 3
    assert weights in work and work["project_back_kernel"] == cuda_model.Work(
        {"project_back_kernel": 20 * once / 3}, once / 3
    )


@pytest.mark.parametrize("classes", [24, 64])
def test_products_of_a_projection_are_those_of_its_matrices(classes):
    """Forward, of the weights' gradient and of the features', on one multiprocessor, where nothing is padded."""
    call = cuda_model.Projection(1, classes, (8, 32), 768, True)
    plan = cuda_model.projection_plan_of(call, "sm_90", 1)
    work = cuda_model.projection_work(call, plan, collections.defaultdict(Counted), 1)
    once = 3 * 256 * classes * 768 / cuda_model.MULTIPLICATIONS
    assert {name: w.products for name, w in work.items()} == dict.fromkeys(
        ("project_kernel", "projection_weights_kernel", "project_back_kernel"), once
    )
