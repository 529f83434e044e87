"""The Triton kernels, compiled ahead of time as they would be launched, for every architecture."""

import concurrent.futures
import itertools

import pytest
import torch
from cases import OPTIONS, pairwise

triton = pytest.importorskip("triton")
from benchmarks import gpu_static  # noqa: E402

# What the default configurations may use on sm_90: (kernel, K) -> (instructions and special functions per element (see
# gpu_static.py), bytes spilled). A change that needs more says so here.
BUDGETS = {
    ("hakd_kernel (label resolution)", 19): (120, 6.2, 96),
    ("hakd_kernel (feature resolution)", 19): (105, 6.2, 8),
    ("hakd_kernel (label resolution, with L_proj)", 19): (141, 8.4, 344),
    ("segmentation_kernel (CE + KD)", 19): (96, 3.3, 56),
    ("segmentation_kernel (CE)", 19): (36, 1.2, 0),
    ("finish_kernel", 19): (None, None, 0),
    ("projected_hakd_kernel", 19): (755, 0, 8),
    ("weight_gradients_kernel", 19): (825, 2.0, 0),
    ("finish_projected_kernel", 19): (None, None, 0),
    ("project_back_kernel", 19): (355, 0, 0),
}


def rotating(launches, share):
    """A part of the configurations that changes from day to day, so that ``share`` days see all of them."""
    import datetime

    day = datetime.date.today().toordinal()
    return [x for i, x in enumerate(launches) if (i + day) % share == 0]


def option_launches(family):
    """Main launches of calls in which every two values of the options meet: hakd_loss and segmentation_loss."""
    from hetero_kernels.triton import pixel_losses

    out = []
    for i, options in enumerate(pairwise(OPTIONS)):
        classes = (2, 19, 40, 150, 200)[i % 5]
        logits = torch.empty(2, classes, 8, 8, device="meta", dtype=(torch.float32, torch.bfloat16)[i % 2])
        labels = torch.empty(2, 64, 64, dtype=(torch.int64, torch.uint8)[i % 2], device="meta")
        upstream = torch.empty(2, *((64, 64) if options["resolution"] == "label" else (8, 8)), device="meta")
        upstream = upstream if options["reduction"] == "none" else None
        numbers = torch.tensor([options["temperature"], 1.0, 0.5], dtype=torch.float64)
        with gpu_static.recorded_launches(family) as launches:
            pixel_losses.hakd_loss(
                logits, logits, labels, numbers, None, None, upstream, options["kmm"], options["kem"],
                options["divergence"], options["resolution"], options["align_corners"], 255, options["reduction"],
                True, True,
            )  # fmt: skip
            numbers = torch.tensor([options["temperature"], 1.0, 0.5, 0.1], dtype=torch.float64)
            upstream = torch.empty(2, 64, 64, device="meta") if options["reduction"] == "none" else None
            pixel_losses.segmentation_loss(
                logits, logits, labels, torch.empty(classes, device="meta"), numbers, None, None, upstream,
                options["align_corners"], 255, options["reduction"], True,
            )  # fmt: skip
        out += [launch for launch in launches if launch.name != "finish_kernel"]
    return out


@pytest.mark.parametrize("target", gpu_static.TARGETS)
def test_every_target_compiles(target):
    """K = 19 in float32 always, other dtypes, K = 150 and the options in turns; shared memory within the family's
    smallest card. Some 130 compilations for all targets."""
    family = gpu_static.family_of(target)
    launches = [x for x in gpu_static.all_launches(torch.float32, 19, family) if "finish" not in x.name]
    others = [x for x in gpu_static.all_launches(torch.float32, 19, family) if "finish" in x.name]
    for dtype, classes in itertools.product((torch.float32, torch.bfloat16, torch.float16), (19, 150)):
        if (dtype, classes) != (torch.float32, 19):
            others += gpu_static.all_launches(dtype, classes, family)
    launches += rotating(others, 12) + rotating(option_launches(family), 24)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        compiled = list(pool.map(gpu_static.compile_launch, launches, [gpu_static.TARGETS[target]] * len(launches)))
    for launch, kernel in zip(launches, compiled, strict=True):
        assert kernel.metadata.shared <= gpu_static.SHARED[target] * 1024, (gpu_static.describe(launch), target)


def test_many_classes_fit_the_shared_memory():
    """K = 384 on the smallest card: one block's matrix product at a time is staged there."""
    from hetero_kernels.triton import pixel_losses

    logits, labels = torch.empty(1, 384, 3, 5, device="meta"), torch.empty(1, 12, 20, dtype=torch.int64, device="meta")
    scalars = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)
    with gpu_static.recorded_launches() as launches:
        pixel_losses.hakd_loss(
            logits,
            logits,
            labels,
            scalars,
            None,
            None,
            None,
            True,
            "class",
            "kl",
            "label",
            False,
            255,
            "mean",
            True,
            False,
        )
    compiled = gpu_static.compile_launch(launches[0], gpu_static.TARGETS["sm_86"])
    assert compiled.metadata.shared <= gpu_static.SHARED["sm_86"] * 1024


