"""`Distiller` trains as the loop written by hand does, and the teacher stays out of everything."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref
from functools import partial

import pytest
import torch
from distiller_cases import CLASSES, Network, assert_same, by_hand, loss_by_hand, make_batch, make_distiller, train
from torch import nn
from torch.optim.swa_utils import AveragedModel

from hetero_kernels import Distiller, HeteroAKDLoss, MeanOverTaps, SegmentationLoss


@pytest.mark.parametrize(
    ("reentrant", "dtype"),
    [(None, None), (False, torch.bfloat16), (True, None), (None, torch.bfloat16), (False, None)],
)
def test_three_steps_are_those_of_the_loop_by_hand(reentrant, dtype):
    distiller = make_distiller(student={"reentrant": reentrant}).train()
    student, teacher, criterion = by_hand(distiller)

    def ours(images, labels):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            return distiller(images, labels).loss

    def theirs(images, labels):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            return loss_by_hand(student, teacher, criterion, images, labels)

    losses = train(ours, distiller.parameters())
    assert losses == train(theirs, [*student.parameters(), *criterion.parameters()]) and losses[2] < losses[0]
    assert_same(distiller.student, student)
    assert_same(distiller.criterion, criterion)
    assert_same(distiller.teacher, teacher)


def test_compiles_as_one_graph_and_trains_the_same():
    distiller = make_distiller(several=True, student={"norm": False})
    twin = copy.deepcopy(distiller)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    losses = train(lambda *batch: distiller(*batch).loss, distiller.parameters())
    assert train(lambda *batch: compiled(*batch).loss, twin.parameters()) == pytest.approx(losses, rel=1e-6)
    for ours, theirs in zip(twin.parameters(), distiller.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    assert all(tap.output is None and not tap.listening for tap in twin._student_taps)


def test_the_teacher_is_frozen_follows_to_and_is_in_nothing():
    distiller = make_distiller()
    teacher = distiller.teacher
    before = copy.deepcopy(teacher.state_dict())
    train(lambda *batch: distiller.train()(*batch).loss, distiller.parameters())
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    held = {id(tensor) for tensor in (*distiller.parameters(), *distiller.buffers())}
    assert not held & {id(tensor) for tensor in (*teacher.parameters(), *teacher.buffers())}
    assert {name.split(".")[0] for name in distiller.state_dict()} == {"student", "criterion"}
    assert {name.split(".")[0] for name, _ in distiller.named_modules()} == {"", "student", "criterion"}
    assert distiller.double().teacher.head.weight.dtype == torch.float64
    assert distiller.requires_grad_(True).to("meta").teacher.head.weight.device.type == "meta"
    assert not teacher.head.weight.requires_grad


@pytest.mark.parametrize("compiled", [False, True])
def test_a_teacher_that_somebody_set_to_train_teaches_in_eval_mode(compiled):
    distiller = make_distiller()
    images, labels = make_batch()
    run = torch.compile(distiller, backend="aot_eager", fullgraph=True) if compiled else distiller
    run(images, labels)
    distiller.teacher.train()
    before = copy.deepcopy(distiller.teacher)
    run(images, labels)
    assert not any(module.training for module in distiller.teacher.modules())
    assert_same(distiller.teacher, before)


def test_the_student_is_what_was_given():
    student = Network(6)
    keys = list(student.state_dict())
    distiller = Distiller(student, Network(10), SegmentationLoss())
    assert distiller.student is student and list(distiller.student.state_dict()) == keys
    images, labels = make_batch()
    without = distiller(images)
    assert without.loss is None and without.terms is None and without.logits.shape == (4, CLASSES, 2, 3)
    distiller.eval()
    assert torch.equal(distiller(images, labels).logits, student(images))


def test_a_forward_of_the_student_keeps_no_map_alive():
    distiller = make_distiller()
    images, labels = make_batch()
    maps = []
    distiller.student.stage.register_forward_hook(lambda module, inputs, output: maps.append(weakref.ref(output)))
    for run in (partial(distiller.student, images), partial(distiller, images), partial(distiller, images, labels)):
        result = run()
        assert all(tap.output is None for tap in distiller._student_taps + distiller._teacher_taps)
        del result
    gc.collect()
    assert len(maps) == 3 and all(reference() is None for reference in maps)


def reachable(root: object) -> list[object]:
    """What a garbage collector finds from an object, through its attributes."""
    found, seen = [root], {id(root)}
    for each in found:
        for other in gc.get_referents(each):
            if id(other) not in seen and not isinstance(other, type) and not hasattr(other, "__globals__"):
                seen.add(id(other))
                found.append(other)
    return found


def test_the_student_refers_to_neither_distiller_nor_teacher():
    distiller = make_distiller()
    found = {id(each) for each in reachable(distiller.student.__dict__)}
    assert not found & {id(distiller), id(distiller.teacher), id(distiller.criterion)}


def through_pickle(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def through_torch_save(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch_save])
def test_copies_have_taps_and_teachers_of_their_own(copied):
    distiller = make_distiller(several=True)
    images, labels = make_batch()
    twin = copied(distiller)
    assert twin.teacher is not distiller.teacher
    state = torch.get_rng_state()
    expected = distiller(images, labels).loss
    torch.set_rng_state(state)
    assert torch.equal(twin(images, labels).loss, expected)
    alone = copied(distiller.student).eval()
    assert torch.equal(alone(images), distiller.eval().student(images))
    again = Distiller(alone, twin.teacher, twin.criterion, student_tap=["stem", "stage"], teacher_tap=["stem", "stage"])
    assert torch.equal(again.eval()(images, labels).loss, distiller(images, labels).loss)


def test_a_moving_average_of_the_student():
    distiller = make_distiller()
    average = AveragedModel(distiller.student, use_buffers=True)
    train(lambda *batch: distiller(*batch).loss, distiller.parameters())
    average.update_parameters(distiller.student)
    images, _ = make_batch()
    distiller.eval()
    assert torch.equal(average.module.eval()(images), distiller.student(images))  # the first update copies
    assert average.module.stage is not distiller.student.stage


def test_hooks_of_others_see_what_they_saw():
    distiller = make_distiller()
    seen = []
    distiller.student.stage.register_forward_hook(lambda module, inputs, output: seen.append("after") or 2 * output)
    distiller.student.stage.register_forward_pre_hook(lambda module, inputs: seen.append("before"))
    images, labels = make_batch()
    distiller(images, labels).loss.backward()
    assert seen == ["before", "after"]


def test_a_tap_without_gradient_raises():
    images, labels = make_batch()
    criterion = HeteroAKDLoss(12, 20, CLASSES)
    networks = Network(6, reentrant=True), Network(10)
    distiller = Distiller(*networks, criterion, student_tap="stage.0", teacher_tap="stage.0")  # inside of what is rerun
    with pytest.raises(ValueError, match=r"student_tap 'stage.0' carries no gradient.*use_reentrant=False"):
        distiller(images, labels)
    with torch.no_grad():
        assert torch.isfinite(distiller(images, labels).loss)
    frozen = make_distiller()
    frozen.student.requires_grad_(False)
    with pytest.raises(ValueError, match="carries no gradient"):
        frozen(images, labels)


def test_projectors_that_no_optimiser_has_are_named_once():
    distiller = make_distiller(student={"norm": False})
    with pytest.warns(RuntimeWarning, match=r"no optimiser moves criterion.student_projector.0.weight") as caught:
        train(lambda *batch: distiller(*batch).loss, distiller.student.parameters(), steps=5)
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(lambda *batch: distiller(*batch).loss, distiller.student.parameters())  # once is enough
        right = make_distiller()
        train(lambda *batch: right(*batch).loss, right.parameters())
        resting = make_distiller()
        resting.criterion.requires_grad_(False)  # on purpose
        train(lambda *batch: resting(*batch).loss, resting.student.parameters())
        accumulating = make_distiller()
        for _ in range(2):
            accumulating(*make_batch()).loss.backward()


def test_data_parallel_is_refused():
    with pytest.raises(RuntimeError, match="use DistributedDataParallel"):
        make_distiller()._replicate_for_data_parallel()


def test_cross_entropy_alone_needs_no_teacher():
    images, labels = make_batch()
    distiller = Distiller(Network(6), None, SegmentationLoss(label_smoothing=0.1)).eval()
    full = nn.functional.interpolate(distiller.student(images), size=labels.shape[1:], mode="bilinear")
    expected = nn.functional.cross_entropy(full, labels, ignore_index=255, label_smoothing=0.1)
    output = distiller(images, labels)
    torch.testing.assert_close(output.loss, expected)
    assert output.terms.kd == 0 and set(distiller.outputs(images)) == {"student_logits"}


def test_several_taps_are_the_mean_of_their_pairs_and_the_logits_once():
    distiller = make_distiller(several=True).eval()
    assert isinstance(distiller.criterion, MeanOverTaps)
    images, labels = make_batch()
    output, given = distiller(images, labels), distiller.outputs(images)
    pairs = [
        criterion(ours, theirs, labels)
        for criterion, ours, theirs in zip(
            distiller.criterion.criteria, given["student_features"], given["teacher_features"], strict=True
        )
    ]
    logits = SegmentationLoss()(given["student_logits"], labels, given["teacher_logits"])
    torch.testing.assert_close(output.loss, logits.loss + (pairs[0].loss + pairs[1].loss) / 2)
    torch.testing.assert_close(output.terms.hakd, (pairs[0].hakd + pairs[1].hakd) / 2)
    assert torch.equal(output.terms.task, logits.task) and torch.equal(output.terms.kd, logits.kd)
    alone = distiller.criterion(given["student_features"], given["teacher_features"], labels)
    torch.testing.assert_close(alone.loss, (pairs[0].loss + pairs[1].loss) / 2)
    assert alone.task == alone.kd == 0


OPTIONS_OF_DIVISORS = [
    {},
    {"resolution": "feature"},
    {"kem": "spatial"},
    {"class_weight": torch.linspace(0.5, 2.0, CLASSES), "label_smoothing": 0.1},
    {"several": True, "resolution": "feature"},
]


def test_a_term_of_no_pair_is_refused_in_a_normalizer():
    criterion = MeanOverTaps([HeteroAKDLoss(3, 4, CLASSES), HeteroAKDLoss(3, 4, CLASSES)])
    student, teacher = (torch.randn(2, 3, 4, 4),) * 2, (torch.randn(2, 4, 4, 4),) * 2
    labels = torch.zeros(2, 8, 8, dtype=torch.long)
    for wrong in ("taks", "hakd", "proj.2"):
        with pytest.raises(ValueError, match=rf"normalizer has \['{wrong}'\], expected .*'hakd.0', 'proj.0', 'hakd.1'"):
            criterion(student, teacher, labels, normalizer={wrong: torch.tensor(3.0)})


@pytest.mark.parametrize("options", OPTIONS_OF_DIVISORS, ids=lambda options: "-".join(options) or "defaults")
def test_divisors_are_those_of_the_means(options):
    """Given back as the normalizer they change nothing, and the parts of a batch add up to it."""
    distiller = make_distiller(student={"norm": False}, projector="conv", **options)
    images, labels = make_batch()
    divisors = distiller.divisors(labels)
    assert all(value.dtype == torch.float64 and value.dim() == 0 for value in divisors.values())
    whole = distiller(images, labels).loss
    torch.testing.assert_close(distiller(images, labels, normalizer=divisors).loss, whole)
    parts = [distiller(x, y, normalizer=divisors).loss for x, y in zip(images.split(1), labels.split(1), strict=True)]
    torch.testing.assert_close(sum(parts), whole)
    sums = [sum(each) for each in zip(*(distiller.divisors(y).values() for y in labels.split(1)), strict=True)]
    assert [float(value) for value in sums] == pytest.approx([float(value) for value in divisors.values()])


def test_divisors_of_labels_of_any_kind():
    labels = torch.tensor([[[0, 3, 255, 1]]])
    weighted = SegmentationLoss(class_weight=torch.tensor([1.0, 2.0, 4.0, 8.0]))
    for dtype in (torch.int64, torch.int32, torch.uint8):
        assert {name: float(v) for name, v in weighted.divisors(labels.to(dtype)).items()} == {"task": 11, "kd": 3}
    zero_ignored = HeteroAKDLoss(3, 3, 4, ignore_index=0, kem="spatial")
    assert float(zero_ignored.divisors(labels)["proj"]) == 3 and float(zero_ignored.divisors(labels)["hakd"]) == 4
    with pytest.raises(ValueError, match=r"feature_size is None, expected \(hs, ws\)"):
        HeteroAKDLoss(3, 3, 4, resolution="feature").divisors(labels)


def test_divisors_follow_the_size_of_the_images():
    distiller = make_distiller(resolution="feature")
    labels = torch.zeros(2, 32, 32, dtype=torch.long)
    assert float(distiller.divisors(labels)["hakd"]) == 2 * 4 * 4
    assert float(distiller.divisors(labels, image_size=(64, 48))["hakd"]) == 2 * 8 * 6
