"""Items and batches: nothing lost, nothing longer than it must be."""

import numpy as np
import pytest
import torch

from paragraph_ocr.data.augment import Strengths
from paragraph_ocr.data.augment_page import augment_page
from paragraph_ocr.data.dataset import LabelPadding, ParagraphDataset, collate
from paragraph_ocr.data.store import Paragraph, Store, StoreWriter, pack
from paragraph_ocr.vocabulary import Vocabulary

TEXTS = ["a", "a line\nand another", "two words", "to be"]
SIZES = [(20, 30), (10, 40), (20, 30), (20, 30)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, vocabulary) -> ParagraphDataset:
    path = tmp_path_factory.mktemp("store") / "a.h5"
    generator = np.random.default_rng(0)
    with StoreWriter(path, fingerprint="abc") as writer:
        for text, size in zip(TEXTS, SIZES, strict=True):
            image = generator.integers(1, 256, size=size, dtype=np.uint8)
            writer.add(pack(Paragraph(image, text, "train", "", "")))
    return ParagraphDataset(Store(path), range(4), vocabulary)


def test_a_batch_holds_every_image_and_text(dataset, vocabulary):
    batch = collate([dataset[index] for index in (3, 1, 0)])
    assert batch.rows.tolist() == [3, 1, 0]
    assert [vocabulary.decode(ids) for ids in batch.tokens[:, 1:].tolist()] == [
        TEXTS[row] for row in (3, 1, 0)
    ]
    assert batch.images.dtype == torch.uint8
    for place, row in enumerate(batch.rows.tolist()):
        height, width = SIZES[row]
        whole = batch.images[place, 0]
        assert (whole[:height, :width].numpy() == dataset.store.image(row)).all()
        assert whole.count_nonzero() == height * width  # the rest is paper


def test_letters_are_where_their_tokens_are(tmp_path, vocabulary):
    places = np.arange(8).reshape(4, 2)
    with StoreWriter(tmp_path / "a.h5", fingerprint="abc") as writer:
        image = np.ones((20, 30), np.uint8)
        for text, letters in (("ab\nc d", places), ("e", None)):
            writer.add(pack(Paragraph(image, text, "train", "", "", letters)))
    dataset = ParagraphDataset(Store(tmp_path / "a.h5"), [0, 1], vocabulary)
    nan = torch.nan
    expected = [[nan] * 2, [0, 1], [2, 3], [nan] * 2, [4, 5], [nan] * 2, [6, 7], [nan] * 2]
    batch = collate([dataset[1], dataset[0]], padding=LabelPadding(9))
    assert batch.letters[0].isnan().all()
    expected.append([nan] * 2)
    torch.testing.assert_close(batch.letters[1], torch.tensor(expected), equal_nan=True)
    other = Vocabulary([*"abcd\n"], unknown="drop")
    changed = ParagraphDataset(Store(tmp_path / "a.h5"), [0], other)[0]
    assert len(changed.letters) == len(changed.tokens) == 7
    assert np.isnan(changed.letters).all(), "it is not the text whose letters were placed"


def test_where_no_letter_of_a_store_is_known_a_batch_says_none(dataset):
    assert collate([dataset[0], dataset[1]]).letters is None


def test_labels_are_as_long_as_the_longest_of_the_batch(dataset):
    for indices in ([0], [0, 2], [0, 1, 2]):
        tokens = collate([dataset[index] for index in indices]).tokens
        assert tokens.shape[1] == 2 + max(len(TEXTS[index]) for index in indices)
        assert (tokens[:, 0] == Vocabulary.start).all()
        for index, row in zip(indices, tokens.tolist(), strict=True):
            end = 1 + len(TEXTS[index])
            assert row[end] == Vocabulary.end
            assert set(row[end + 1 :]) <= {Vocabulary.pad}


def test_no_label_is_padded_beyond_the_models_positions():
    assert [LabelPadding(16).length(n) for n in (1, 16, 17)] == [16, 16, 32]
    assert [LabelPadding(16, most=40).length(n) for n in (20, 33, 40)] == [32, 40, 40]
    assert [LabelPadding().length(n) for n in (1, 17)] == [1, 17]


@pytest.mark.parametrize(
    "typed",
    ["model=tiny", "model=line_cnn", "model=line_cnn model.loss=ctc model.window_stride_px=8"],
)
def test_padding_of_labels_costs_nothing(dataset, vocabulary, typed):
    from paragraph_ocr.build_model import build_recognizer
    from paragraph_ocr.validation import compose, validate

    model = build_recognizer(
        validate(compose([*typed.split(), "datamodule=synthetic_lines"])), vocabulary
    ).eval()
    items = [
        item._replace(image=np.pad(item.image, ((0, 12), (0, 866))))
        for item in (dataset[0], dataset[2])
    ]

    def loss(padding):
        batch = collate(items, padding=padding)
        logits = model(batch.images, batch.tokens[:, :-1], batch.sizes)
        total, count = model.loss(logits, batch.tokens[:, 1:], label_smoothing=0.1)
        total.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return batch.tokens.shape[1], total.detach(), count, gradients

    length, total, count, gradients = loss(LabelPadding())
    padded_length, padded_total, padded_count, padded_gradients = loss(LabelPadding(32))
    assert (length, padded_length) == (11, 32)
    assert count == padded_count
    torch.testing.assert_close(total, padded_total)
    assert len(gradients) > 4
    torch.testing.assert_close(gradients, padded_gradients, atol=1e-4, rtol=1e-3)


def test_sizes_are_given_only_where_an_image_does_not_fill_the_canvas(dataset):
    assert collate([dataset[0], dataset[2]]).sizes is None
    mixed = collate([dataset[0], dataset[1]])
    assert mixed.sizes.tolist() == [[20, 30], [10, 40]]
    assert mixed.images.shape == (2, 1, 20, 40)


def test_padding_within_the_stored_canvas_counts_as_padding(tmp_path, vocabulary):
    with StoreWriter(tmp_path / "a.h5", fingerprint="abc") as writer:
        image = np.ones((20, 30), np.uint8)
        writer.add(pack(Paragraph(image, "a", "train", "", ""), canvas=(32, 32)))
    dataset = ParagraphDataset(Store(tmp_path / "a.h5"), [0], vocabulary)
    batch = collate([dataset[0]])
    assert batch.images.shape == (1, 1, 32, 32)
    assert batch.sizes.tolist() == [[20, 30]]


def test_the_page_is_augmented_and_not_its_canvas(dataset, tmp_path, vocabulary):
    strengths = Strengths(rotation_deg=5.0, scale=0.2, noise=0.1)
    page = np.zeros((40, 60), np.uint8)
    page[8:-8, 8:-8] = 255
    with StoreWriter(tmp_path / "padded.h5", fingerprint="p") as writer:
        writer.add(pack(Paragraph(page, "x", "train", "", ""), canvas=(64, 96)))
    padded = ParagraphDataset(
        Store(tmp_path / "padded.h5"), [0], vocabulary, augmentation=(strengths, 5)
    )
    for epoch in (0, 1):
        image = padded[epoch].image
        alone = augment_page(page, strengths, np.random.default_rng([5, epoch, 0]))
        assert np.array_equal(image[:40, :60], alone)
        assert not image[40:].any()
        assert not image[:, 60:].any()
    assert np.array_equal(padded.store.image(0)[:40, :60], page)
