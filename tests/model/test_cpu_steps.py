"""Reading by a compiled function, and by the cache, against the loop that decodes the prefix anew."""

import itertools

import numba.core.caching
import numpy as np
import pytest
import torch

from paragraph_ocr.model import cpu_steps
from paragraph_ocr.model.decoder import Decoder
from paragraph_ocr.model.generate import read_greedily_by_cache

START, END, PAD = 1, 2, 3


def make_decoder(*, norm="post", tied=False, seed=0, width=24, heads=3, num_tokens=11):
    torch.manual_seed(seed)
    decoder = Decoder(
        num_tokens=num_tokens,
        depth=2,
        width=width,
        heads=heads,
        feed_forward=30,
        dropout=0.3,  # must not be seen
        norm=norm,
        tied=tied,
        max_length=20,
    )
    for parameter in decoder.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return decoder.eval()


@torch.no_grad()
def plain(decoder, memory, mask, *, end, max_length):
    """Return tokens and log-probabilities, decoding the whole prefix again for every token."""
    written = torch.full((len(memory), max_length - 1), PAD)
    scores = torch.zeros(len(memory), max_length - 1)
    for row in range(len(memory)):
        tokens = [START]
        for step in range(max_length - 1):
            seen = None if mask is None else mask[row : row + 1]
            logits = decoder(torch.tensor([tokens]), memory[row : row + 1], seen)[0, -1]
            scores[row, step], likeliest = logits.log_softmax(dim=-1).max(dim=-1)
            written[row, step] = likeliest
            tokens.append(int(likeliest))
            if tokens[-1] == end:
                break
    return written, scores


@torch.no_grad()
def read(decoder, memory, mask, *, end, max_length, by=cpu_steps.read_greedily):
    return by(decoder, memory, mask, start=START, end=end, pad=PAD, max_length=max_length)


WAYS = pytest.mark.parametrize("by", [cpu_steps.read_greedily, read_greedily_by_cache])


@WAYS
@pytest.mark.parametrize("rows", [1, 2, 6])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_tokens_and_scores_are_those_of_the_plain_loop(norm, tied, masked, rows, by):
    decoder = make_decoder(norm=norm, tied=tied, heads=rows)
    memory = torch.randn(rows, 9, decoder.width)
    mask = torch.arange(9) < torch.tensor([[9], [1], [5], [8], [2], [7]])[-rows:]
    mask = mask if masked else None
    for end in (None, END):
        expected, expected_scores = plain(decoder, memory, mask, end=end, max_length=16)
        written, scores = read(decoder, memory, mask, end=end, max_length=16, by=by)
        assert written.tolist() == expected.tolist()
        assert torch.allclose(scores, expected_scores, atol=1e-4)


@WAYS
def test_rows_leave_where_they_end_and_the_others_go_on(by):
    lengths = set()
    for seed, norm in itertools.product(range(4), ("pre", "post")):
        decoder = make_decoder(seed=seed, norm=norm)
        decoder.bias.data[END] = 1.0 + seed / 2
        memory = torch.randn(4, 5, decoder.width)
        mask = torch.arange(5) < torch.tensor([[5], [2], [4], [3]])
        expected, expected_scores = plain(decoder, memory, mask, end=END, max_length=20)
        written, scores = read(decoder, memory, mask, end=END, max_length=20, by=by)
        assert written.tolist() == expected.tolist()
        assert torch.allclose(scores, expected_scores, atol=1e-4)
        lengths |= {row.index(END) for row in written.tolist() if END in row}
    assert len(lengths) > 3, "the rows should end at different steps"


def test_the_weights_of_today_are_read_with():
    decoder = make_decoder()
    memory = torch.randn(1, 5, decoder.width)
    before = read(decoder, memory, None, end=None, max_length=8)[1]
    for parameter in decoder.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    written, scores = read(decoder, memory, None, end=None, max_length=8)
    expected, expected_scores = plain(decoder, memory, None, end=None, max_length=8)
    assert written.tolist() == expected.tolist()
    assert torch.allclose(scores, expected_scores, atol=1e-4)
    assert not torch.allclose(scores, before)


def test_a_row_is_read_alike_alone_and_beside_others_by_any_number_of_threads():
    decoder = make_decoder(width=64, heads=4, norm="pre")
    memory = torch.randn(5, 40, 64)
    alone = [read(decoder, row[None], None, end=END, max_length=20) for row in memory]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            written, scores = read(decoder, memory, None, end=END, max_length=20)
            assert torch.equal(written, torch.cat([tokens for tokens, _ in alone]))
            assert torch.allclose(scores, torch.cat([one for _, one in alone]), atol=1e-5)
    finally:
        torch.set_num_threads(before)


def test_in_bfloat16_the_scores_stay_near_those_of_float32():
    decoder = make_decoder(norm="pre", width=64, heads=4)
    memory = torch.randn(3, 40, decoder.width)
    exact = read(decoder, memory, None, end=None, max_length=12)[1]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = read(decoder, memory.bfloat16(), None, end=None, max_length=12)[1]
    assert rounded.dtype == torch.float32
    assert torch.allclose(exact[:, 0], rounded[:, 0], atol=0.05)
    assert not torch.equal(exact, rounded)


def test_in_bfloat16_a_decoder_of_such_numbers_reads_as_in_float32():
    decoder = make_decoder(norm="post", width=64, heads=4).bfloat16().float()
    for layer in decoder.layers:  # what is rounded once more: keys and values of the page
        layer.cross_attention.key_value.weight.data.zero_()
        layer.cross_attention.key_value.bias.data = torch.randn(128).bfloat16().float()
    memory = torch.randn(2, 40, decoder.width)
    exact = read(decoder, memory, None, end=None, max_length=20)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = read(decoder, memory, None, end=None, max_length=20)
    assert torch.equal(rounded[0], exact[0])
    assert torch.allclose(rounded[1], exact[1], atol=1e-5)


@pytest.mark.parametrize("spread", [1e-3, 1.0, 20.0, 200.0])
def test_exponentials_are_those_of_numpy(spread):
    values = spread * np.random.default_rng(0).standard_normal(1001, dtype=np.float32)
    expected = np.exp(values.astype(np.float64) - values.max())
    total = cpu_steps._exponentials(values, np.empty(1001, np.int32), 1001)
    assert values == pytest.approx(expected, rel=2e-5, abs=1e-37)
    near = expected > 1e-4
    assert values[near] == pytest.approx(expected[near], rel=1e-6)
    assert total == pytest.approx(expected.sum(), rel=1e-6)


def test_where_nothing_can_be_kept_it_is_compiled_each_time(monkeypatch):
    monkeypatch.setattr(numba.core.caching.CacheImpl, "_locator_classes", [])

    def double(number):
        return 2 * number

    assert cpu_steps._compiled(double)(4) == 8
