"""The model of time (gpu_model.py) for the CUDA kernels on features: of each launch the longest of its bytes over
bandwidth, its instructions over issue slots and its products over the tensor cores' rate; and how long its loops wait
(sass_scoreboard.py). **Predicted**, never measured.

Bytes are those that the emulation counts, each word once for every block that touches it; how a call is cut, the
host's plan says; instructions of a product are those of the loops around tensor core instructions, whatever element
types and layouts are told apart there, and those of the loops that stage gradients come on top; the loss is taken at
the cost of lanes that share a pixel of logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hetero_kernels import native

from . import triton_static

if TYPE_CHECKING:
    from . import cuda_static
    from .cards import Card

WARPS, SLICE, BACK_PIXELS, WEIGHT_TILES = 8, 16, 32, 24  # csrc/cuda/projection/features.h
TILES_AT_ONCE = {4: 1, 12: 1, 24: 2}  # by the tiles that a kernel is compiled for, csrc/cuda/projection/weights.cuh
PRODUCTS = 3  # of float32 factors, in parts of 11 bits
MULTIPLICATIONS = 16 * 8 * 8  # of a tensor core instruction
ISSUED = 4  # warps' instructions of a multiprocessor, a clock
FINISHED = 128  # elements of the weights' gradient that a block adds up
LOSS = "hakd_kernel<1,2,1,0>"  # at the cost of which the loss is taken
DIVISORS = 256  # blocks that count valid pixels, csrc/cuda/pixel_losses/reduction.cuh


@dataclass(frozen=True)
class Call:
    """``projected_hakd_loss`` in float32 with biases and L_proj, all gradients but the teacher's features', and its
    backward. ``pixels`` of an image."""

    batch: int
    classes: int
    grid: tuple[int, int]
    channels: tuple[int, int]

    @property
    def all_pixels(self) -> int:
        return self.batch * self.grid[0] * self.grid[1]

    @property
    def slices(self) -> tuple[int, int]:
        return -(-self.channels[0] // SLICE), -(-self.channels[1] // SLICE)

    @property
    def class_tiles(self) -> int:
        return -(-self.classes // 8)

    def floor(self) -> int:
        """Bytes that any implementation moves: features and labels in, gradients of features and weights out."""
        features = self.all_pixels * sum(self.channels)
        return 4 * (features + self.all_pixels * self.channels[0] + 2 * self.classes * sum(self.channels)) + (
            8 * self.all_pixels
        )


@dataclass(frozen=True)
class Work:
    """Of a multiprocessor: warps' instructions, by the kernel whose code they are counted in; tensor core instructions
    among them."""

    instructions: dict[str, float]
    products: float

    @classmethod
    def of_products(
        cls, name: str, kernels: dict[str, cuda_static.Kernel], products: float, fragments: float = 0
    ) -> Work:
        """And of ``fragments`` that are staged for them."""
        instructions = products * kernels[name].instructions_of_a_product
        if fragments:
            instructions += fragments * kernels[name].instructions_of_a_fragment
        return cls({name: instructions}, products)


def plan_of(call: Call, target: str, multiprocessors: int) -> dict[str, Any]:
    block = triton_static.SHARED[target]  # KB
    multiprocessor = block + 1  # a block has 1 KB of the driver's besides
    return native.host_module().cuda_projected_plan(
        batch=call.batch, classes=call.classes, grid=call.grid, student_channels=call.channels[0],
        teacher_channels=call.channels[1], multiprocessors=multiprocessors, shared_per_block=block << 10,
        shared_per_multiprocessor=multiprocessor << 10,
    )  # fmt: skip


def packed_bytes(call: Call, compiled: int) -> int:
    """Of both networks' weights, in as many tiles of 8 classes as are multiplied side by side."""
    some = TILES_AT_ONCE[compiled]
    return 4 * (-(-call.class_tiles // some) * some * 8) * sum(call.slices) * SLICE


def launch_bytes(call: Call, plan: dict[str, Any], multiprocessors: int) -> dict[str, int]:
    """Bytes that each launch reads and writes."""
    pixels, classes, blocks = call.all_pixels, call.classes, plan["blocks"]
    features, logits = 4 * pixels * sum(call.channels), 4 * pixels * classes  # logits: of one network
    weights, biases = 4 * classes * sum(call.channels), 8 * classes
    packed = 0 if plan["resident_weights"] else packed_bytes(call, plan["class_tiles"])
    labels, divisors = 8 * pixels, 4 * DIVISORS
    back_blocks = min(call.batch * -(-(pixels // call.batch) // BACK_PIXELS), 2 * multiprocessors)
    slots = blocks if plan["on_chip"] else plan["weight_splits"]
    terms = 8  # a block's sums
    moved = {
        "divisors_kernel": labels + 2 * divisors,
        "projected_hakd_kernel": features + labels + (1 if plan["on_chip"] else 2) * logits
        + blocks * ((packed or weights) + weights * plan["on_chip"] + 2 * biases + divisors + terms),
        "finish_projected_kernel": (slots + 1) * weights + (blocks + 1) * biases + blocks * terms + divisors,
        "project_back_kernel": logits + 4 * pixels * call.channels[0] + back_blocks * 4 * classes * call.channels[0],
    }  # fmt: skip
    if packed:
        moved["pack_weights_kernel"] = weights + packed
    if not plan["on_chip"]:
        columns, tiles = plan["weight_columns"], plan["tiles"]
        moved["projected_hakd_kernel"] += 4 * tiles
        moved["weight_gradients_kernel"] = features + sum(columns) * (logits + 4 * tiles) + slots * weights
    return moved


def launch_work(
    call: Call, plan: dict[str, Any], kernels: dict[str, cuda_static.Kernel], multiprocessors: int
) -> dict[str, Work]:
    """Of the busiest multiprocessor in each launch."""
    pixels, tiles, compiled = plan["pixels"], plan["tiles"], plan["class_tiles"]
    name = f"projected_hakd_kernel<{pixels // 16},{compiled},{int(plan['on_chip'])},{int(plan['resident_weights'])}>"
    slices = WARPS * -(-sum(call.slices) // WARPS)  # warps wait for the one with most
    products = PRODUCTS * slices * (pixels // 8) * call.class_tiles  # of a projection, and of the weights' gradient
    mine = products * (2 if plan["on_chip"] else 1)
    loss = kernels[LOSS].instructions * pixels * 8 * call.class_tiles / 32
    rounds = -(-tiles // plan["blocks"])
    instructions = {name: rounds * mine * kernels[name].instructions_of_a_product, LOSS: rounds * loss}
    work = {"projected_hakd_kernel": Work(instructions, rounds * mine)}
    if not plan["on_chip"]:
        of_warp = WEIGHT_TILES // compiled
        back = f"weight_gradients_kernel<{of_warp},{compiled},{pixels}>"
        waves = -(-sum(plan["weight_columns"]) * plan["weight_splits"] // multiprocessors)
        products = PRODUCTS * WARPS * of_warp * (pixels // 8) * call.class_tiles
        products *= waves * -(-tiles // plan["weight_splits"])
        work["weight_gradients_kernel"] = Work.of_products(back, kernels, products)
    tiles = call.batch * -(-(call.all_pixels // call.batch) // BACK_PIXELS)
    products = PRODUCTS * call.slices[0] * (BACK_PIXELS // 8) * call.class_tiles * -(-tiles // multiprocessors)
    fragments = products // PRODUCTS // call.slices[0]
    work["project_back_kernel"] = Work.of_products("project_back_kernel", kernels, products, fragments)
    return work


@dataclass(frozen=True)
class Projection:
    """``project`` of one network in float32 with batch statistics, and its backward."""

    batch: int
    classes: int
    grid: tuple[int, int]
    channels: int
    features_grad: bool

    @property
    def all_pixels(self) -> int:
        return self.batch * self.grid[0] * self.grid[1]


def weight_slices(class_tiles: int) -> int:
    """Slices of a warp in a launch of the weight's gradient, csrc/cuda/projection/projection_plan.h."""
    return 2 if class_tiles == 20 else WEIGHT_TILES // class_tiles


def projection_plan_of(call: Projection, target: str, multiprocessors: int) -> dict[str, Any]:
    return native.host_module().cuda_projection_plan(
        batch=call.batch, classes=call.classes, grid=call.grid, channels=call.channels,
        multiprocessors=multiprocessors, shared_per_block=triton_static.SHARED[target] << 10,
    )  # fmt: skip


def projection_bytes(call: Projection, plan: dict[str, Any], multiprocessors: int) -> dict[str, int]:
    """Bytes that each launch reads and writes."""
    pixels, classes, pilot = call.all_pixels, call.classes, 4 * call.channels
    features, logits, weight = 4 * pixels * call.channels, 4 * pixels * classes, 4 * classes * call.channels
    chunks, splits, coefficients = plan["chunks"], plan["weight_splits"], 24 * classes
    parts, packed = 8 * classes * plan["tiles"], 4 * (-(-classes // 8) * 8) * (-(-call.channels // SLICE) * SLICE)
    moved = {
        "pilot_kernel": 65 * pilot,
        "pack_weights_kernel": weight + packed,
        "project_kernel": chunks * features + logits + parts + plan["blocks"] * (packed // chunks + pilot),
        "statistics_kernel": parts + 2 * weight + 32 * classes,
        "projection_weights_kernel": chunks * features + 2 * plan["weight_columns"] * logits
        + splits * (weight + chunks * pilot + plan["weight_columns"] * coefficients),
        "finish_weights_kernel": (splits + 1) * weight
        + -(-classes * call.channels // FINISHED) * min(4 * FINISHED, pilot),
    }  # fmt: skip
    if call.features_grad:
        blocks = min(call.batch * -(-(pixels // call.batch) // BACK_PIXELS), 2 * multiprocessors)
        moved["project_back_kernel"] = 2 * logits + features + blocks * (weight + coefficients)
    return moved


def projection_work(
    call: Projection, plan: dict[str, Any], kernels: dict[str, cuda_static.Kernel], multiprocessors: int
) -> dict[str, Work]:
    """As :func:`launch_work`."""
    pixels, compiled, of_warp = plan["pixels"], plan["class_tiles"], weight_slices(plan["class_tiles"])
    slices, class_tiles = -(-call.channels // SLICE), -(-call.classes // 8)
    most, weight_steps = min(class_tiles, compiled), plan["weight_pixels"] // 8
    forward = -(-plan["blocks"] // multiprocessors) * plan["groups"] * slices * PRODUCTS * (pixels // 8) * most
    waves = -(-plan["weight_columns"] * plan["chunks"] * plan["weight_splits"] // multiprocessors)
    staged = waves * -(-plan["weight_tiles"] // plan["weight_splits"]) * weight_steps * most
    weights = staged * PRODUCTS * WARPS * of_warp
    done = {f"project_kernel<{pixels // 16},{compiled}>": (forward, 0),
            f"projection_weights_kernel<{of_warp},{compiled},{8 * weight_steps}>": (weights, staged)}  # fmt: skip
    if call.features_grad:
        tiles = call.batch * -(-(call.all_pixels // call.batch) // BACK_PIXELS)
        staged = -(-tiles // multiprocessors) * (BACK_PIXELS // 8) * class_tiles
        done["project_back_kernel"] = (staged * slices * PRODUCTS, staged)
    return {name.partition("<")[0]: Work.of_products(name, kernels, *n) for name, n in done.items()}


def predict_projection(
    card: Card, call: Projection, kernels: dict[str, cuda_static.Kernel]
) -> dict[str, dict[str, float]]:
    """As :func:`predict`."""
    plan = projection_plan_of(call, card.target, card.multiprocessors)
    moved = projection_bytes(call, plan, card.multiprocessors)
    return _times(card, moved, projection_work(call, plan, kernels, card.multiprocessors), kernels)


def predict(card: Card, call: Call, kernels: dict[str, cuda_static.Kernel]) -> dict[str, dict[str, float]]:
    """Milliseconds by launch and cause; "latency": of its instructions with what they wait for."""
    plan = plan_of(call, card.target, card.multiprocessors)
    moved = launch_bytes(call, plan, card.multiprocessors)
    return _times(card, moved, launch_work(call, plan, kernels, card.multiprocessors), kernels)


def _times(
    card: Card, moved: dict[str, int], work: dict[str, Work], kernels: dict[str, cuda_static.Kernel]
) -> dict[str, dict[str, float]]:
    cycles = card.clock * 1e6  # in a millisecond
    times = {name: {"bytes": n / (card.bandwidth * 1e6)} for name, n in moved.items()}
    for name, of_launch in work.items():
        times[name]["issue"] = sum(of_launch.instructions.values()) / ISSUED / cycles
        times[name]["tensor cores"] = of_launch.products * MULTIPLICATIONS / card.tensor_multiplications / cycles
        # A block to a multiprocessor: what blocks beside it would hide is not counted on.
        times[name]["latency"] = sum(
            n / kernels[kernel].round(card, WARPS).ipc for kernel, n in of_launch.instructions.items()
        ) / ISSUED / cycles  # fmt: skip
    return times
