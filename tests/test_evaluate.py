"""Evaluation: padding, windows, scales and mirroring, ignored pixels, absent classes, agreement with torchmetrics."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from heteroakd.config.groups import EvaluationConfig
from heteroakd.evaluation import inference
from heteroakd.evaluation.inference import (
    bounded,
    pad,
    predict,
    score_bands,
    whole_logits,
    window_bands,
    window_starts,
)
from heteroakd.evaluation.metrics import Evaluation, evaluate
from torch import Tensor, nn
from torch.utils.data import Dataset

CLASSES = ("road", "sky", "car", "pole")


def class_scores(network: nn.Module, image: Tensor, options: EvaluationConfig | None = None) -> Tensor:
    """All bands of scores."""
    return torch.cat(list(score_bands(network, image, options or EvaluationConfig())), -2)


class ByColour(nn.Module):
    """Logits at stride 8: the mean of each channel over a block, so that a block's brightest channel is its class."""

    class Encoder(nn.Module):
        output_stride = 8

        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(()))

        def forward(self, images: Tensor) -> Tensor:
            if images.shape[-1] % 8 or images.shape[-2] % 8:
                raise ValueError(f"image {tuple(images.shape)} is not a multiple of 8")
            return nn.functional.avg_pool2d(images, 8) * self.gain

    def __init__(self) -> None:
        super().__init__()
        self.encoder = self.Encoder()

    def forward(self, images: Tensor) -> Tensor:
        features = self.encoder(images)
        return torch.cat([features, torch.full_like(features[:, :1], -1e3)], 1)


