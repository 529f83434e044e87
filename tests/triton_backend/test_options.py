"""Every option of every operator compiles, through Triton's own launcher and for every architecture.

The interpreter runs kernels without typing their branches, and a launch compiled from a list holds the options somebody
thought of. Here the operators' implementations are called on meta tensors and what they launch is compiled as a GPU's
first call would compile it. TRITON_OPTIONS says how many option sets: "pairs", in which every two values meet (the
Triton that torch brings; where no two that choose branches meet for the first time, only types are looked at),
"values", in which every value occurs (older Tritons), "product", all of the branches (``make test-gpu-compile``).
"""

import contextlib
import dataclasses
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from cases import pairwise

triton = pytest.importorskip("triton")
from triton import language as tl  # noqa: E402

from benchmarks import triton_static  # noqa: E402
from hetero_kernels.triton import pixel_losses, projected_losses, projection, tuning  # noqa: E402

MODE = os.environ.get("TRITON_OPTIONS", "pairs")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


class Grids(NamedTuple):
    batch: int
    student: tuple[int, int]
    teacher: tuple[int, int]
    labels: tuple[int, int]


GRIDS = (
    Grids(2, (8, 8), (8, 8), (64, 64)),
    Grids(2, (5, 7), (1, 1), (33, 65)),
    Grids(2, (16, 16), (8, 8), (16, 16)),
    Grids(1, (1, 1), (1, 1), (1, 1)),
)
LAYOUTS = ("contiguous", "channels_last", "sliced", "misaligned")
# The first value of each is the default.
SHARED: dict[str, tuple] = {
    "kmm": (True, False),
    "kem": ("class", "spatial", "none"),
    "divergence": ("kl", "ce"),
    "proj_weight": (0.0, 0.5),
    "temperature": (1.0, 2.0, 4.0, 1.5),
    "reduction": ("mean", "sum", "none"),
    "upstream": (False, True),
    "normalizers": ((), ("first",), ("second",), ("first", "second")),
    "dtypes": ((F32, F32), (BF16, BF16), (F16, F16), (F32, BF16)),
    "labels": (torch.int64, torch.int32, torch.uint8),
    "layout": LAYOUTS,
}
HAKD = SHARED | {
    "resolution": ("label", "feature"),
    "align_corners": (False, True),
    "wanted": ((True, False), (True, True), (False, True), (False, False)),
    "grids": GRIDS,
}
PROJECTED = SHARED | {
    "kem": ("class", "none"),  # "spatial" is hakd_loss's
    "bias": ((False, False), (True, True), (True, False)),
    # Gradients of the student's features and weights, then the teacher's.
    "wanted": (
        (True, True, False, True),
        (True, False, True, False),
        (False, True, True, True),
        (False, False, False, False),
    ),
    "grids": (GRIDS[0], Grids(2, (5, 7), (5, 7), (5, 7)), GRIDS[3]),
    "channels": ((64, 128), (19, 1)),
}
SEGMENTATION = {name: SHARED[name] for name in ("temperature", "reduction", "upstream", "normalizers", "dtypes")} | {
    "labels": SHARED["labels"],
    "layout": LAYOUTS,
    "teacher": (True, False),
    "class_weight": (False, True),
    "label_smoothing": (0.0, 0.1),
    "align_corners": (False, True),
    "wanted": (True, False),
    "grids": GRIDS,
}
# What raw logits add to HAKD: how they are read, and where their gradient goes.
NORMALIZED = HAKD | {
    "kmm": (True,),
    "divergence": ("kl",),
    "kem": ("class", "spatial"),
    "proj_weight": (0.5,),
    "temperature": (1.0,),
    "reduction": ("mean", "none"),
    "upstream": (False,),
    "normalizers": ((), ("first", "second")),
    "labels": (torch.int64,),
    "layout": ("contiguous", "misaligned"),
    "dtypes": ((F32, F32), (F32, BF16)),
    "wanted": ((True, True), (True, False)),
    "relu": ((False, False), (True, True), (True, False)),
    "grids": (GRIDS[0], GRIDS[2]),
}
PROJECTION = {
    "statistics": (True, False),
    "rounding": ("none", "bfloat16", "float16"),
    "given": ((True, True), (True, False), (False, True)),  # gradients of logits and of statistics
    "wanted": ((True, True), (True, False), (False, True)),
    "dtypes": ((F32, F32), (BF16, F32), (F16, F16), (BF16, BF16)),
    "layout": LAYOUTS,
    "channels": (64, 19, 1),
    "grids": (GRIDS[0], GRIDS[1], GRIDS[3]),
}
# The product is of these: the others choose how memory is read or a constant (POWER, ALIGN), which the pairs meet.
BRANCHES = (
    "statistics",
    "rounding",
    "given",
    "relu",
    "kmm",
    "kem",
    "divergence",
    "proj_weight",
    "resolution",
    "reduction",
    "wanted",
    "bias",
    "teacher",
)