@pytest.mark.skipif(not triton.__version__.startswith("3.8."), reason="the budgets are those of Triton 3.8")
def test_budgets():
    """Instructions per element, special functions and spills of the default configurations do not grow."""
    target = gpu_static.TARGETS["sm_90"]
    seen = set()
    for launch in gpu_static.all_launches(torch.float32, 19):
        report = gpu_static.inspect(gpu_static.compile_launch(launch, target), target)
        name = (gpu_static.describe(launch), 19)
        seen.add(name)
        instructions, special, spilled = BUDGETS[name]
        assert report.spilled_bytes <= spilled, (name, report.spilled_bytes)
        counted = gpu_static.instructions_per_element(launch, report, 19)
        if counted is not None:
            assert counted["instructions"] <= instructions and counted["MUFU"] <= special, (name, counted)
    assert seen == set(BUDGETS)


# Bytes that K = 150 and K = 384 may spill on sm_90, and K = 19 on gfx942: what is not named spills nothing.
SPILLS = {
    ("sm_90", "hakd_kernel (label resolution)"): 72,
    ("sm_90", "hakd_kernel (feature resolution)"): 224,
    ("sm_90", "hakd_kernel (label resolution, with L_proj)"): 808,
    ("sm_90", "segmentation_kernel (CE + KD)"): 112,
    ("sm_90", "projected_hakd_kernel"): 56,
    ("sm_90", "hakd_many_kernel (label resolution, with L_proj)"): 48,
    ("sm_90", "hakd_many_kernel (feature resolution)"): 16,
    ("gfx942", "hakd_kernel (label resolution, with L_proj)"): 24,
}


@pytest.mark.skipif(not triton.__version__.startswith("3.8."), reason="the budgets are those of Triton 3.8")
@pytest.mark.parametrize(("name", "classes"), [("sm_90", 150), ("sm_90", 384), ("gfx942", 19)])
def test_spills(name, classes):
    """K = 384: in a loop, and torch projects."""
    launches = gpu_static.all_launches if classes <= 192 else gpu_static.paper_launches
    for launch in launches(torch.float32, classes, gpu_static.family_of(name)):
        if "finish" not in launch.name:
            target = gpu_static.TARGETS[name]
            report = gpu_static.inspect(gpu_static.compile_launch(launch, target), target)
            allowed = SPILLS.get((name, gpu_static.describe(launch)), 0)
            assert report.spilled_bytes <= allowed, (gpu_static.describe(launch), report.spilled_bytes)


def test_the_adjoint_runs_on_tensor_cores():
    launch = gpu_static.paper_launches(torch.float32, 19)[0]
    compiled = gpu_static.compile_launch(launch, gpu_static.TARGETS["sm_90"])
    assert "mma.sync" in compiled.asm["ptx"]


def test_two_launches_and_no_synchronisation():
    """Meta tensors have no values: whoever asked for one would fail here. Each loss is one launch and a small one."""
    names = [launch.name for launch in gpu_static.paper_launches(torch.float32, 19)]
    assert names == ["hakd_kernel", "finish_kernel"] * 3 + ["segmentation_kernel", "finish_kernel"] * 2


def test_the_model_of_time():
    """The formulas by hand, for a loop of 1900 multiply-adds and 120 special functions over 19 classes."""
    from benchmarks import gpu_model

    launch = gpu_static.paper_launches(torch.float32, 19)[0]
    h100 = next(card for card in gpu_model.CARDS if card.name.startswith("H100"))
    times = gpu_model.predict(h100, launch, {"FFMA": 1900, "MUFU": 120}, 19.0)
    elements = 8 * 19 * 512 * 1024
    assert times["issue"] == pytest.approx(2020 / 19 * elements / 128 / 132 / 1.98e6)
    assert times["special functions"] == pytest.approx(120 / 19 * elements / 16 / 132 / 1.98e6)
    coarse, labels = 8 * 19 * 64 * 128 * 4, 8 * 512 * 1024 * 8
    slots = launch.arguments["student"].gradient.numel() * 4
    assert gpu_model.our_bytes(launch) == 3 * coarse + labels + 2 * slots
    # Eager writes the upsampled logits of both networks alone in 2 x 319 MB.
    assert gpu_model.eager_bytes(launch, {"temperature": 2.0}) > 20 * 8 * 19 * 512 * 1024 * 4


def test_the_model_of_time_on_features():
    """On a card of 1 GB/s and much arithmetic, the bytes by hand; eager writes both networks' logits many times."""
    from benchmarks import gpu_model

    launches = gpu_static.projected_launches(torch.float32, 19)
    slow = gpu_model.Card("slow", "sm_90", 10**6, 2.0, 1, 128, 512)
    student, teacher, logits = (8 * channels * 16 * 32 * 4 for channels in (256, 512, 2 * 19))
    moved = (student + teacher + logits) * 2 + logits + student
    assert gpu_model.predict_features(slow, launches) == pytest.approx(moved / 1e6)
    assert gpu_model.eager_feature_bytes(launches[0]) > 2 * (student + teacher) + 20 * logits
