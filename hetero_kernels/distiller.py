"""Any two networks, a criterion, and what is to be done so that one can be distilled into the other."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from . import arguments as check
from . import taps
from .loss import HeteroAKDLoss, HeteroAKDOutput
from .reference import Normalizer

NETWORKS_GIVE = ("student_features", "teacher_features", "student_logits", "teacher_logits")
"""What a criterion's ``forward`` may name, besides ``labels`` and ``normalizer``."""
PAIRED = ("hakd", "proj")
"""Terms that every pair of taps has of its own."""


class MeanOverTaps(nn.Module):
    """HeteroAKD's objective with several pairs of feature maps: the terms of the output logits once, and the mean of
    the pairs' own terms, each pair with projectors of its own.

    Args:
        criteria: a :class:`HeteroAKDLoss` per pair of taps, in their order. What concerns the output logits is the
            first one's to say.

    Raises:
        TypeError, ValueError: there is none, or one is something else.
    """

    def __init__(self, criteria: Iterable[HeteroAKDLoss]) -> None:
        super().__init__()
        self.criteria = nn.ModuleList(criteria)
        if not self.criteria:
            raise ValueError("criteria is empty, expected a HeteroAKDLoss per pair of taps")
        for criterion in self.criteria:
            if not isinstance(criterion, HeteroAKDLoss):
                raise TypeError(f"criteria holds a {type(criterion).__name__}, expected HeteroAKDLoss")

    def forward(
        self,
        student_features: Sequence[Tensor],
        teacher_features: Sequence[Tensor],
        labels: Tensor,
        student_logits: Tensor | None = None,
        teacher_logits: Tensor | None = None,
        *,
        normalizer: Normalizer = None,
    ) -> HeteroAKDOutput:
        """Maps [B, C, h, w] by pair; the rest as :class:`HeteroAKDLoss`, ``hakd`` and ``proj`` being means over pairs.

        Args:
            normalizer: a mapping's terms of pair i are "hakd.i" and "proj.i", as :meth:`divisors` names them.

        Raises:
            ValueError: there are more or fewer maps than pairs, or the normalizer has terms of another name.
        """
        for name, maps in (("student_features", student_features), ("teacher_features", teacher_features)):
            if isinstance(maps, Tensor) or len(maps) != len(self.criteria):
                raise ValueError(
                    f"{name} is {taps.describe(maps)}, expected a tuple of {len(self.criteria)} maps, one per criterion"
                )
        pairs = []
        if isinstance(normalizer, Mapping):
            known = ["task", "kd", *(f"{term}.{number}" for number in range(len(self.criteria)) for term in PAIRED)]
            check.check_terms(normalizer, known)
        for number, criterion in enumerate(self.criteria):
            own = normalizer
            if isinstance(normalizer, Mapping):
                own = {term: normalizer[f"{term}.{number}"] for term in PAIRED if f"{term}.{number}" in normalizer}
            pairs.append(criterion(student_features[number], teacher_features[number], labels, normalizer=own))
        loss, hakd, proj = (torch.stack([getattr(each, name) for each in pairs]).mean() for name in ("loss", *PAIRED))
        return self._pairs()[0].with_logits(loss, hakd, proj, student_logits, labels, teacher_logits, normalizer)

    @property
    def needs_feature_size(self) -> bool:
        """Whether :meth:`divisors` depends on the student's feature grids."""
        return any(criterion.needs_feature_size for criterion in self._pairs())

    def divisors(self, labels: Tensor, feature_size: Sequence[tuple[int, int]] | None = None) -> dict[str, Tensor]:
        """As :meth:`HeteroAKDLoss.divisors`: "task", "kd", and "hakd.i" and "proj.i" of pair i; a size per pair."""
        divisors: dict[str, Tensor] = {}
        for number, criterion in enumerate(self._pairs()):
            own = criterion.divisors(labels, None if feature_size is None else feature_size[number])
            divisors = {**own, **divisors}  # of the output logits the first one's
            divisors |= {f"{term}.{number}": divisors.pop(term) for term in PAIRED}
        return divisors

    def _pairs(self) -> list[HeteroAKDLoss]:
        return cast(list[HeteroAKDLoss], list(self.criteria))


class DistillerOutput(NamedTuple):
    """What :class:`Distiller` returns."""

    loss: Any
    """0-dim tensor to go backward from; None without labels."""
    logits: Tensor
    """The student's output logits [B, K, h, w] at their own stride."""
    terms: Any
    """The criterion's own output (:class:`HeteroAKDOutput` say), for the log; None without labels."""

    def scalars(self) -> dict[str, Tensor]:
        """The loss and, where the criterion returns them by name, its 0-dim terms, without gradients: for a log."""
        named = self.terms if isinstance(self.terms, Mapping) else getattr(self.terms, "_asdict", dict)()
        given = {**named, "loss": self.loss}
        return {name: each.detach() for name, each in given.items() if isinstance(each, Tensor) and each.dim() == 0}


