"""Evaluation: padding, ignored pixels, absent classes, agreement with torchmetrics."""

from __future__ import annotations

import math

import pytest
import torch
from heteroakd.evaluate import Evaluation, evaluate, infer_padded, predict
from heteroakd.models import TappedNetwork
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics.classification import MulticlassJaccardIndex

CLASSES = ("road", "sky", "car", "pole")


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


def network() -> TappedNetwork:
    return TappedNetwork(ByColour(), "encoder")


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
    output, padded = infer_padded(network(), image)
    assert padded == (24, 32) and output.logits.shape == (1, 4, 3, 4)
    full = nn.functional.interpolate(output.logits, size=padded, mode="bilinear")
    assert torch.equal(predict(network(), image), full[0, :, :20, :28].argmax(0))
    same, _ = infer_padded(network(), nn.functional.pad(image, (0, 4, 0, 4)))
    assert torch.equal(output.logits, same.logits)


def test_agrees_with_torchmetrics_on_images_of_different_sizes() -> None:
    samples = random_samples((16, 24), (17, 23), (30, 9))
    evaluation = evaluate(network(), samples, CLASSES)
    metric = MulticlassJaccardIndex(num_classes=4, ignore_index=255)
    per_class = MulticlassJaccardIndex(num_classes=4, ignore_index=255, average="none")
    for image, label in samples.samples:
        prediction = predict(network(), image)
        metric.update(prediction[None], label[None])
        per_class.update(prediction[None], label[None])
    assert evaluation.miou == pytest.approx(float(metric.compute()), abs=1e-6)
    torch.testing.assert_close(evaluation.iou.float(), per_class.compute())
    assert evaluation.images == 3
    assert int(evaluation.confusion.sum()) == sum(int((label != 255).sum()) for _, label in samples.samples)


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
