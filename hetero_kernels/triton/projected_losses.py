"""HeteroAKD on features in Triton: projections, loss and the logits' gradient in one launch.

A second launch takes that gradient to weights and biases, which reads the features again (docs/triton.md says why), a
small one adds up. The backward takes it to the features (``project_back_kernel``).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import keeps_channels_last
from .features import (
    Features,
    finish_weights,
    flat_of,
    load_tile,
    locate_flat,
    project,
    store_tile,
    weight_gradient,
)
from .hakd_math import hakd_row, hakd_row_bounded
from .launch import (
    FeatureGrid,
    bounded_limit,
    device_guard,
    feature_argument,
    power_of,
    product_precision,
    rows_follow,
    shape_of,
)
from .pixel_losses import bounded_band, scaled_band
from .pixel_math import LOG2E
from .plan import TermsPlan, check_labels, upstream_argument
from .projection import LogitGradient, empty_gradient, features_gradient
from .reduction import Output, Term, store_loss, store_maps, store_sums, term_scale
from .tile import class_numbers, labels_of, load_labels, masked, pixel_factor
from .tuning import FeatureTiling, cdiv, feature_tilings_of, multiprocessors, tuned


@triton.jit
def projected_hakd_kernel(
    student, teacher, labels, upstream, grid, hakd_term, proj_term, output, classes, temperature, limit, one,
    BLOCKS: tl.constexpr, PRODUCTS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, STUDENT: tl.constexpr,
    TEACHER: tl.constexpr, FLAT: tl.constexpr, MULTIPLE: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    POWER: tl.constexpr, KMM: tl.constexpr, KEM: tl.constexpr, CE: tl.constexpr, PROJ: tl.constexpr,
    SAMPLED: tl.constexpr, UPSTREAM: tl.constexpr, MAPS: tl.constexpr, HAKD_PARTS: tl.constexpr,
    PROJ_PARTS: tl.constexpr,
):  # fmt: skip
    """Sections 1 to 6 on the student's grid, not for kem="spatial".

    BLOCKS: of classes in the pixels' mathematics, PRODUCTS: in the projections; STUDENT, TEACHER: whose logits'
    gradient is wanted; FLAT, BIAS: of both networks, see features.py; the others as ``hakd_kernel``'s.
    """
    labels, grid = labels_of(labels), flat_of(grid, MULTIPLE)
    program = tl.program_id(0)
    pixels, y, n = locate_flat(program, grid, PIXELS)
    project(student, pixels, y, n, classes, grid, one, PRODUCTS, CHANNELS, FLAT[0], BIAS[0], PRECISION)
    project(teacher, pixels, y, n, classes, grid, one, PRODUCTS, CHANNELS, FLAT[1], BIAS[1], PRECISION)
    tl.debug_barrier()  # a thread reads what others wrote
    k = class_numbers(BLOCKS)
    z_s, z_t = load_tile(student, pixels, n, k, classes, grid), load_tile(teacher, pixels, n, k, classes, grid)
    label, valid, wrong = load_labels(labels, pixels, y, classes, SAMPLED)
    factor = pixel_factor(upstream, pixels, y, UPSTREAM)
    hakd_scale = term_scale(hakd_term, 0, HAKD_PARTS)
    proj_scale = term_scale(proj_term, 1, PROJ_PARTS)
    hakd_factor, proj_factor = factor * hakd_scale, factor * (proj_scale / classes)
    if bounded_band((z_s, z_s), k, classes, limit) & bounded_band((z_t, z_t), k, classes, limit):
        unit = LOG2E / temperature
        w_s, _ = scaled_band((z_s, z_s), unit)
        w_t, _ = scaled_band((z_t, z_t), unit)
        hakd, proj, g_s, g_t = hakd_row_bounded(
            w_s, w_t, k, classes, label, temperature, hakd_factor, proj_factor, POWER, KMM, KEM, CE, PROJ
        )
    else:
        hakd, proj, g_s, g_t = hakd_row(
            z_s, z_t, k, classes, label, (k, k), temperature, hakd_factor, proj_factor, KMM, KEM, CE, PROJ
        )
    nothing = tl.where(wrong, float("nan"), 0.0)
    hakd, proj = tl.where(valid, hakd, nothing), tl.where(valid, proj, nothing)
    store_maps(output, pixels, y, grid, hakd, proj, MAPS)
    store_sums(output, program, hakd, proj, valid.to(tl.int32))
    if STUDENT:
        store_tile(student, pixels, n, k, classes, grid, masked(g_s, valid))
    if TEACHER:
        store_tile(teacher, pixels, n, k, classes, grid, masked(g_t, valid))


@triton.jit(do_not_specialize=["splits", "images"])
def weight_gradients_kernel(
    student, teacher, labels, grid, classes, student_columns, columns, splits, images, one,
    BLOCKS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, STUDENT: tl.constexpr, TEACHER: tl.constexpr,
    FLAT: tl.constexpr, MULTIPLE: tl.constexpr, SAMPLED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Parts of both networks' weight gradients: of ``columns`` blocks of channels the first ``student_columns`` are the
    student's."""
    labels, grid = labels_of(labels), flat_of(grid, MULTIPLE)
    program = tl.program_id(0)
    block, split = program % columns, program // columns
    if block < student_columns:
        if STUDENT:
            weight_gradient(
                student, labels, grid, classes, block, split, splits, images, one,
                BLOCKS, PIXELS, CHANNELS, FLAT[0], SAMPLED, PRECISION,
            )  # fmt: skip
    else:
        if TEACHER:
            weight_gradient(
                teacher, labels, grid, classes, block - student_columns, split, splits, images, one,
                BLOCKS, PIXELS, CHANNELS, FLAT[1], SAMPLED, PRECISION,
            )  # fmt: skip