# Launches ----------------------------------------------------------------------------------------------------------


def empty(options: dict, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """A meta tensor of the options' layout."""
    if options["layout"] == "sliced":
        return torch.empty(*shape[:-1], 2 * shape[-1], device="meta", dtype=dtype)[..., ::2]
    tensor = torch.empty(shape, device="meta", dtype=dtype)
    return tensor.to(memory_format=torch.channels_last) if options["layout"] == "channels_last" else tensor


def common(options: dict) -> tuple[torch.Tensor, list[torch.Tensor | None], torch.Tensor | None]:
    """Labels, both normalizers, upstream factors."""
    grids = options["grids"]
    size = grids.student if options.get("resolution", "label") == "feature" else grids.labels
    number = torch.empty((), device="meta")
    return (
        torch.empty(grids.batch, *grids.labels, device="meta", dtype=options["labels"]),
        [number if name in options["normalizers"] else None for name in ("first", "second")],
        torch.empty(grids.batch, *size, device="meta") if options["upstream"] else None,
    )


def scalars(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def hakd(classes: int, options: dict) -> None:
    labels, normalizers, upstream = common(options)
    grids = options["grids"]
    logits = [
        empty(options, dtype, grids.batch, classes, *grid)
        for dtype, grid in zip(options["dtypes"], (grids.student, grids.teacher), strict=True)
    ]
    function, relu = pixel_losses.hakd_loss, ()
    if "relu" in options:
        per_class = torch.empty(classes, device="meta")
        function, relu = pixel_losses.normalized_hakd_loss, options["relu"]
        logits = [t for z in logits for t in (z, per_class, per_class)]
    function(
        *logits, labels, scalars(options["temperature"], 1.0, options["proj_weight"]), *normalizers, upstream,
        *relu, options["kmm"], options["kem"], options["divergence"], options["resolution"], options["align_corners"],
        255, options["reduction"], *options["wanted"],
    )  # fmt: skip


def segmentation(classes: int, options: dict) -> None:
    labels, normalizers, upstream = common(options)
    grids = options["grids"]
    pixel_losses.segmentation_loss(
        empty(options, options["dtypes"][0], grids.batch, classes, *grids.student),
        empty(options, options["dtypes"][1], grids.batch, classes, *grids.teacher) if options["teacher"] else None,
        labels, torch.empty(classes, device="meta") if options["class_weight"] else None,
        scalars(options["temperature"], 1.0, 0.1, options["label_smoothing"]), *normalizers, upstream,
        options["align_corners"], 255, options["reduction"], options["wanted"],
    )  # fmt: skip


def projected(classes: int, options: dict) -> None:
    labels, normalizers, upstream = common(options | {"resolution": "feature"})
    grids, channels = options["grids"], options["channels"]
    pairs = list(zip(options["dtypes"], channels, strict=True))
    features = [empty(options, dtype, grids.batch, c, *grids.student) for dtype, c in pairs]
    weights = [torch.empty(classes, c, device="meta", dtype=dtype) for dtype, c in pairs]
    biases = [
        torch.empty(classes, device="meta", dtype=dtype) if given else None
        for given, dtype in zip(options["bias"], options["dtypes"], strict=True)
    ]
    gradient = projected_losses.projected_hakd_loss(
        *features, *weights, *biases, labels, scalars(options["temperature"], 1.0, options["proj_weight"]),
        *normalizers, upstream, options["kmm"], options["kem"], options["divergence"], 255, options["reduction"],
        *options["wanted"],
    )[3]  # fmt: skip
    if options["wanted"][0]:
        factor = None if options["reduction"] == "none" else torch.empty((), device="meta")
        projected_losses.project_back(gradient, weights[0], factor, features[0])


def project(classes: int, options: dict) -> None:
    grids, channels = options["grids"], options["channels"]
    features = empty(options, options["dtypes"][0], grids.batch, channels, *grids.student)
    weight = torch.empty(classes, channels, device="meta", dtype=options["dtypes"][1])
    outputs = projection.project(features, weight, options["statistics"], options["rounding"])
    by_logits, by_statistics = (
        torch.empty_like(t) if given else None for t, given in zip(outputs[::2], options["given"], strict=True)
    )
    projection.project_gradients(
        by_logits, by_statistics, features, weight, *outputs, options["rounding"], *options["wanted"]
    )


OPERATORS = {
    "hakd": (hakd, HAKD),
    "normalized": (hakd, NORMALIZED),
    "segmentation": (segmentation, SEGMENTATION),
    "projected": (projected, PROJECTED),
    "projection": (project, PROJECTION),
}


@dataclasses.dataclass(frozen=True)
class Misaligned:
    """What the launcher asks of a tensor, of one whose memory begins anywhere."""

    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.dtype.itemsize


def misaligned(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return Misaligned(value.dtype)
    if isinstance(value, tuple):
        parts = map(misaligned, value)
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def launches_of(operator: str, target: str, classes: int, options: dict) -> list[triton_static.Launch]:
    """What a call with these options, and defaults for the others, would launch."""
    function, values = OPERATORS[operator]
    options = {name: choices[0] for name, choices in values.items()} | options
    with triton_static.recorded_launches(triton_static.family_of(target)) as launches:
        function(classes, options)
    assert launches
    if options["layout"] != "misaligned":
        return launches
    return [
        dataclasses.replace(launch, arguments={name: misaligned(value) for name, value in launch.arguments.items()})
        for launch in launches
    ]


def compile_all(operator: str, target: str = "sm_90", classes: int = 3, **options: Any) -> list[Any]:
    """The compiled kernels of a call; shared memory within the family's smallest card."""
    family = triton_static.family_of(target)
    smallest = min(size for name, size in triton_static.SHARED.items() if triton_static.family_of(name) == family)
    compiled = []
    for launch in launches_of(operator, target, classes, options):
        compiled.append(triton_static.compile_launch(launch, triton_static.TARGETS[target]))
        assert compiled[-1].metadata.shared <= smallest * 1024, (launch.name, options)
    return compiled


# Options -----------------------------------------------------------------------------------------------------------


def every_value(values: dict[str, tuple]) -> list[dict]:
    """The defaults, and option sets in which every value occurs."""
    most = max(map(len, values.values()))
    return [{name: choices[i % len(choices)] for name, choices in values.items()} for i in range(most)]


def product(values: dict[str, tuple]) -> list[dict]:
    """Of the options that choose branches; the others change from set to set."""
    chosen = [name for name in values if name in BRANCHES]
    rest = {name: itertools.cycle(choices) for name, choices in values.items() if name not in BRANCHES}
    return [
        dict(zip(chosen, choice, strict=True)) | {name: next(cycle) for name, cycle in rest.items()}
        for choice in itertools.product(*(values[name] for name in chosen))
    ]


def new_branches(sets: list[tuple[dict, str]]) -> Iterator[bool]:
    """Of each option set and target, whether it is the first with this target, with one of its values, or in which two
    that choose branches meet."""
    seen: set = set()
    for options, target in sets:
        branches = ((name, value) for name, value in options.items() if name in BRANCHES)
        met = {target, *options.items(), *itertools.combinations(branches, 2)}
        yield not met <= seen
        seen |= met


def option_sets(whole: bool = True) -> list[Any]:
    """Operator, options, target: every architecture in turn. Those to compile, or to look at the types of."""
    make = {"pairs": lambda v: list(pairwise(v)), "values": every_value, "product": product}[MODE]
    targets, chosen = itertools.cycle(sorted(triton_static.TARGETS)), []
    for name, (_, values) in OPERATORS.items():
        sets = [(options, next(targets)) for options in make(values)]
        for i, ((options, target), new) in enumerate(zip(sets, new_branches(sets), strict=True)):
            if whole == (new or MODE != "pairs"):
                chosen.append(pytest.param(name, options, target, id=f"{name}-{i}"))
    return chosen


@pytest.mark.parametrize(("operator", "options", "target"), option_sets())
def test_options_compile(operator, options, target):
    compile_all(operator, target, **options)


@pytest.mark.parametrize(("operator", "options", "target"), option_sets(whole=False))
def test_options_have_types(operator, options, target):
    for launch in launches_of(operator, target, 3, options):
        triton_static.type_launch(launch, triton_static.TARGETS[target])


@triton.jit
def right_or_wrong(out, WRONG: tl.constexpr):
    if WRONG:
        tl.store(out, tl.arange(0, 4) + tl.arange(0, 8))
    else:
        tl.store(out, 1.0)


def test_wrong_types_are_seen_in_the_branch_that_is_chosen():
    launch = triton_static.Launch(right_or_wrong, 1, {"out": torch.empty(1, device="meta")}, {"WRONG": False}, {})
    for target in ("sm_90", "gfx942"):
        triton_static.type_launch(launch, triton_static.TARGETS[target])
        with pytest.raises(triton.CompilationError):
            wrong = dataclasses.replace(launch, constants={"WRONG": True})
            triton_static.type_launch(wrong, triton_static.TARGETS[target])


pairs_only = pytest.mark.skipif(MODE != "pairs", reason="once is enough: on the Triton that torch brings")


# Classes for which blocks and tiles differ, each with another dtype; float32 with 19, 150 and 384 has budgets
# (test_compiled.py). More than 192 are not for features. {}: all defaults at once, those of raw logits there as well.
WITH_CLASSES: dict[str, dict[int, dict]] = {
    "hakd": {
        1: {},
        19: {"kem": "spatial", "dtypes": (BF16, BF16)},
        150: {"kem": "none", "dtypes": (F16, F16)},
        193: {},
    },
    "segmentation": {1: {}, 19: {"dtypes": (BF16, BF16)}, 150: {"dtypes": (F16, F16), "teacher": False}, 193: {}},
    "projected": {1: {}, 19: {"kem": "none", "dtypes": (BF16, BF16)}, 150: {"dtypes": (F16, F16)}},
    "projection": {1: {}, 19: {"statistics": False, "dtypes": (BF16, BF16)}, 150: {"dtypes": (F16, F16)}},
}


@pairs_only
@pytest.mark.parametrize(
    ("operator", "classes"), [(operator, classes) for operator, sets in WITH_CLASSES.items() for classes in sets]
)
def test_classes_compile(operator, classes):
    compile_all(operator, classes=classes, **WITH_CLASSES[operator][classes])


@pytest.mark.parametrize("operator", ["hakd", "segmentation"])
def test_any_number_above_192_is_the_same_kernel(operator):
    """600 and 1000 classes: of 193, which compiles, they differ by a number that the kernel is given."""
    binaries = {
        classes: [k.asm["cubin"] for k in compile_all(operator, classes=classes)] for classes in (193, 600, 1000)
    }
    assert binaries[193] == binaries[600] == binaries[1000]


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_architecture_has_its_share(operator):
    """Of the option sets above."""
    assert MODE != "pairs" or {p.values[2] for p in option_sets() if p.values[0] == operator} == set(
        triton_static.TARGETS
    )


# Layouts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operator", "classes", "grids"),
    [("hakd", 16, GRIDS[0]), ("hakd", 16, GRIDS[3]), ("segmentation", 32, GRIDS[0]), ("hakd", 208, GRIDS[2])],
)
def test_no_vector_load_believes_the_hint(operator, classes, grids):
    """tile.py calls neighbouring pixels contiguous where they need not be: in channels_last with a multiple of 16
    classes a load of two would be aligned, and wrong."""
    launch = launches_of(operator, "sm_90", classes, {"layout": "channels_last", "grids": grids})[0]
    kernel = triton_static.compile_launch(launch, triton_static.TARGETS["sm_90"])
    loads = [line for line in kernel.asm["ptx"].splitlines() if "ld.global" in line]
    assert loads and not [line for line in loads if ".v2" in line or ".v4" in line]


# Choices of the host -----------------------------------------------------------------------------------------------


# torch's old interface and its new one, of which it allows one in a process.
PRECISIONS = {
    "pass": "float32",
    "torch.set_float32_matmul_precision('high')": "tf32",
    "torch.backends.cuda.matmul.allow_tf32 = True": "tf32",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'": "tf32",
    "torch.backends.cuda.matmul.fp32_precision = 'ieee'": "float32",
    "torch.backends.fp32_precision = 'tf32'": "tf32",
}
PRECISION_OF_EACH = """
import os, sys, torch
from hetero_kernels.triton.launch import product_precision
for setting in sys.argv[1:]:
    if os.fork() == 0:
        exec(setting)
        print(product_precision(torch.empty(1, device="meta")), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0, setting
"""


def test_products_follow_torchs_setting():
    """Processes that have imported torch once: it takes longer than all the rest."""
    command = [sys.executable, "-c", PRECISION_OF_EACH, *PRECISIONS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert dict(zip(PRECISIONS, done.stdout.split(), strict=True)) == PRECISIONS


def test_a_search_times_the_tensors_device(monkeypatch):
    """do_bench and the question whether a graph is captured are of the current device."""
    current, asked = [0], []

    @contextlib.contextmanager
    def device(chosen):
        before, current[0] = current[0], chosen.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: asked.append(("capturing", *current)))
    monkeypatch.setattr(tuning.triton.testing, "do_bench", lambda *_, **__: asked.append(("timed", *current)) or 1.0)
    monkeypatch.setenv("HETERO_KERNELS_AUTOTUNE", "1")
    second = torch.device("cuda", 1)
    assert tuning.searching(second) and tuning._milliseconds(lambda: None, second) == 1.0
    assert asked == [("capturing", 1), ("timed", 1)] and current == [0]