class Samples(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, *samples: tuple[Tensor, Tensor]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.samples[index]


def network() -> nn.Module:
    return ByColour()


def random_samples(*sizes: tuple[int, int]) -> Samples:
    generator = torch.Generator().manual_seed(0)
    samples = []
    for height, width in sizes:
        label = torch.randint(0, 4, (height, width), generator=generator)
        label[torch.rand(height, width, generator=generator) < 0.2] = 255
        samples.append((torch.randn(3, height, width, generator=generator), label))
    return Samples(*samples)


@pytest.mark.parametrize("size", [(16, 24), (17, 23), (1, 1), (5, 40)])
def test_prediction_has_the_image_size_whatever_the_stride(size: tuple[int, int]) -> None:
    assert predict(network(), torch.randn(3, *size)).shape == size


def test_padding_is_at_the_right_and_bottom_and_cropped_after_interpolation() -> None:
    image = torch.randn(3, 20, 28)
    padded = pad(image, 8)
    assert padded.shape == (1, 3, 24, 32) and torch.equal(padded[0], nn.functional.pad(image, (0, 4, 0, 4)))
    full = nn.functional.interpolate(network()(padded), size=(24, 32), mode="bilinear")
    assert torch.equal(predict(network(), image), full[0, :, :20, :28].argmax(0))
    assert torch.equal(whole_logits(network(), image), whole_logits(network(), padded[0])[:, :20, :28])


def torchmetrics_iou(average: str = "macro") -> Any:
    """Their measure of four classes. What torchmetrics imports takes longer than these tests."""
    from torchmetrics.classification import MulticlassJaccardIndex

    return MulticlassJaccardIndex(4, average=average, ignore_index=255)


def test_agrees_with_torchmetrics_on_images_of_different_sizes() -> None:
    samples = random_samples((16, 24), (17, 23), (30, 9))
    evaluation = evaluate(network(), samples, CLASSES)
    metric, per_class = torchmetrics_iou(), torchmetrics_iou("none")
    for image, label in samples.samples:
        prediction = predict(network(), image)
        metric.update(prediction[None], label[None])
        per_class.update(prediction[None], label[None])
    assert evaluation.miou == pytest.approx(float(metric.compute()), abs=1e-6)
    torch.testing.assert_close(evaluation.iou.float(), per_class.compute())
    assert evaluation.images == 3
    assert int(evaluation.confusion.sum()) == sum(int((label != 255).sum()) for _, label in samples.samples)


def test_torchmetrics_averages_leave_absent_classes_out_as_ours_does() -> None:
    """`none` says 0 where ours says NaN, so that the mean of its values is no macro average; `macro` itself agrees."""
    samples = random_samples((24, 40), (17, 23))
    for image, label in samples.samples:
        image[2] = -10  # never predicted, and, with the next line, never labelled
        label[label == 2] = 1
    evaluation = evaluate(network(), samples, CLASSES)
    none, macro = (torchmetrics_iou(average) for average in ("none", "macro"))
    for image, label in samples.samples:
        none.update(predict(network(), image)[None], label[None])
        macro.update(predict(network(), image)[None], label[None])
    assert evaluation.absent == ["car"]
    assert evaluation.miou == pytest.approx(float(macro.compute()), abs=1e-6)
    torch.testing.assert_close(evaluation.iou.nan_to_num(0.0), none.compute().double(), rtol=0, atol=1e-6)
    assert evaluation.miou > float(none.compute().mean()) + 0.01


class Blurred(nn.Module):
    """Logits that depend on a neighbourhood beyond a window's border."""

    def __init__(self, mirrored: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Conv2d(3, 4, 9, stride=4, padding=4)
        if mirrored:  # 4 pixels to a column of the result: only an even kernel can sit in their middle
            self.encoder = nn.Conv2d(3, 4, (9, 8), stride=4, padding=(4, 2))
            with torch.no_grad():
                self.encoder.weight += self.encoder.weight.flip(-1).clone()
        self.encoder.output_stride = 4

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.encoder(images)
        return logits


def test_windows_cover_a_side_and_end_with_it() -> None:
    assert window_starts(100, 40, 30) == [0, 30, 60]
    assert window_starts(101, 40, 30) == [0, 30, 60, 61]
    assert window_starts(40, 40, 30) == window_starts(7, 40, 30) == [0]
    assert window_starts(41, 40, 40) == [0, 1]


@pytest.mark.parametrize("size", [(48, 64), (37, 50), (10, 70)])
def test_overlapping_windows_are_averaged_as_by_hand(size: tuple[int, int]) -> None:
    """As MMSegmentation's loop: count windows per side, clamp them to the border, add logits and 1s, divide."""
    tapped = Blurred().eval()
    image = torch.randn(3, *size)
    (height, width), (step_y, step_x) = (24, 28), (11, 20)
    total, count = torch.zeros(4, *size, dtype=torch.float64), torch.zeros(size)
    for row in range(max(size[0] - height + step_y - 1, 0) // step_y + 1):
        for column in range(max(size[1] - width + step_x - 1, 0) // step_x + 1):
            bottom, right = min(row * step_y + height, size[0]), min(column * step_x + width, size[1])
            top, left = max(bottom - height, 0), max(right - width, 0)
            part = image[:, top:bottom, left:right]
            padded = nn.functional.pad(part, (0, -part.shape[2] % 4, 0, -part.shape[1] % 4))[None]
            logits = nn.functional.interpolate(tapped(padded), size=padded.shape[-2:], mode="bilinear")
            total[:, top:bottom, left:right] += logits[0, :, : bottom - top, : right - left].detach()
            count[top:bottom, left:right] += 1
    options = EvaluationConfig(window=(height, width), window_stride=(step_y, step_x))
    assert count.min() == 1 and count.max() >= 3
    torch.testing.assert_close(class_scores(tapped, image, options), (total / count).float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("size", "window"), [((48, 64), (24, 28)), ((37, 50), (16, 24)), ((10, 70), (24, 28))])
def test_predictions_in_windows_hold_one_row_of_windows_at_a_time(
    size: tuple[int, int], window: tuple[int, int]
) -> None:
    tapped, image = Blurred().eval(), torch.randn(3, *size)
    options = EvaluationConfig(window=window, window_stride=(11, 20))
    assert torch.equal(predict(tapped, image, options), class_scores(tapped, image, options).argmax(0))
    once, mirrored = (list(score_bands(tapped, image, replace(options, flip=flip))) for flip in (False, True))
    assert [band.shape for band in mirrored] == [band.shape for band in once]
    bands = list(window_bands(tapped, image, window, (11, 20)))
    assert max(band.shape[1] for band in bands) <= window[0] and sum(band.shape[1] for band in bands) == size[0]


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("scales", [[0.3], [5.0], [0.5, 1.0, 1.75], [1.0, 2.0]])
def test_other_scales_in_bands_are_the_whole_brought_to_the_images_size(
    scales: list[float], align_corners: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean of the views' softmax, each view's logits brought to the image's size at once, windows or not."""
    monkeypatch.setattr(inference, "BAND", 7)
    tapped = Blurred().eval()
    for size, window in (((37, 50), (16, 24)), ((37, 50), None), ((2, 9), (16, 24)), ((61, 12), (24, 28))):
        image, views = torch.randn(3, *size), []
        for scale, mirrored in itertools.product(scales, (False, True)):
            view = nn.functional.interpolate(
                image[None], [max(1, round(scale * side)) for side in size], mode="bilinear", antialias=True
            )[0]
            view = view.flip(-1) if mirrored else view
            stride = None if window is None else (11, 20)
            once = EvaluationConfig(window=window, window_stride=stride)
            logits = torch.cat(list(score_bands(tapped, view, once, align_corners=align_corners)), -2)[None]
            logits = nn.functional.interpolate(logits, size, mode="bilinear", align_corners=align_corners)[0]
            views.append((logits.flip(-1) if mirrored else logits).softmax(0))
        found = list(score_bands(tapped, image, replace(once, scales=scales, flip=True), align_corners=align_corners))
        assert max(band.shape[1] for band in found) <= 7
        torch.testing.assert_close(torch.cat(found, 1), torch.stack(views).mean(0), rtol=0, atol=2e-6)
        assert torch.equal(torch.cat(found, 1).argmax(0), torch.stack(views).mean(0).argmax(0))


def test_large_images_are_bounded_by_windows_unless_options_say_otherwise() -> None:
    """The image of the report: 4032x3024 pixels, of which a network sees at most 1024x1024 at once."""
    whole, photo = EvaluationConfig(), torch.empty(3, 3024, 4032, device="meta")
    assert bounded(whole, photo) == EvaluationConfig(window=(1024, 1024))
    assert bounded(whole, torch.empty(3, 1024, 2048, device="meta")) == whole
    twice = EvaluationConfig(scales=[0.5, 2.0])
    assert bounded(twice, torch.empty(3, 512, 1025, device="meta")).window == (1024, 1024)
    own = EvaluationConfig(window=(4000, 4000))
    assert bounded(own, photo) == own


def test_one_window_and_the_scale_1_are_the_whole_image() -> None:
    tapped, image = Blurred().eval(), torch.randn(3, 37, 50)
    whole = class_scores(tapped, image)
    assert torch.equal(whole, whole_logits(tapped, image))
    for options in (
        EvaluationConfig(window=(37, 50)),
        EvaluationConfig(window=(512, 50)),
        EvaluationConfig(scales=[1.0]),
    ):
        assert torch.equal(class_scores(tapped, image, options), whole)
    parts = class_scores(tapped, image, EvaluationConfig(window=(16, 24)))
    assert not torch.allclose(parts, whole, atol=1e-3)


def test_mirroring_changes_nothing_of_a_symmetric_network_and_something_of_another() -> None:
    image, mirrored = torch.randn(3, 16, 24), EvaluationConfig(flip=True)
    symmetric, other = (Blurred(symmetric).eval() for symmetric in (True, False))
    scores = class_scores(symmetric, image, mirrored)
    torch.testing.assert_close(scores, class_scores(symmetric, image).softmax(0))
    ours, theirs = class_scores(other, image, mirrored), class_scores(other, image).softmax(0)
    assert not torch.allclose(ours, theirs, atol=1e-2)
    again = class_scores(other, image.flip(-1), mirrored).flip(-1)  # the average itself is symmetric
    torch.testing.assert_close(again, ours)


def test_scales_windows_and_mirroring_together_are_the_mean_of_their_softmax() -> None:
    tapped, image = Blurred().eval(), torch.randn(3, 30, 44)
    expected = torch.zeros(4, 30, 44)
    for scale in (0.5, 1.0, 1.75):
        size = (round(30 * scale), round(44 * scale))
        resized = nn.functional.interpolate(image[None], size=size, mode="bilinear", antialias=True)[0]
        for view in (resized, resized.flip(-1)):
            logits = class_scores(tapped, view, EvaluationConfig(window=(20, 24), window_stride=(16, 16)))
            logits = logits if view is resized else logits.flip(-1)
            expected += nn.functional.interpolate(logits[None], size=(30, 44), mode="bilinear")[0].softmax(0) / 6
    options = EvaluationConfig(window=(20, 24), window_stride=(16, 16), scales=[0.5, 1.0, 1.75], flip=True)
    scores = class_scores(tapped, image, options)
    torch.testing.assert_close(scores, expected)
    torch.testing.assert_close(scores.sum(0), torch.ones(30, 44))
    sample = Samples((image, torch.zeros(30, 44, dtype=torch.int64)))
    confusion = evaluate(tapped, sample, CLASSES, options).confusion
    assert confusion.dtype == torch.int64
    assert torch.equal(confusion[0], scores.argmax(0).flatten().bincount(minlength=4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": [1.0, -0.5]}, "scales must"),
        ({"window": (8,)}, "window must be 2 whole numbers"),
        ({"window": (0, 8)}, "window must be 2 whole numbers"),
        ({"window": (8, 8), "window_stride": (8, 9)}, r"window_stride must be at most window \(8, 8\).* got \(8, 9\)"),
        ({"window": (8, 8), "window_stride": (0, 8)}, "window_stride"),
        ({"window_stride": (8, 8)}, "window, which is null"),
    ],
)
def test_options_that_leave_pixels_out_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluationConfig(**options)


def test_ignored_pixels_do_not_count() -> None:
    ((image, label),) = random_samples((16, 24)).samples
    evaluation = evaluate(network(), Samples((image, label)), CLASSES)
    other_image = image.clone()
    everywhere = torch.full_like(label, 255)
    both = evaluate(network(), Samples((image, label), (other_image, everywhere)), CLASSES)
    assert torch.equal(both.confusion, evaluation.confusion)
    nothing = evaluate(network(), Samples((image, everywhere)), CLASSES)
    assert math.isnan(nothing.miou) and nothing.to_dict()["miou"] is None
    assert nothing.absent == list(CLASSES)


def test_absent_classes_are_left_out_of_the_mean_and_said_to_be() -> None:
    confusion = torch.tensor([[6, 2, 0, 0], [0, 4, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    evaluation = Evaluation(confusion, CLASSES, 1)
    assert evaluation.iou[:2].tolist() == pytest.approx([6 / 8, 4 / 6])
    assert evaluation.miou == pytest.approx((6 / 8 + 4 / 6) / 2)
    assert evaluation.absent == ["car", "pole"]
    assert "leaves out classes neither labelled nor predicted: car, pole" in evaluation.table()
    values = evaluation.to_dict()
    assert values["iou"]["car"] is None and values["absent"] == ["car", "pole"]


def test_class_predicted_but_never_labelled_counts_as_zero() -> None:
    confusion = torch.tensor([[6, 0, 2, 0], [0, 4, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    evaluation = Evaluation(confusion, CLASSES, 1)
    assert evaluation.absent == ["pole"]
    assert evaluation.miou == pytest.approx((6 / 8 + 1 + 0) / 3)


def test_label_out_of_range_is_an_error() -> None:
    label = torch.zeros(8, 8, dtype=torch.int64)
    label[0, 0] = 9
    with pytest.raises(ValueError, match="label 0 holds 9, expected 0 to 3 or 255"):
        evaluate(network(), Samples((torch.randn(3, 8, 8), label)), CLASSES)


def test_mode_is_restored_and_limit_kept() -> None:
    tapped = network().train()
    evaluation = evaluate(tapped, random_samples((8, 8), (8, 8), (8, 8)), CLASSES, limit=2)
    assert tapped.training and evaluation.images == 2


def test_workers_change_nothing_but_who_reads() -> None:
    samples = random_samples((8, 8), (16, 24), (8, 16))
    before = torch.get_rng_state()
    counted = [evaluate(network(), samples, CLASSES, workers=workers).confusion for workers in (0, 1)]
    assert torch.equal(counted[0], counted[1])
    assert torch.equal(torch.get_rng_state(), before)  # dropout goes on as if nothing had been evaluated