@triton.jit(do_not_specialize=["programs", "splits"])
def finish_projected_kernel(
    student, teacher, outputs, partial, terms, loss, first, second, classes, programs, splits, ends,
    MODES: tl.constexpr, PARTS: tl.constexpr, WEIGHTS: tl.constexpr, BIAS: tl.constexpr, LOSS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """What is left for the end. The first program finishes the loss (LOSS), the next ones, up to ``ends``, the
    student's and the teacher's weights. ``outputs``: gradients of the student's weight and bias, and of the teacher's.
    """
    program = tl.program_id(0)
    if LOSS:
        program -= 1
    if program < 0:
        if LOSS:
            store_loss(partial, terms, loss, first, second, programs, 1.0, MODES, PARTS, BLOCK)
    elif program < ends[0]:
        if WEIGHTS[0]:
            finish_weights(student, outputs[0], outputs[1], program, classes, splits, BIAS[0], BLOCK)
    else:
        if WEIGHTS[1]:
            finish_weights(teacher, outputs[2], outputs[3], program - ends[0], classes, splits, BIAS[1], BLOCK)


# Plans -----------------------------------------------------------------------------------------------------------


FINISH_BLOCK = 512


class NetworkPlan:
    """A network's features and projection, its gradients on the way, and the kernels' view of them."""

    def __init__(
        self, features: Tensor, weight: Tensor, bias: Tensor | None, logits_wanted: bool, weights_wanted: bool,
        logits: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.features, self.weight, self.bias = features, weight, None if bias is None else bias.contiguous()
        self.logits_wanted, self.weights_wanted = logits_wanted, weights_wanted
        batch, self.channels, height, width = features.shape
        self.classes = weight.shape[0]

        def empty(wanted: bool, *shape: int) -> Tensor:
            return torch.empty(shape if wanted else (0,), dtype=torch.float32, device=features.device)

        # Later their gradient.
        self.logits = empty(True, batch, self.classes, height, width) if logits is None else logits
        self.weight_gradient = empty(weights_wanted, self.classes, self.channels)
        self.bias_gradient = empty(weights_wanted and bias is not None, self.classes)
        self.partial = self.weight_gradient

    @property
    def wanted(self) -> bool:
        return self.logits_wanted or self.weights_wanted

    @property
    def flat(self) -> bool:
        return rows_follow(self.features)

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.logits if self.logits_wanted else self.logits.new_empty(0)
        return logits, self.weight_gradient, self.bias_gradient

    def cleared(self) -> NetworkPlan:
        for gradient in self.gradients():
            gradient.zero_()
        return self

    def argument(self) -> Features:
        bias = self.weight if self.bias is None else self.bias
        return feature_argument(self.features, self.weight, bias, self.logits, self.partial)


def plan_weights(networks: tuple[NetworkPlan, NetworkPlan], grid: FeatureGrid, channels: int) -> tuple[list[int], int]:
    """Blocks of ``channels`` columns of each network (bias included) and the number of parts their gradients come in,
    which the networks get memory for: as many as fill the device, of at most an eighth of the features' size."""
    columns = [cdiv(n.channels + 1, channels) for n in networks]
    # Counted for both networks, or which gradients are wanted would change how they round.
    enough = cdiv(4 * multiprocessors(networks[0].features.device), sum(columns))
    small = sum(n.features.numel() for n in networks) // (8 * sum(n.classes * (n.channels + 1) for n in networks))
    splits = max(1, min(enough, small, grid.programs))
    for network in networks:
        if network.weights_wanted:
            network.partial = network.weight_gradient.new_empty(splits, network.classes, network.channels + 1)
    return [m if n.weights_wanted else 0 for n, m in zip(networks, columns, strict=True)], splits


def finish(
    networks: tuple[NetworkPlan, NetworkPlan], grid: FeatureGrid, plan: TermsPlan, terms: tuple[Term, Term],
    losses: tuple[Tensor, ...], partial: Tensor, splits: int, maps: bool,
) -> None:  # fmt: skip
    """The last launch."""
    sizes = [n.partial.numel() // splits if n.weights_wanted else 0 for n in networks]
    ends = (cdiv(sizes[0], FINISH_BLOCK), cdiv(sizes[0], FINISH_BLOCK) + cdiv(sizes[1], FINISH_BLOCK))
    programs = ends[1] + (not maps)
    if programs == 0:
        return
    finish_projected_kernel[(programs,)](
        *(n.argument() for n in networks), tuple(g for n in networks for g in n.gradients()[1:]), partial, terms,
        *losses, networks[0].classes, grid.programs, splits, ends,
        MODES=plan.modes, PARTS=plan.blocks, WEIGHTS=tuple(s > 0 for s in sizes),
        BIAS=tuple(n.bias is not None for n in networks), LOSS=not maps, BLOCK=FINISH_BLOCK, num_warps=4,
    )  # fmt: skip


# The operators ---------------------------------------------------------------------------------------------------


@tuned(feature_tilings_of)
def projected_hakd_loss(
    tiling: FeatureTiling, student_features: Tensor, teacher_features: Tensor, student_weight: Tensor,
    teacher_weight: Tensor, student_bias: Tensor | None, teacher_bias: Tensor | None, labels: Tensor, scalars: Tensor,
    hakd_normalizer: Tensor | None, proj_normalizer: Tensor | None, upstream: Tensor | None, kmm: bool, kem: str,
    divergence: str, ignore_index: int, reduction: str, student_features_grad: bool, student_weight_grad: bool,
    teacher_features_grad: bool, teacher_weight_grad: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Implementation of the operator ``projected_hakd_loss``, see ops/projected_losses.py."""
    temperature, hakd_weight, proj_weight = scalars.tolist()
    batch, _, height, width = student_features.shape
    classes = student_weight.shape[0]
    grid = FeatureGrid(batch, height, width, tiling.pixels)
    maps, normalizers = reduction == "none", (hakd_normalizer, proj_normalizer)
    losses = [student_features.new_empty((batch, height, width) if maps else (), dtype=torch.float32) for _ in range(3)]
    supervised = proj_weight != 0  # L_proj is the teacher's only source
    student = NetworkPlan(student_features, student_weight, student_bias, student_features_grad, student_weight_grad)
    teachers = (teacher_features, teacher_weight, teacher_bias)
    teacher = NetworkPlan(*teachers, teacher_features_grad and supervised, teacher_weight_grad and supervised)
    results = (student, teacher)
    if not supervised:
        results = (student, NetworkPlan(*teachers, teacher_features_grad, teacher_weight_grad).cleared())
    networks = (student, teacher)
    if grid.programs == 0:
        return (*(t.zero_() for t in losses), *gradients(*(n.cleared() for n in results)))
    # All gradients lie in the loss grid, where nothing touches them again: divisors are counted first.
    plan = TermsPlan(
        shape_of(labels), batch, (height, width), reduction, (hakd_weight != 0, supervised),
        (hakd_normalizer is not None, proj_normalizer is not None), gradients=True, in_place=True,
    )  # fmt: skip
    check_labels(labels, (height, width), classes, ignore_index)
    partial, counts = losses[0].new_empty(2 * grid.programs), losses[0].new_empty(plan.floats)
    terms = plan.arguments((hakd_weight, proj_weight), normalizers, counts)
    where = plan.labels(labels, ignore_index)
    common = {
        "BLOCKS": tiling.products, "PIXELS": tiling.pixels, "STUDENT": student.wanted,
        "TEACHER": teacher.wanted, "FLAT": tuple(n.flat for n in networks), "MULTIPLE": grid.multiple,
        "SAMPLED": plan.sampled, "PRECISION": product_precision(student_features), "num_warps": tiling.warps,
    }  # fmt: skip
    splits = 1
    with device_guard(student_features):
        plan.count(False, where, counts, classes)
        projected_hakd_kernel[(grid.programs,)](
            student.argument(), teacher.argument(), where, upstream_argument(upstream), grid.argument, *terms,
            Output(partial, None, *(losses[1:] if maps else (None, None))), classes, temperature,
            bounded_limit(temperature), 1.0, BIAS=tuple(n.bias is not None for n in networks),
            POWER=power_of(temperature), KMM=kmm, KEM=kem,
            CE=divergence == "ce", PROJ=supervised, UPSTREAM=upstream is not None, MAPS=maps,
            HAKD_PARTS=plan.blocks[0], PROJ_PARTS=plan.blocks[1], PRODUCTS=tiling.products,
            CHANNELS=tiling.channels, **common | {"BLOCKS": tiling.blocks},
        )  # fmt: skip
        if student.weights_wanted or teacher.weights_wanted:
            columns, splits = plan_weights(networks, grid, tiling.columns)
            common |= {"STUDENT": student.weights_wanted, "TEACHER": teacher.weights_wanted}
            weight_gradients_kernel[(sum(columns) * splits,)](
                student.argument(), teacher.argument(), where, grid.argument, classes, columns[0], sum(columns),
                splits, batch, 1.0, CHANNELS=tiling.columns, **common,
            )  # fmt: skip
        finish(networks, grid, plan, terms, tuple(losses), partial, splits, maps)
    if maps:
        losses[0] = hakd_weight * losses[1] + proj_weight * losses[2]
    return (*losses, *gradients(*results))


def gradients(student: NetworkPlan, teacher: NetworkPlan) -> tuple[Tensor, ...]:
    """In the operator's order."""
    return tuple(g for pair in zip(student.gradients(), teacher.gradients(), strict=True) for g in pair)


def project_back(logit_gradient: Tensor, weight: Tensor, factor: Tensor | None, like: Tensor) -> Tensor:
    """Implementation of the operator ``project_back``, see ops/projected_losses.py."""
    out = empty_gradient(like, keeps_channels_last(like))
    if out.numel() == 0:
        return out.to(like.dtype)
    gradient = LogitGradient(logit_gradient.contiguous(), None, None, None, 0.0)
    return features_gradient(like, weight, gradient, factor, out)
