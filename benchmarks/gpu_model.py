"""A model of the time that a loss takes on a GPU nobody had: what it must move and issue, over what a card does.

Ours: the longest of bytes over bandwidth, instructions over issue slots, float32 instructions over lanes and special
functions over their rate, with instructions counted in the machine code of the main loop (triton_static.py); and the
same with what that loop's instructions wait for each other (sass_scoreboard.py). Eager's: the bytes that its operators
read and write, over bandwidth; nothing else. Both leave out launches and caches: **predicted**, never measured.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from . import cuda_model, cuda_static, sass, sass_scoreboard, triton_static
from .cards import Card

Times = dict[str, dict[str, float]]  # milliseconds by launch and cause
ISSUE_LANES, SPECIAL_LANES = 128, 16  # of every multiprocessor, a clock
FLOAT32 = ("FFMA", "FADD", "FMUL", "FMNMX", "FSEL", "FSETP")


def _size(*tensors: Tensor | None) -> int:
    """Bytes of those that are there."""
    return sum(t.nbytes for t in tensors if t is not None)


class _Traffic(TorchDispatchMode):
    """Adds up the bytes that operators read and write; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:  # "is a label wrong?": fake labels are not
            return False
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [t for t in _pytree.tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
            self.bytes += _size(*tensors)
        return out


def eager_bytes(launch: triton_static.Launch, options: dict[str, Any]) -> int:
    """What the eager reference reads and writes, forward and backward, at a launch's sizes."""
    from hetero_kernels import reference

    shape, size = launch.arguments["student"].logits.shape, launch.arguments["labels"].data.shape
    with FakeTensorMode():
        student, teacher = torch.randn(shape, requires_grad=True), torch.randn(shape)
        labels = torch.zeros(size, dtype=torch.int64)
        with _Traffic() as traffic:
            if launch.name == "hakd_kernel":
                loss = reference.hakd_loss(student, teacher, labels, **options)
            else:
                has_teacher = launch.constants["HAS_TEACHER"]
                loss = reference.segmentation_loss(student, labels, teacher if has_teacher else None, **options)
            assert isinstance(loss, Tensor)
            loss.backward()
    return traffic.bytes


def floor_bytes(launch: triton_static.Launch) -> int:
    """What any implementation moves: coarse logits and labels in, gradient out."""
    student, teacher, labels = (launch.arguments[k] for k in ("student", "teacher", "labels"))
    logits = _size(student.logits)
    if launch.constants.get("HAS_TEACHER", True):
        logits += _size(teacher.logits)
    gradient = student.logits.numel() * 4
    seen = labels.data.numel() if not launch.constants.get("SAMPLED") else student.logits[:, 0].numel()
    return logits + gradient + seen * labels.data.element_size()


def our_bytes(launch: triton_static.Launch) -> int:
    """Slots out and in besides. Corners read again are the caches' affair."""
    student = launch.arguments["student"]
    slots = 0 if launch.constants["STUDENT_DIRECT"] else student.gradient.numel()
    return floor_bytes(launch) + 2 * slots * 4


def predict(
    card: Card, launch: triton_static.Launch, loop: dict[str, int], elements_per_thread: float
) -> dict[str, float]:
    """Milliseconds by cause."""
    height, width = triton_static.loss_grid(launch)
    batch, classes = launch.arguments["student"].logits.shape[:2]
    elements = batch * classes * height * width
    cycles = card.multiprocessors * card.clock * 1e6  # in a millisecond
    each = {
        "issue": sum(loop.values()) / ISSUE_LANES,
        "float32": sum(loop.get(op, 0) for op in FLOAT32) / card.float32_lanes,
        "special functions": loop.get("MUFU", 0) / SPECIAL_LANES,
    }
    times = {cause: n / elements_per_thread * elements / cycles for cause, n in each.items()}
    times["bytes"] = our_bytes(launch) / (card.bandwidth * 1e6)
    return times


@dataclass(frozen=True)
class RowLoop:
    """A kernel's loop over rows of pixels: a warp's instructions, the elements that a thread has in it, and warps of a
    multiprocessor."""

    body: list[sass.Instruction]
    elements: float
    warps: int

    def times(self, card: Card, launch: triton_static.Launch) -> dict[str, float]:
        """Of :func:`predict`, and "latency": where the loop's instructions wait for each other."""
        times = predict(card, launch, sass.count(self.body), self.elements)
        return {**times, "latency": times["issue"] / self.round(card).ipc}

    def round(self, card: Card) -> sass_scoreboard.Round:
        return sass_scoreboard.simulate([self.body], self.warps, card)


def triton_loop(launch: triton_static.Launch, target: str, classes: int) -> RowLoop:
    compiled = triton_static.compile_launch(launch, triton_static.TARGETS[target])
    report = triton_static.inspect(compiled, triton_static.TARGETS[target])
    elements = triton_static.elements_per_thread(launch, classes)
    return RowLoop(report.main_loop("MUFU"), elements, triton_static.occupancy(launch, report, target))


def cuda_loop(launch: triton_static.Launch, target: str, classes: int, kernels: dict) -> RowLoop:
    """Of the CUDA kernel that does what a launch of Triton's does."""
    name, lanes = cuda_static.kernel_of(launch, classes)
    return RowLoop(kernels[name].row, classes / lanes, kernels[name].warps(target))


def bound(times: dict[str, float]) -> tuple[float, str]:
    """The longest but latency, and its cause."""
    return max((time, cause) for cause, time in times.items() if cause != "latency")


def with_networks(launches: list[triton_static.Launch]) -> triton_static.Launch:
    """The first launch that reads both networks: the divisors are counted before it."""
    return next(launch for launch in launches if "teacher" in launch.arguments)


def eager_feature_bytes(launch: triton_static.Launch) -> int:
    """What the eager reference reads and writes from features on, forward and backward."""
    from hetero_kernels import reference

    networks = [launch.arguments[k] for k in ("student", "teacher")]
    with FakeTensorMode():
        features = [torch.randn(n.data.shape) for n in networks]
        weights = [torch.randn(n.weight.shape, requires_grad=True) for n in networks]
        features[0].requires_grad_()
        labels = torch.zeros(launch.arguments["labels"].data.shape, dtype=torch.int64)
        with _Traffic() as traffic:
            loss = reference.projected_hakd_loss(
                *features, *weights, labels, temperature=2.0, proj_weight=1.0, resolution="feature"
            )
            assert isinstance(loss, Tensor)
            loss.backward()
    return traffic.bytes


def product_times(card: Card, launch: triton_static.Launch, moved: int, multiplications: float) -> dict[str, float]:
    """Milliseconds by cause of a launch of Triton's, and "latency" of its loop; ``multiplications`` in thousands."""
    times = {"bytes": moved / (card.bandwidth * 1e6)}
    if multiplications:
        target = triton_static.TARGETS[card.target]
        report = triton_static.inspect(triton_static.compile_launch(launch, target), target)
        counted = triton_static.instructions_per_element(launch, report, 0)
        assert counted is not None
        warps = triton_static.occupancy(launch, report, card.target)
        loop = sass_scoreboard.simulate([report.main_loop(*triton_static.KINDS["tensor core"])], warps, card)
        cycles = card.multiprocessors * card.clock * 1e6
        times["issue"] = counted["instructions"] * multiplications / ISSUE_LANES / cycles
        times["latency"] = times["issue"] / loop.ipc
    return times


def predict_features(card: Card, launches: list[triton_static.Launch]) -> Times:
    """Of the launches of ``projected_hakd_loss`` and its backward: bytes, and the products' instructions; what is read
    again of its own counts nothing."""
    first = with_networks(launches).arguments
    features = _size(first["student"].data, first["teacher"].data)
    student = _size(first["student"].data)
    logits = sum(first[k].gradient.numel() * 4 for k in ("student", "teacher"))
    moved = {
        "projected_hakd_kernel": features + logits,
        "weight_gradients_kernel": features + logits,
        "project_back_kernel": logits + student,
    }
    found = {}
    for launch in launches:
        if launch.name not in moved:
            continue
        given, network = launch.constants, first["student"]
        pixels = network.data[:, 0].numel()
        if launch.name == "project_back_kernel":
            columns, channels = given["CLASSES"] * -(-first["classes"] // given["CLASSES"]), network.data.shape[1]
        else:
            columns = sum(given["PRODUCTS"] if "PRODUCTS" in given else given["BLOCKS"])
            channels = sum(first[k].data.shape[1] for k in ("student", "teacher"))
        found[launch.name] = product_times(card, launch, moved[launch.name], pixels * columns * channels / 1000)
    return found


# The projection on its own -------------------------------------------------------------------------------------------


def projection_bytes(launches: list[triton_static.Launch]) -> dict[str, tuple[int, float]]:
    """By kernel of ``projection_launches`` bytes, and thousands of multiplications (padded); the losses on raw logits
    count what reading these and writing their gradient takes, "loss". What a cache keeps is read once."""
    found: dict[str, tuple[int, float]] = {}
    for launch in launches:
        a, given = launch.arguments, launch.constants
        moved, multiplied = 0, 0.0
        if launch.name in ("project_kernel", "weights_kernel"):
            network = a["network"]
            moved = _size(network.data)
            moved += _size(network.gradient if launch.name == "project_kernel" else None)
            multiplied = network.data.numel() * sum(given["BLOCKS"]) / 1000
        if launch.name in ("weights_kernel", "project_back_kernel"):
            moved += _size(a["gradient"].given, a["gradient"].logits)
        if launch.name == "project_back_kernel":
            moved += _size(a["out"])
            multiplied = a["out"].numel() * given["CLASSES"] * -(-a["classes"] // given["CLASSES"]) / 1000
        if launch.name == "finish_kernel":  # and the launch before it, which read the logits first
            moved = sum(2 * _size(a[n].logits) + _size(a[f"{n}_out"]) for n in ("student", "teacher"))
        name = "loss" if launch.name == "finish_kernel" else launch.name
        if moved:
            before = found.get(name, (0, 0.0))
            found[name] = (before[0] + moved, before[1] + multiplied)
    return found


def projection_floor(launches: list[triton_static.Launch]) -> int:
    """Features read twice, their gradient written once where it is wanted; raw logits written, read twice, and their
    gradient written and read."""
    total = 0
    for launch in launches:
        if launch.name == "project_kernel":
            network = launch.arguments["network"]
            total += 2 * _size(network.data) + 5 * _size(network.gradient)
        if launch.name == "project_back_kernel":
            total += _size(launch.arguments["out"])
    return total


def torch_projection_bytes(launches: list[triton_static.Launch]) -> int:
    """What torch's convolution and batch norm read and write in the place of the kernels, forward and backward."""
    wanted = {x.arguments["out"].shape for x in launches if x.name == "project_back_kernel"}
    total = 0
    for launch in launches:
        if launch.name != "project_kernel":
            continue
        data, classes = launch.arguments["network"].data, launch.arguments["classes"]
        with FakeTensorMode():
            layers = torch.nn.Sequential(
                torch.nn.Conv2d(data.shape[1], classes, 1, bias=False, dtype=data.dtype),
                torch.nn.BatchNorm2d(classes, dtype=data.dtype),
            )
            x = torch.empty(data.shape, dtype=data.dtype, requires_grad=data.shape in wanted)
            with _Traffic() as traffic:
                y = layers(x)
                y.backward(torch.empty_like(y))
        total += traffic.bytes
    return total


def cuda_projection_times(
    card: Card, launches: list[triton_static.Launch], kernels: dict[str, cuda_static.Kernel]
) -> Times:
    """Of the CUDA kernels for what Triton's ``launches`` do, but for the loss between."""
    wanted = {x.arguments["out"].shape for x in launches if x.name == "project_back_kernel"}
    found = {}
    for launch in launches:
        if launch.name != "project_kernel":
            continue
        data = launch.arguments["network"].data
        batch, channels, height, width = data.shape
        call = cuda_model.Projection(
            batch, launch.arguments["classes"], (height, width), channels, data.shape in wanted
        )
        for name, times in cuda_model.predict_projection(card, call, kernels).items():
            found[f"{name}, {channels} channels"] = times
    return found


# The table -----------------------------------------------------------------------------------------------------------

COLUMNS = ("loss", "K", "card", "kernels", "floor, ms (predicted)", "bytes, ms", "instructions, ms",
           "bound of ours, ms", "ours with latency, ms (predicted)", "IPC", "cycles of a row", "eager's traffic, GB",
           "eager, ms (predicted)", "ratio")  # fmt: skip
Row = tuple[object, ...]
Compiled = dict[str, cuda_static.Kernels]  # by target; empty where there is no nvcc


def longest(launches: Times) -> tuple[float, float]:
    """The sum of what bounds the launches, and the same with what their instructions wait for."""
    return sum(bound(times)[0] for times in launches.values()), sum(max(times.values()) for times in launches.values())


def columns(launches: Times, row: int = 0) -> Row:
    """Of the table, from "bytes" on to "cycles of a row", which has ``row`` instructions."""
    arithmetic = [{cause: t for cause, t in times.items() if cause != "bytes"} for times in launches.values()]
    instructions = sum(bound(times)[0] for times in arithmetic if times)
    moved, issue, latency = (
        sum(times.get(cause, 0.0) for times in launches.values()) for cause in ("bytes", "issue", "latency")
    )
    (least, waited), (_, cause) = longest(launches), max(map(bound, launches.values()))
    return (f"{moved:.3f}", f"{instructions:.3f}", f"{least:.3f} ({cause})", f"{waited:.3f}", f"{issue / latency:.2f}",
            f"{row * latency / issue:.0f}" if row else "-")  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A loss of the table. ``floor``, ``eager``: bytes that any implementation moves, and that eager's does."""

    name: str
    classes: int
    floor: int
    eager: int

    def rows(self, card: Card, kernels: str, launches: Times, row: int = 0) -> Iterator[Row]:
        """The call's, and of several launches each one's whose instructions are counted."""
        rate = card.bandwidth * 1e6
        eager = self.eager / rate
        yield (self.name, self.classes, card.name, kernels, f"{self.floor / rate:.3f}", *columns(launches, row),
               f"{self.eager / 1e9:.2f}", f"{eager:.2f}", f"{eager / longest(launches)[1]:.3g}")  # fmt: skip
        for name, times in launches.items():
            if len(launches) > 1 and "issue" in times:
                yield (name, self.classes, card.name, kernels, "-", *columns({name: times}), "-", "-", "-")


def loss_rows(classes: int, cards: Sequence[Card], cuda: Compiled) -> Iterator[Row]:
    for launch in triton_static.paper_launches(torch.float32, classes):
        if launch.name not in triton_static.ROW_KERNELS or launch.constants.get("PROJ"):
            continue
        options: dict[str, Any] = {}
        if launch.name == "hakd_kernel":
            resolution = "feature" if launch.constants["STUDENT_DIRECT"] else "label"
            options = {"temperature": 2.0, "resolution": resolution}
        case = Case(triton_static.describe(launch), classes, floor_bytes(launch), eager_bytes(launch, options))
        for card in cards:
            loops = {"CUDA": cuda_loop(launch, card.target, classes, cuda[card.target])} if cuda else {}
            loops["Triton"] = triton_loop(launch, card.target, classes)
            for kernels, loop in loops.items():
                yield from case.rows(card, kernels, {launch.name: loop.times(card, launch)}, len(loop.body))


def feature_rows(classes: int, cards: Sequence[Card], cuda: Compiled) -> Iterator[Row]:
    launches = triton_static.projected_launches(torch.float32, classes)
    first = with_networks(launches)
    student, teacher = (first.arguments[k].data.shape for k in ("student", "teacher"))
    call = cuda_model.Call(student[0], classes, (student[2], student[3]), (student[1], teacher[1]))
    name = "projected_hakd_loss and its backward, 256 and 512 channels"
    case = Case(name, classes, call.floor(), eager_feature_bytes(first))
    for card in cards:
        if cuda:
            yield from case.rows(card, "CUDA", cuda_model.predict(card, call, cuda[card.target]))
        yield from case.rows(card, "Triton", predict_features(card, launches))


def projection_rows(classes: int, cards: Sequence[Card], cuda: Compiled) -> Iterator[Row]:
    launches = triton_static.projection_launches(torch.float32, classes)
    name = "projection with batch norm, 512 and 2048 channels (beside torch's layers)"
    case = Case(name, classes, projection_floor(launches), torch_projection_bytes(launches))
    ours, kernels = projection_bytes(launches), {launch.name: launch for launch in launches}
    for card in cards:
        times = {name: product_times(card, kernels.get(name, launches[0]), *n) for name, n in ours.items()}
        if cuda:
            theirs = cuda_projection_times(card, launches, cuda[card.target])
            yield from case.rows(card, "CUDA", {**theirs, "loss": times["loss"]})
        yield from case.rows(card, "Triton", times)


def table(cards: Sequence[Card]) -> Iterator[str]:
    """Lines, each as soon as it is known: ours and eager's, for the launches of the paper's sizes; the CUDA kernels'
    too where there is an nvcc."""
    cuda = {card.target: cuda_static.Kernels(card.target) for card in cards} if cuda_static.nvcc() else {}
    parts = (part(classes, cards, cuda) for part in (loss_rows, feature_rows, projection_rows) for classes in (19, 150))
    for row in itertools.chain([COLUMNS, ("---",) * len(COLUMNS)], *parts):
        yield "| " + " | ".join(map(str, row)) + " |"
