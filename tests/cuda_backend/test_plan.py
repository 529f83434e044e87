"""Launch plans, computed by the host module without a GPU, for cards with 99 to 227 KB of shared memory."""

import pytest

from hetero_kernels import native

HOST = native.host_module()
CARDS = {  # multiprocessors, KB of shared memory for a block and for a multiprocessor, threads
    "A100": (108, 163, 164, 2048),
    "RTX 4090": (128, 99, 100, 1536),
    "H100": (132, 227, 228, 2048),
}


def plan(card="H100", **call):
    multiprocessors, block, multiprocessor, threads = CARDS[card]
    return HOST.cuda_plan(
        **call, multiprocessors=multiprocessors, shared_per_block=block << 10,
        shared_per_multiprocessor=multiprocessor << 10, threads_per_multiprocessor=threads,
    )  # fmt: skip


CITYSCAPES = {"batch": 8, "classes": 19, "loss": (512, 1024), "student": (64, 128), "teacher": (64, 128)}
ADE20K = {"batch": 16, "classes": 150, "loss": (512, 512), "student": (64, 64), "teacher": (64, 64)}


@pytest.mark.parametrize("card", CARDS)
def test_the_papers_sizes(card):
    """A pixel is a thread's, or eight threads' with 150 classes; several blocks fit each multiprocessor."""
    p = plan(card, **CITYSCAPES)
    assert (p["tile"], p["lanes"], p["threads"]) == ((64, 128), 1, 128)
    assert p["blocks_per_multiprocessor"] >= 3
    p = plan(card, **ADE20K)
    assert (p["tile"], p["lanes"], p["threads"]) == ((64, 16), 8, 128)
    assert p["blocks_per_multiprocessor"] >= 2


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("classes", [1, 2, 19, 20, 21, 40, 150, 640, 641, 1000])
def test_every_number_of_classes_fits(card, classes):
    for loss, student in (((512, 512), (64, 64)), ((64, 64), (64, 64)), ((33, 47), (8, 11)), ((7, 9), (300, 500))):
        p = plan(card, batch=2, classes=classes, loss=loss, student=student, teacher=student, teacher_gradient=True)
        assert 0 < p["shared_bytes"] <= CARDS[card][1] << 10
        assert p["threads"] in (32, 64, 128) and p["blocks_per_multiprocessor"] >= 1
        assert p["lanes"] == 32 or classes <= 20 * p["lanes"]
        # Tiles cover the loss grid.
        for size, tile, count in zip(loss, p["tile"], p["tiles"], strict=True):
            assert tile * count >= size
        assert p["blocks"] == 2 * p["tiles"][0] * p["tiles"][1]


def test_small_calls_are_cut_finer():
    """So that they fill the card; a network at the loss grid's own rows may be cut into single rows."""
    large, small = plan(**CITYSCAPES), plan(**{**CITYSCAPES, "batch": 1})
    assert small["tile"][0] < large["tile"][0]
    feature = plan(batch=8, classes=19, loss=(64, 128), student=(64, 128), teacher=(64, 128))
    assert feature["tile"][0] == 1 and feature["blocks"] == 512


def test_what_fits_no_card_says_so():
    with pytest.raises(RuntimeError, match="100000 classes need .* bytes of shared memory and this card has 232448"):
        plan(batch=1, classes=100000, loss=(8, 8), student=(1, 1))
