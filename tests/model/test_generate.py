import itertools

import pytest
import torch

from paragraph_ocr.model import cpu_steps
from paragraph_ocr.model.decoder import Decoder
from paragraph_ocr.model.generate import Beam, Greedy, SpecialTokens, generate

SPECIAL = SpecialTokens(start=1, end=2, pad=3)


def slow_greedy(decoder, memory, mask, max_length):
    """Return the tokens of one page, decoding the whole prefix again for every token."""
    tokens = [SPECIAL.start]
    while len(tokens) < max_length:
        logits = decoder(torch.tensor([tokens]), memory, mask)
        tokens.append(int(logits[0, -1].argmax()))
        if tokens[-1] == SPECIAL.end:
            break
    return [token for token in tokens[1:] if token != SPECIAL.end]


@torch.no_grad()
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("masked", [False, True])
def test_cached_reading_gives_the_tokens_of_the_plain_loop(make_recognizer, norm, masked):
    lengths = set()
    for seed in range(4):
        decoder = make_recognizer(seed=seed, norm=norm, tied=seed % 2 == 0).decoder
        decoder.bias.data[SPECIAL.end] = seed  # ragged ends
        memory = torch.randn(6, 15, decoder.width)
        mask = torch.arange(15) < torch.tensor([[15], [9], [1], [4], [14], [7]])
        mask = mask if masked else None
        readings = generate(
            decoder, memory, mask, special=SPECIAL, decoding=Greedy(), max_length=24
        )
        for row, reading in enumerate(readings):
            seen = None if mask is None else mask[row : row + 1]
            assert reading.tokens == slow_greedy(decoder, memory[row : row + 1], seen, 24)
            lengths.add(len(reading.tokens))
    assert len(lengths) > 4, "the rows should end at different steps"


def test_a_page_is_read_alone_as_in_a_batch(make_recognizer, pages):
    recognizer = make_recognizer(seed=2)
    recognizer.decoder.bias.data[SPECIAL.end] = 2.0
    together = recognizer.read(pages, decoding=Greedy(), max_length=30)
    alone = [recognizer.read(p[None], decoding=Greedy(), max_length=30)[0] for p in pages]
    assert [r.tokens for r in together] == [r.tokens for r in alone]
    for one, other in zip(together, alone, strict=True):
        assert one.log_probability == pytest.approx(other.log_probability, abs=1e-4)


def test_no_reading_is_longer_than_it_may_be(make_recognizer, pages):
    recognizer = make_recognizer()
    recognizer.decoder.bias.data[SPECIAL.end] = -1e9
    readings = recognizer.read(pages, decoding=Greedy(), max_length=10)
    assert {len(reading.tokens) for reading in readings} == {9}  # and the start
    assert {len(reading.confidences) for reading in readings} == {9}


def test_ignoring_the_end_writes_every_token_it_may(make_recognizer, pages, monkeypatch):
    recognizer = make_recognizer()
    recognizer.decoder.bias.data[SPECIAL.end] = 1e9
    assert recognizer.read(pages, decoding=Greedy(), max_length=12)[0].tokens == []
    written = []
    read_greedily = cpu_steps.read_greedily

    def note_tokens(*arguments, **options):
        tokens, scores = read_greedily(*arguments, **options)
        written.extend(tokens.tolist())
        return tokens, scores

    monkeypatch.setattr(cpu_steps, "read_greedily", note_tokens)
    recognizer.read(pages, decoding=Greedy(ignore_end=True), max_length=12)
    assert written == [[SPECIAL.end] * 11] * len(pages)


def test_confidences_multiply_to_the_probability_of_the_reading(make_recognizer, pages):
    recognizer = make_recognizer(seed=5)
    recognizer.decoder.bias.data[SPECIAL.end] = -1e9
    reading = recognizer.read(pages[:1], decoding=Greedy(), max_length=20)[0]
    total = torch.tensor(reading.confidences, dtype=torch.double).log().sum()
    assert float(total) == pytest.approx(reading.log_probability, abs=1e-3)