class Distiller(nn.Module):
    """A student, a frozen teacher and a criterion behind one call: ``distiller(images, labels).loss.backward()``.

    All that is trained is in it, so that ``distiller.parameters()`` are what an optimiser needs (the student's and the
    projectors') and one DistributedDataParallel, or ``fully_shard(student)`` and then ``fully_shard(distiller)``, is
    enough. The teacher is in eval mode, needs no gradient, follows ``.to()`` and is in no ``state_dict()``, no
    ``parameters()``, no bucket; ``train()`` does not reach it. ``distiller.student`` is the network that was given, its
    ``state_dict()`` key for key; run alone, or copied or pickled alone, it knows nothing of the distiller.

    Args:
        student: maps images to logits [B, K, h, w], to a tuple or list that begins with them, or to a dictionary with
            them as "out" or "logits" (torchvision, Hugging Face).
        teacher: another such network, which is frozen here; or None, where the criterion needs none.
        criterion: any module whose ``forward`` names some of student_features, teacher_features, labels,
            student_logits, teacher_logits and normalizer (:class:`HeteroAKDLoss`, :class:`SegmentationLoss`,
            :class:`MeanOverTaps` or one of your own): it is called by keyword with what it names. It returns the loss,
            or a named tuple, object or dictionary with it as ``loss``.
        student_tap, teacher_tap: paths, as in ``named_modules``, of the modules whose outputs are the features:
            [B, C, h, w], or a list or dictionary of maps, of which the last is taken. With a list of paths the
            criterion gets a tuple of maps. None, where the criterion needs none.

    Raises:
        TypeError: an argument is no module, or the criterion's ``forward`` requires something else.
        ValueError: a tap is unknown (the message lists candidates with their channels) or missing, the criterion needs
            a teacher, or student and teacher share parameters.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        criterion: nn.Module,
        *,
        student_tap: str | Sequence[str] | None = None,
        teacher_tap: str | Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        for name, module in (("student", student), ("teacher", teacher), ("criterion", criterion)):
            if not isinstance(module, nn.Module) and not (name == "teacher" and module is None):
                raise TypeError(f"{name} is {type(module).__name__}, expected a torch.nn.Module")
        self._named = _named_by(criterion, teacher, student_tap, teacher_tap)
        if teacher is not None:
            shared = {id(parameter) for parameter in teacher.parameters()}
            if any(id(parameter) in shared for parameter in student.parameters()):
                raise ValueError("student and teacher share parameters, which would be frozen: copy.deepcopy one")
            teacher.eval().requires_grad_(False)
        self.student = student
        self.criterion = criterion
        self.student_tap, self.teacher_tap = student_tap, teacher_tap
        self._held = (teacher,)  # in a tuple it is no submodule
        self._several = {"student": not isinstance(student_tap, str), "teacher": not isinstance(teacher_tap, str)}
        self._student_taps = _taps(student, student_tap, "student_tap")
        self._teacher_taps = () if teacher is None else _taps(teacher, teacher_tap, "teacher_tap")
        self._sizes: dict[tuple[int, int], list[tuple[int, int]]] = {}
        self._versions: tuple[int, int] | None = None

    @classmethod
    def heteroakd(
        cls,
        student: nn.Module,
        teacher: nn.Module,
        images: Tensor,
        *,
        num_classes: int,
        student_tap: str | Sequence[str],
        teacher_tap: str | Sequence[str],
        **options: Any,
    ) -> Distiller:
        """A distiller with :class:`HeteroAKDLoss`, its channels found by running both networks once.

        Args:
            student, teacher, student_tap, teacher_tap: as :class:`Distiller`. Lists of taps are paired in their order,
                each pair with projectors of its own (:class:`MeanOverTaps`).
            images: [B, 3, H, W] of a size to train with; one is enough. They are run in eval mode, without a trace in
                buffers, modes or random state.
            num_classes: K. options: of :class:`HeteroAKDLoss`.

        Raises:
            TypeError: also for taps that are no paths, and images that are no tensor.
            ValueError: also for logits of other than K classes, different numbers of taps, and networks that fail.
        """
        for name, value in (("student_tap", student_tap), ("teacher_tap", teacher_tap)):
            if not isinstance(value, Sequence) or not all(isinstance(path, str) for path in value):
                raise TypeError(f"{name} is {value!r}, expected a path of named_modules() or a list of paths")
        if not isinstance(images, Tensor):
            raise TypeError(f"images is {taps.describe(images)}, expected a Tensor [B, 3, H, W]")
        counts = [1 if isinstance(paths, str) else len(paths) for paths in (student_tap, teacher_tap)]
        if counts[0] != counts[1]:
            raise ValueError(
                f"student_tap names {counts[0]} modules ({student_tap}), teacher_tap {counts[1]} ({teacher_tap}): they "
                "are paired in their order, so that there must be as many"
            )
        ours = _probe(student, student_tap, images, "student")
        theirs = _probe(teacher, teacher_tap, images, "teacher")
        for name, output in (("student", ours), ("teacher", theirs)):
            if output.logits.shape[1] != num_classes:
                raise ValueError(
                    f"the {name} must return logits of num_classes={num_classes} classes, got "
                    f"{list(output.logits.shape)}"
                )
        losses = [
            HeteroAKDLoss(student_map.shape[1], teacher_map.shape[1], num_classes, **options)
            for student_map, teacher_map in zip(ours.maps, theirs.maps, strict=True)
        ]
        criterion: nn.Module = losses[0] if isinstance(student_tap, str) else MeanOverTaps(losses)
        criterion.to(taps.device_of(student))
        distiller = cls(student, teacher, criterion, student_tap=student_tap, teacher_tap=teacher_tap)
        distiller._sizes[_size(images)] = [_size(features) for features in ours.maps]
        return distiller

    @property
    def teacher(self) -> nn.Module | None:
        """The frozen teacher; no submodule."""
        return self._held[0]

    def extra_repr(self) -> str:
        teacher = "None" if self.teacher is None else type(self.teacher).__name__
        paths = [[tap.path for tap in each] for each in (self._student_taps, self._teacher_taps)]
        return f"teacher: {teacher} (frozen, no submodule), student_tap={paths[0]}, teacher_tap={paths[1]}"

    def forward(
        self, images: Tensor, labels: Tensor | None = None, *, normalizer: Normalizer = None
    ) -> DistillerOutput:
        """The loss of a batch: images [B, 3, H, W] as both networks take them, labels int [B, H, W].

        Args:
            labels: None runs the student alone, for its logits.
            normalizer: what replaces the divisors of the terms' means, see :meth:`divisors`.

        Raises:
            ValueError: a network returns no logits, a tap did not run or returned no map, or a student's tap carries no
                gradient where gradients are wanted.
        """
        if labels is None:
            return DistillerOutput(None, taps.output_logits(self.student(images)), None)
        if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._look_for_forgotten_parameters()
        given: dict[str, Any] = self.outputs(images)
        if "student_features" in self._named and torch.is_grad_enabled():
            self._check_gradients(given["student_features"])
        inputs = {"labels": labels, "normalizer": normalizer, **given}
        if normalizer is not None and "normalizer" not in self._named:
            raise TypeError(f"criterion {type(self.criterion).__name__} takes no normalizer, got one")
        terms = self.criterion(**{name: inputs[name] for name in self._named})
        return DistillerOutput(_loss_of(terms), given["student_logits"], terms)

    def outputs(self, images: Tensor) -> dict[str, Any]:
        """What the criterion gets of both networks for images [B, 3, H, W]: "student_logits", and as far as it names
        them "student_features", "teacher_logits" and "teacher_features". The teacher runs without gradients."""
        given: dict[str, Any] = {}
        wanted = self._student_taps if "student_features" in self._named else ()
        ours = taps.run(self.student, wanted, images)
        given["student_logits"] = ours.logits
        if wanted:
            given["student_features"] = ours.maps if self._several["student"] else ours.maps[0]
        if self.teacher is not None and {"teacher_features", "teacher_logits"} & set(self._named):
            wanted = self._teacher_taps if "teacher_features" in self._named else ()
            if self.teacher.training:  # by somebody's train(): what it teaches would depend on the batch
                self.teacher.eval()
            with torch.no_grad():  # not inference_mode: autograd saves these maps, and would have to copy them
                theirs = taps.run(self.teacher, wanted, images)
            given["teacher_logits"] = theirs.logits
            if wanted:
                given["teacher_features"] = theirs.maps if self._several["teacher"] else theirs.maps[0]
        return given

    def divisors(self, labels: Tensor, image_size: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """What the criterion divides each term's sum by for labels [B, H, W]: 0-dim float64 tensors, without a device
        synchronisation.

        Summed over micro-batches, or as :func:`hetero_kernels.mean_over_processes` gives them, they are the
        ``normalizer`` with which every labelled pixel of the joint batch counts the same.

        Args:
            image_size: (H, W) of the images where the labels' is another. Where the loss grid is the student's feature
                map, the student is run once for a size, in eval mode and without a trace; before ``fully_shard``.
        """
        count = getattr(self.criterion, "divisors", None)
        if count is None:
            raise TypeError(f"criterion {type(self.criterion).__name__} has no divisors(labels)")
        if not getattr(self.criterion, "needs_feature_size", False):
            return cast(dict[str, Tensor], count(labels))
        size = image_size or (labels.shape[1], labels.shape[2])
        if size not in self._sizes:
            parameter = next(self.student.parameters())
            image = torch.zeros(1, 3, *size, device=parameter.device, dtype=parameter.dtype)
            found = taps.probe(self.student, [tap.path for tap in self._student_taps], image)
            self._sizes[size] = [_size(features) for features in found.maps]
        sizes = self._sizes[size]
        return cast(dict[str, Tensor], count(labels, sizes if self._several["student"] else sizes[0]))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Distiller:
        if recurse and self.teacher is not None:  # `.to()` and its kin
            self.teacher._apply(fn)
        return cast(Distiller, super()._apply(fn, recurse))

    def _replicate_for_data_parallel(self) -> Any:
        raise RuntimeError("a Distiller cannot be replicated by DataParallel: use DistributedDataParallel")

    def _check_gradients(self, features: Any) -> None:
        for tap, each in zip(self._student_taps, features if self._several["student"] else (features,), strict=True):
            if not each.requires_grad:
                raise ValueError(
                    f"student_tap {tap.path!r} carries no gradient, so that distillation on it would reach nothing: "
                    "gradient checkpointing there must not be reentrant (use_reentrant=False), and something up to it "
                    "must be trainable; measure losses under torch.no_grad()"
                )

    def _look_for_forgotten_parameters(self) -> None:
        """Warns once where an optimiser moves the student and not the criterion's parameters."""
        own = [parameter for parameter in self.criterion.parameters() if parameter.requires_grad]
        if not own or self._versions == (-1, -1):
            return
        now = (
            sum(parameter._version for parameter in self.student.parameters()),
            sum(parameter._version for parameter in own),
        )
        before, self._versions = self._versions, now
        if before is None or before[0] == now[0] or before[1] != now[1]:
            return
        if any(parameter.grad is None for parameter in own):
            return
        self._versions = (-1, -1)
        names = [name for name, parameter in self.criterion.named_parameters() if parameter.requires_grad]
        warnings.warn(
            f"the student is trained, but no optimiser moves criterion.{', criterion.'.join(names)}, which get "
            "gradients: give it distiller.parameters()",
            RuntimeWarning,
            stacklevel=5,
        )


