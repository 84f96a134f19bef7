"""Reading by a few operations a step, compared with the plain loop that decodes the prefix anew each time."""

import itertools

import pytest
import torch

from paragraph_ocr.model import eager_steps
from paragraph_ocr.model.decoder import Decoder

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


def read(decoder, memory, mask, *, end, max_length):
    return eager_steps.read_greedily(
        decoder, memory, mask, start=START, end=end, pad=PAD, max_length=max_length
    )


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_tokens_and_scores_are_those_of_the_plain_loop(norm, tied, masked, rows):
    decoder = make_decoder(norm=norm, tied=tied, num_tokens=11 + rows % 2)  # odd: in one part
    memory = torch.randn(rows, 9, decoder.width)
    mask = torch.arange(9) < torch.tensor([[9], [1], [5], [8], [2], [7]])[-rows:]
    mask = mask if masked else None
    for end in (None, END):
        expected, expected_scores = plain(decoder, memory, mask, end=end, max_length=16)
        written, scores = read(decoder, memory, mask, end=end, max_length=16)
        assert written.tolist() == expected.tolist()
        assert torch.allclose(scores, expected_scores, atol=1e-4)


def test_rows_leave_where_they_end_and_the_others_go_on():
    lengths = set()
    for seed, norm in itertools.product(range(4), ("pre", "post")):
        decoder = make_decoder(seed=seed, norm=norm)
        decoder.bias.data[END] = 1.0 + seed / 2
        memory = torch.randn(4, 5, decoder.width)
        mask = torch.arange(5) < torch.tensor([[5], [2], [4], [3]])
        expected, expected_scores = plain(decoder, memory, mask, end=END, max_length=20)
        written, scores = read(decoder, memory, mask, end=END, max_length=20)
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


def test_a_stall_has_one_thread_go_on_alone_for_a_while(monkeypatch):
    decoder = make_decoder()
    memory = torch.randn(1, 5, decoder.width)
    expected, expected_scores = read(decoder, memory, None, end=None, max_length=20)
    before, used = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        monkeypatch.setattr(eager_steps, "_STEPS_ALONE", 3)
        monkeypatch.setattr(eager_steps, "_STALL_S", 0.0)  # every product seems to stall
        step = eager_steps._Steps.next

        def note_threads(*arguments):
            used.append(torch.get_num_threads())
            return step(*arguments)

        monkeypatch.setattr(eager_steps._Steps, "next", note_threads)
        written, scores = read(decoder, memory, None, end=None, max_length=20)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert used == [2] + 3 * [1] + [2] + 6 * [1] + [2] + 7 * [1]
    assert torch.equal(written, expected)
    assert torch.allclose(scores, expected_scores, atol=1e-5)


@torch.no_grad()
def test_where_algorithms_must_be_deterministic_one_thread_reads(monkeypatch):
    decoder, used = make_decoder(), []
    step = eager_steps._Steps.next

    def note_threads(*arguments):
        used.append(torch.get_num_threads())
        return step(*arguments)

    monkeypatch.setattr(eager_steps._Steps, "next", note_threads)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    try:
        read(decoder, torch.randn(1, 5, decoder.width), None, end=None, max_length=5)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(before)
    assert used == [1] * 4


@torch.no_grad()
def test_under_autocast_the_scores_stay_near_those_of_float32():
    decoder = make_decoder(norm="pre")
    memory = torch.randn(3, 9, decoder.width)
    mask = torch.arange(9) < torch.tensor([[9], [1], [5]])
    exact = read(decoder, memory, mask, end=None, max_length=2)[1]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = read(decoder, memory, mask, end=None, max_length=2)[1]
    assert rounded.dtype == torch.float32
    assert torch.allclose(exact, rounded, atol=0.05)
    assert not torch.equal(exact, rounded)