def test_a_beam_of_one_reads_as_greedy_does(make_recognizer, pages):
    for seed in range(3):
        recognizer = make_recognizer(seed=seed)
        recognizer.decoder.bias.data[SPECIAL.end] = 1.0 + seed
        greedy = recognizer.read(pages, decoding=Greedy(), max_length=30)
        beam = recognizer.read(pages, decoding=Beam(width=1), max_length=30)
        assert [r.tokens for r in greedy] == [r.tokens for r in beam]


def test_a_beam_as_wide_as_all_texts_finds_the_likeliest_of_all():
    torch.manual_seed(0)
    for _ in range(5):
        decoder = Decoder(
            num_tokens=6,
            depth=1,
            width=16,
            heads=2,
            feed_forward=16,
            dropout=0.0,
            norm="pre",
            tied=True,
            max_length=8,
        ).eval()
        memory = torch.randn(2, 3, 16)
        readings = generate(
            decoder, memory, None, special=SPECIAL, decoding=Beam(width=216), max_length=4
        )
        for row, reading in enumerate(readings):
            best = max(all_texts(decoder, memory[row : row + 1]), key=lambda text: text[1])
            assert reading.tokens == best[0]
            assert reading.log_probability == pytest.approx(best[1], abs=1e-4)


@torch.no_grad()
def all_texts(decoder, memory):
    """Yield every text of up to three tokens with its log-probability, by brute force."""
    tokens = [t for t in range(6) if t != SPECIAL.end]
    for length in range(4):
        for text in itertools.product(tokens, repeat=length):
            written = [*text, SPECIAL.end][:3]
            inputs = torch.tensor([[SPECIAL.start, *written[:-1]]])
            logs = decoder(inputs, memory).log_softmax(-1)[0]
            yield list(text), float(sum(logs[i, token] for i, token in enumerate(written)))


def test_a_beam_reads_pages_together_as_it_reads_each_alone(make_recognizer, pages):
    lengths = set()
    for seed in range(3):
        recognizer = make_recognizer(seed=seed)
        recognizer.decoder.bias.data[SPECIAL.end] = 1.0 + seed / 2
        together = recognizer.read(pages, decoding=Beam(width=3), max_length=30)
        for page, reading in zip(pages, together, strict=True):
            (alone,) = recognizer.read(page[None], decoding=Beam(width=3), max_length=30)
            assert reading.tokens == alone.tokens
            assert [r.tokens for r in reading.others] == [r.tokens for r in alone.others]
        lengths |= {len(reading.tokens) for reading in together}
    assert len(lengths) > 1, "some pages should be over before others"


def test_a_beam_gives_what_else_it_found_the_likelier_first(make_recognizer, pages):
    recognizer = make_recognizer(seed=3)
    recognizer.decoder.bias.data[SPECIAL.end] = 1.0
    for reading in recognizer.read(pages, decoding=Beam(width=4), max_length=12):
        found = [reading, *reading.others]
        texts = [tuple(one.tokens) for one in found]
        assert len(set(texts)) == len(texts) >= 4
        totals = [one.log_probability for one in found]
        assert totals == sorted(totals, reverse=True)
        for one in found:
            logs = sum(torch.tensor(one.confidences).log())
            ended = len(one.tokens) < 11
            assert float(logs) >= one.log_probability - 1e-4
            assert ended or float(logs) == pytest.approx(one.log_probability, abs=1e-4)


def test_a_wider_beam_finds_likelier_texts(make_recognizer, pages):
    recognizer = make_recognizer(seed=3)
    greedy = recognizer.read(pages, decoding=Greedy(), max_length=20)
    beam = recognizer.read(pages, decoding=Beam(width=8), max_length=20)
    for one, other in zip(beam, greedy, strict=True):
        assert one.log_probability > other.log_probability + 0.1