def _named_by(criterion: nn.Module, teacher: object, student_tap: object, teacher_tap: object) -> tuple[str, ...]:
    """The inputs that a criterion is called with."""
    known = (*NETWORKS_GIVE, "labels", "normalizer")
    has = {"teacher": teacher is not None, "student_tap": student_tap is not None}
    has["teacher_tap"] = has["teacher"] and teacher_tap is not None
    needs = {"student_features": "student_tap", "teacher_features": "teacher_tap", "teacher_logits": "teacher"}
    named = []
    owner = f"criterion {type(criterion).__name__}"
    for name, parameter in inspect.signature(criterion.forward).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        optional = parameter.default is not parameter.empty
        if name not in known or parameter.kind is parameter.POSITIONAL_ONLY:
            if optional:
                continue
            raise TypeError(f"{owner} requires {name!r}, expected a forward that names some of {', '.join(known)}")
        if name in needs and not has[needs[name]]:
            if optional:
                continue
            missing = "teacher" if name.startswith("teacher") and not has["teacher"] else needs[name]
            raise ValueError(f"{owner} needs {name}, but {missing} is None")
        named.append(name)
    if not set(named) & {*NETWORKS_GIVE}:
        raise TypeError(f"{owner} names nothing of the networks, expected some of {', '.join(NETWORKS_GIVE)}")
    return tuple(named)


def _taps(network: nn.Module, paths: str | Sequence[str] | None, argument: str) -> tuple[taps.Tap, ...]:
    if paths is None:
        return ()
    try:
        return taps.tap(network, taps.tap_paths(paths))
    except ValueError as error:
        raise ValueError(f"{argument}: {error}") from None


def _probe(network: nn.Module, paths: str | Sequence[str], images: Tensor, name: str) -> taps.Tapped:
    try:
        return taps.probe(network, taps.tap_paths(paths), images.to(taps.device_of(network)))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _loss_of(terms: Any) -> Tensor:
    loss = terms
    if isinstance(terms, Mapping):
        loss = terms.get("loss")
    elif not isinstance(terms, Tensor):
        loss = getattr(terms, "loss", None)
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        raise TypeError(
            f"the criterion must return a 0-dim loss, or an object or dictionary with it as 'loss', got "
            f"{taps.describe(terms)}"
        )
    return loss


def _size(maps: Tensor) -> tuple[int, int]:
    return maps.shape[-2], maps.shape[-1]
