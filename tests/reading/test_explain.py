"""What is measured inside a model: against the model's own outputs, and against known answers."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from paragraph_ocr.data.fonts import load_faces
from paragraph_ocr.data.render import render
from paragraph_ocr.errors import UserError
from paragraph_ocr.metrics import character_error_rate
from paragraph_ocr.model.decoder import Attention, Decoder
from paragraph_ocr.model.encoder import Encoder
from paragraph_ocr.model.generate import Greedy, SpecialTokens
from paragraph_ocr.model.line_cnn import LineCnn
from paragraph_ocr.model.transformer import TransformerReader
from paragraph_ocr.reading import Recognizer, explain

SPECIAL = SpecialTokens(start=1, end=2, pad=3)
TOKENS = [1, 9, 4, 4, 17, 11, 5]
LINE_READER = Path(__file__).parents[1] / "line_reader"
SENTENCES = (
    "some rise by sin and some fall",
    "the fault is not in our stars",
    "what is past is prologue",
    "if music be food play on",
    "cowards die many times before",
    "we few we happy few we band",
)


@pytest.fixture(params=["pre", "post"])
def model(request):
    """Return an untrained model whose attention is far from even."""
    torch.manual_seed(0)
    encoder = Encoder("test_resnet", stage=3, horizontal_stride=8)
    decoder = Decoder(
        num_tokens=20, depth=2, width=32, heads=4, feed_forward=64, dropout=0.1,
        norm=request.param, tied=request.param == "pre", max_length=40,
    )  # fmt: skip
    for parameter in decoder.layers.parameters():
        if parameter.ndim == 2:
            parameter.data *= 3
    return TransformerReader(encoder, decoder, special=SPECIAL).eval()


@pytest.fixture
def page():
    return torch.randint(0, 256, (1, 48, 80), generator=torch.manual_seed(1), dtype=torch.uint8)


@pytest.fixture
def small_page(page):
    """Return a page and its size, less than half its canvas."""
    page[:, 20:] = 0
    page[:, :, 50:] = 0
    return page, (20, 50)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["causal", "masked", "plain"])
def test_the_weights_mix_the_values_to_what_the_module_returns(kind):
    torch.manual_seed(0)
    attention = Attention(width=24, heads=3, dropout=0.5).eval()
    states, memory = torch.randn(2, 6, 24), torch.randn(2, 6, 24)
    keys_values = attention.keys_values(memory)
    mask = torch.tensor([True, True, False, True, False, True]).expand(2, 1, 1, 6)
    options = {"causal": {"causal": True}, "masked": {"mask": mask}, "plain": {}}[kind]
    weights = explain.attention_weights(attention, states, keys_values, **options)
    mixed = attention.out((weights @ keys_values[1]).transpose(1, 2).flatten(2))
    torch.testing.assert_close(mixed, attention(states, keys_values, **options))


def test_attention_rows_sum_to_one(model, page):
    seen = explain.trace(model, page, TOKENS)
    rows = seen.self_attention.sum(dim=-1)
    torch.testing.assert_close(rows, torch.ones_like(rows))
    grids = seen.cross_attention.sum(dim=(-2, -1))
    torch.testing.assert_close(grids, torch.ones_like(grids))
    assert seen.cross_attention.shape == (2, 4, len(TOKENS), 3, 10)


def test_no_position_attends_to_one_after_it(model, page):
    seen = explain.trace(model, page, TOKENS)
    assert not seen.self_attention.masked_select(~explain.causal_mask(len(TOKENS))).any()
    assert (seen.self_attention.masked_select(explain.causal_mask(len(TOKENS))) > 0).all()


def test_nothing_of_the_canvas_beyond_the_page_is_attended_to(model, small_page):
    page, size = small_page
    seen = explain.trace(model, page, TOKENS, size=size)
    assert not seen.cross_attention[..., 2:, :].any()
    assert not seen.cross_attention[..., 7:].any()
    assert (seen.cross_attention[..., :2, :7] > 0).all()


def test_the_traced_pass_is_the_models_own(model, small_page):
    page, size = small_page
    seen = explain.trace(model, page, TOKENS, size=size)
    with torch.no_grad():
        expected = model(page[None], torch.tensor([TOKENS]), torch.tensor([size]))[0]
    assert torch.equal(seen.logits, expected)
    hooked = [
        m for m in model.modules() if m._forward_hooks and not isinstance(m, torch.nn.AvgPool2d)
    ]
    assert hooked == []


def test_the_lens_at_the_last_layer_shows_the_logits(model, page):
    seen = explain.trace(model, page, TOKENS)
    lens = explain.logit_lens(model.decoder, seen.streams)
    torch.testing.assert_close(lens[-1], seen.logits, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(lens[-2], seen.logits, atol=1e-2)
    # one stage alone is summed in the model's own order: the same bits
    assert torch.equal(explain.logit_lens(model.decoder, seen.streams[-1:])[0], seen.logits)


def test_each_stage_is_the_stream_before_it_and_what_its_block_adds(model, page):
    seen = explain.trace(model, page, TOKENS)
    assert seen.stages == (
        "embedding", "1 self", "1 cross", "1 forward", "2 self", "2 cross", "2 forward",
    )  # fmt: skip
    decoder = model.decoder
    embedded = decoder.embedding(torch.tensor(TOKENS)) * math.sqrt(32)
    torch.testing.assert_close(seen.streams[0], embedded + decoder.positions[: len(TOKENS)])
    with torch.no_grad():
        for number, layer in enumerate(decoder.layers):
            before, after = seen.streams[3 * number + 2 : 3 * number + 4]
            inputs = layer.norms[2](before) if layer.pre else before
            added = layer.contract(F.relu(layer.expand(inputs)))
            expected = before + added if layer.pre else layer.norms[2](before + added)
            torch.testing.assert_close(after, expected)


def test_a_free_trace_is_fed_what_the_model_reads(model, page):
    seen = explain.trace_free(model, page, max_length=12)
    (reading,) = model.read(page[None], decoding=Greedy(), max_length=12)
    assert seen.tokens.tolist() == [SPECIAL.start, *reading.tokens]
    written = seen.logits.argmax(dim=-1).tolist()
    assert written[: len(reading.tokens)] == reading.tokens


def test_entropy_runs_from_certain_to_one_of_all():
    certain, even, halves = torch.tensor([[99.0, 0, 0, 0], [1, 1, 1, 1], [5, 5, -99, -99]])
    assert explain.entropy(certain) == pytest.approx(0, abs=1e-5)
    assert explain.entropy(even) == pytest.approx(2)
    assert explain.entropy(halves) == pytest.approx(1)


@torch.no_grad()
def test_circuits_have_the_singular_values_of_the_products(model):
    attention = model.decoder.layers[0].cross_attention
    found = explain.circuits(attention)
    width, states, memory = 8, torch.randn(32), torch.randn(32)
    for head in range(4):
        rows = slice(head * width, (head + 1) * width)
        query, key = attention.query.weight[rows], attention.key_value.weight[:32][rows]
        value, out = attention.key_value.weight[32:][rows], attention.out.weight[:, rows]
        for name, matrix in (("QK", query.T @ key), ("OV", out @ value)):
            expected = torch.linalg.svdvals(matrix)
            torch.testing.assert_close(
                found[name][head].singular, expected[:width], atol=1e-4, rtol=1e-4
            )
        # the score of a pair is what QK makes of it: biases are zero in an untrained model
        score = (attention.query(states)[rows] * attention.keys_values(memory.view(1, 1, -1))[
            0, 0, head, 0
        ]).sum()  # fmt: skip
        torch.testing.assert_close(score, states @ query.T @ key @ memory, atol=1e-3, rtol=1e-3)


def test_effective_rank_counts_directions():
    assert explain.effective_rank(torch.ones(5)) == pytest.approx(5)
    assert explain.effective_rank(torch.tensor([3.0, 0, 0])) == pytest.approx(1)
    assert explain.random_circuit(64, 8, seed=0).effective_rank < 8
    assert 32 < explain.random_matrix(64, seed=0).effective_rank < 64


def test_mass_inside_counts_cells_by_their_share():
    weights = torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    inside = [
        float(explain.mass_inside(weights, box, cell_px=(16, 8)))
        for box in [(0, 0, 16, 32), (0, 0, 8, 16), (8, 16, 12, 32), (4, 8, 99, 24), (-9, -9, 0, 0)]
    ]
    assert inside == pytest.approx([1.0, 0.1, 0.2, 0.5 * (0.1 / 2 + 0.2 + 0.3 / 2 + 0.4), 0.0])


def test_feature_maps_come_at_every_resolution_and_end_in_the_encoders_output(model, page):
    maps = explain.feature_maps(model.encoder, page)
    shapes = [tuple(found.shape[1:]) for found in maps.values()]
    assert shapes == [(24, 40), (12, 20), (6, 10), (3, 10)]
    with torch.no_grad():
        assert torch.equal(list(maps.values())[-1], model.encoder(page[None])[0])


def test_lines_of_counts_a_newline_to_the_line_it_ends():
    assert explain.lines_of("ab\nc\n\nd") == [0, 0, 0, 1, 1, 2, 3]


def test_a_model_without_attention_is_refused():
    cnn = LineCnn(
        num_tokens=9, height=32, window_width_px=28, window_stride_px=28, channels=2, width=4,
        dropout=0.0, loss="windows", special=SPECIAL, blank=0,
    )  # fmt: skip
    with pytest.raises(
        UserError, match=r"^model=line_cnn has no attention .*Pass a Transformer's run"
    ):
        explain.require_transformer(cnn)


@pytest.fixture(scope="module")
def drawings():
    """Return pages of three lines that the line reader has not seen, in the font that it knows."""
    faces, _ = load_faces(None, characters="abc")
    (delius,) = (face for face in faces if face.name.startswith("Delius"))
    return [
        render(
            sentence.split(), delius, height=112, width=256, min_lines=3, max_lines=3,
            generator=np.random.default_rng(number),
        )
        for number, sentence in enumerate(SENTENCES)
    ]  # fmt: skip


def test_the_line_reader_reads_pages_that_it_has_not_seen(drawings):
    reader = Recognizer.load(LINE_READER, device="cpu")
    pages = torch.stack([torch.from_numpy(drawing.image)[None] for drawing in drawings])
    readings = [read.text for read in reader.read_pages(pages)]
    assert character_error_rate(readings, [drawing.text for drawing in drawings]) < 0.1


@pytest.mark.parametrize("trained", [True, False])
def test_attention_lies_on_the_line_that_is_written(drawings, trained):
    reader = Recognizer.load(LINE_READER, device="cpu")
    if not trained:  # or the figure would say nothing about reading
        torch.manual_seed(0)
        for parameter in reader.model.decoder.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    on_line: list[list[float]] = [[], [], []]  # the line written, the one above, the one below
    for drawing in drawings:
        page = torch.from_numpy(drawing.image)[None]
        seen = explain.trace(reader.model, page, reader.vocabulary.encode(drawing.text)[:-1])
        boxes = np.clip(drawing.boxes, 0, (256, 112, 256, 112))
        shares = [explain.mass_inside(seen.looks(), box, cell_px=seen.cell_px) for box in boxes]
        for place, line in enumerate(explain.lines_of(drawing.text)):
            if drawing.text[place] != "\n":
                for sums, other in zip(on_line, (line, line - 1, line + 1), strict=True):
                    if 0 <= other < len(boxes):
                        sums.append(float(shares[other][place]))
    written, above, below = map(np.mean, on_line)
    if trained:
        assert written > 0.5
        assert written > 2 * max(above, below)
    else:
        assert written < 0.4


def test_attention_moves_with_the_letters(drawings):
    """The column looked at most lies at the letter that is written, or in a cell beside it."""
    reader = Recognizer.load(LINE_READER, device="cpu")
    near = []
    for drawing in drawings:
        page = torch.from_numpy(drawing.image)[None]
        seen = explain.trace(reader.model, page, reader.vocabulary.encode(drawing.text)[:-1])
        columns = seen.looks().sum(dim=1).argmax(dim=1) * seen.cell_px[1]
        places = [i for i, character in enumerate(drawing.text) if not character.isspace()]
        for place, (left, _, right, _) in zip(places, drawing.letters, strict=True):
            near.append(left - 16 <= int(columns[place]) <= right + 8)
    assert np.mean(near) > 0.8
