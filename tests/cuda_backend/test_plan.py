"""Launch plans, computed by the host module without a GPU, for cards with 99 to 227 KB of shared memory."""

import pytest

from hetero_kernels import native

HOST = native.host_module()
CARDS = {  # multiprocessors, KB of shared memory for a block and for a multiprocessor, threads
    "A100": (108, 163, 164, 2048),
    "RTX 4090": (128, 99, 100, 1536),
    "H100": (132, 227, 228, 2048),
}


def plan(card="H100", function=HOST.cuda_plan, **call):
    multiprocessors, block, multiprocessor, threads = CARDS[card]
    return function(
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


def projected_plan(card, classes, channels, grid=(64, 128), batch=8, element_bytes=4):
    return plan(
        card, HOST.cuda_projected_plan, batch=batch, classes=classes, grid=grid, student_channels=channels[0],
        teacher_channels=channels[1], student_bytes=element_bytes, teacher_bytes=element_bytes,
    )  # fmt: skip


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("channels", [(256, 512), (1, 1), (192, 576), (384, 384), (23, 41), (752, 16)])
@pytest.mark.parametrize("classes", [1, 19, 32])
def test_up_to_768_channels_are_read_once(card, element_bytes, channels, classes):
    """On every card: the weights' gradient comes from the tile on chip."""
    p = projected_plan(card, classes, channels, element_bytes=element_bytes)
    assert p["on_chip"] and p["class_tiles"] == 4 and p["threads"] == 256
    assert p["slots"] == -(-sum(-(-c // 16) for c in channels) // 8) <= 6
    assert 0 < p["shared_bytes"] <= CARDS[card][1] << 10
    assert p["tiles"] == 8 * 64 * 128 // p["pixels"] and p["blocks"] == CARDS[card][0]


def test_what_fits_which_card():
    """Tiles of 32 pixels and the weights, or tiles of 16 pixels."""
    expected = {"H100": (32, True), "A100": (16, False), "RTX 4090": (16, False)}
    for card, (pixels, resident) in expected.items():
        p = projected_plan(card, 19, (256, 512))
        assert (p["pixels"], p["resident_weights"]) == (pixels, resident), card
    assert projected_plan("A100", 19, (256, 512), element_bytes=2)["resident_weights"]


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize(
    "classes, channels", [(19, (512, 2048)), (19, (384, 385)), (33, (64, 64)), (150, (256, 512)), (192, (2048, 2048))]
)
def test_others_are_read_twice(card, classes, channels):
    """A block of the second launch has all classes, of 128 to 768 channels of one network."""
    p = projected_plan(card, classes, channels)
    assert not p["on_chip"] and not p["resident_weights"] and p["class_tiles"] * 8 >= classes
    assert max(p["shared_bytes"], p["weight_shared_bytes"]) <= CARDS[card][1] << 10
    assert p["weight_columns"] == tuple(-(-c // (128 * (24 // p["class_tiles"]))) for c in channels)
    # One round of blocks, whose parts are small beside the features.
    assert p["weight_splits"] == max(1, CARDS[card][0] // sum(p["weight_columns"]))
    assert 2 * p["weight_splits"] * classes * sum(channels) <= 8 * 64 * 128 * sum(channels)


def test_few_pixels_make_few_blocks():
    p = projected_plan("H100", 19, (256, 512), grid=(16, 32), batch=1)
    assert p["tiles"] == p["blocks"] == 16
    # Parts of half as many elements as the features, however many multiprocessors there are.
    for classes, batch in ((19, 1), (150, 8)):
        p = projected_plan("H100", classes, (512, 512), grid=(16, 32), batch=batch)
        assert p["weight_splits"] == batch * 16 * 32 // (2 * classes) < CARDS["H100"][0] // sum(p["weight_columns"])


def test_features_that_fit_no_card():
    with pytest.raises(
        RuntimeError, match="192 classes of features need .* bytes of shared memory and this card has 30720"
    ):
        HOST.cuda_projected_plan(
            batch=1, classes=192, grid=(8, 8), student_channels=9, teacher_channels=9, shared_per_block=30 << 10
        )


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize(
    ("classes", "kernel"), [(19, 4), (32, 4), (33, 12), (96, 12), (97, 20), (160, 20), (161, 24), (192, 24), (1000, 24)]
)
def test_projections_fit_every_card(card, classes, kernel):
    """Any number of classes; 8 tiles of a block where those fill the card, all warps at one tile where they do not."""
    multiprocessors, block, _, _ = CARDS[card]
    given = {"multiprocessors": multiprocessors, "shared_per_block": block << 10}
    for channels in (1, 130, 2048):
        p = HOST.cuda_projection_plan(8, classes, (64, 128), channels, **given)
        assert p["class_tiles"] == kernel and p["chunks"] * kernel * 8 >= classes > (p["chunks"] - 1) * kernel * 8
        assert max(p["shared_bytes"], p["weight_shared_bytes"]) <= block << 10
        assert p["groups"] == 8 and p["blocks"] == p["tiles"] // 8 * p["chunks"]
        # A warp's slices are multiplied two at a time, where it has two.
        assert p["weight_slots"] >= 2 or channels <= 130 or kernel == 24
        assert p["weight_tiles"] == 8 * 64 * 128 // p["weight_pixels"]
        # One round of blocks, whose parts are small beside the features.
        assert p["weight_splits"] == 1 or p["weight_splits"] * p["weight_columns"] * p["chunks"] <= multiprocessors
        assert 4 * p["weight_splits"] * classes <= 8 * 64 * 128
        small = HOST.cuda_projection_plan(1, classes, (8, 16), channels, **given)
        assert small["groups"] == 1 or small["blocks"] >= multiprocessors
