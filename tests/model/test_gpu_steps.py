"""Reading by Triton kernels, on a GPU if there is one, else in Triton's interpreter."""

import gc
import weakref

import pytest
import torch

pytest.importorskip("triton")

from paragraph_ocr.model import gpu_steps
from paragraph_ocr.model.decoder import Decoder
from paragraph_ocr.model.generate import Greedy, SpecialTokens, generate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPECIAL = SpecialTokens(start=1, end=2, pad=3)


def make_decoder(*, norm, tied, seed=0, max_length=8, width=12, heads=2, depth=1, feed_forward=20):
    torch.manual_seed(seed)
    decoder = Decoder(
        num_tokens=11,
        depth=depth,
        width=width,
        heads=heads,
        feed_forward=feed_forward,
        dropout=0.0,
        norm=norm,
        tied=tied,
        max_length=max_length,
    )
    for parameter in decoder.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return decoder.eval().to(DEVICE)


def plain(decoder, memory, mask, max_length):
    """Return the tokens and their log-probabilities, decoding the whole prefix again for every token."""
    tokens = torch.full((len(memory), 1), SPECIAL.start, device=DEVICE)
    scores = []
    for _ in range(max_length - 1):
        logs = decoder(tokens, memory, mask)[:, -1].log_softmax(dim=-1)
        best, chosen = logs.max(dim=-1)
        scores.append(best)
        tokens = torch.cat([tokens, chosen[:, None]], dim=1)
    return tokens[:, 1:], torch.stack(scores, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("norm", "masked"), [("pre", True), ("post", False)])
def test_the_kernels_write_the_tokens_of_the_plain_loop(monkeypatch, fused, norm, masked):
    monkeypatch.setattr(gpu_steps, "FUSED_ROWS", 64 if fused else 0)
    decoder = make_decoder(norm=norm, tied=masked)
    memory = torch.randn(3, 9, decoder.width, device=DEVICE)
    mask = torch.arange(9, device=DEVICE) < torch.tensor([[9], [1], [5]], device=DEVICE)
    mask = mask if masked else None
    written, scores = gpu_steps.read_greedily(
        decoder, memory, mask, start=SPECIAL.start, end=None, pad=SPECIAL.pad, max_length=8
    )
    expected, expected_scores = plain(decoder, memory, mask, 8)
    assert written[:, :7].tolist() == expected.tolist()
    assert torch.allclose(scores[:, :7], expected_scores, atol=1e-4)
    assert len(expected.unique()) > 1, "the texts should differ"


@torch.no_grad()
def test_rows_end_where_the_plain_loop_ends_them():
    lengths = set()
    for seed in range(2):
        decoder = make_decoder(norm="pre", tied=False, seed=seed)
        decoder.bias.data[SPECIAL.end] = 1.0 + seed
        memory = torch.randn(4, 5, decoder.width, device=DEVICE)
        written, scores = gpu_steps.read_greedily(
            decoder,
            memory,
            None,
            start=SPECIAL.start,
            end=SPECIAL.end,
            pad=SPECIAL.pad,
            max_length=8,
        )
        readings = generate(
            decoder.cpu(), memory.cpu(), None, special=SPECIAL, decoding=Greedy(), max_length=8
        )
        for row, reading in enumerate(readings):
            length = len(reading.tokens)
            ended = [SPECIAL.end] if length < 7 else []
            assert written[row, :7].tolist() == (
                reading.tokens + ended + [SPECIAL.pad] * (7 - length - len(ended))
            )
            assert float(scores[row].sum()) == pytest.approx(reading.log_probability, abs=1e-4)
            lengths.add(length)
    assert len(lengths) > 1, "the rows should end at different steps"


@torch.no_grad()
def test_a_recording_reads_with_the_weights_of_today():
    decoder = make_decoder(norm="pre", tied=True)
    memory = torch.randn(1, 5, decoder.width, device=DEVICE)
    arguments = {"start": SPECIAL.start, "end": None, "pad": SPECIAL.pad, "max_length": 6}
    before = gpu_steps.read_greedily(decoder, memory, None, **arguments)[1].clone()
    for parameter in decoder.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    after, scores = gpu_steps.read_greedily(decoder, memory, None, **arguments)
    expected, expected_scores = plain(decoder, memory, None, 6)
    assert after[:, :5].tolist() == expected.tolist()
    assert torch.allclose(scores[:, :5], expected_scores, atol=1e-4)
    assert not torch.allclose(scores, before)


@torch.no_grad()
def test_only_the_last_sizes_are_kept():
    decoder = make_decoder(norm="post", tied=True, max_length=4)
    for cells in range(3, 3 + gpu_steps._KEPT + 2):
        memory = torch.randn(1, cells, decoder.width, device=DEVICE)
        gpu_steps.read_greedily(decoder, memory, None, start=1, end=2, pad=3, max_length=3)
    kept = [size.cells for size in gpu_steps._recorded[decoder]]
    assert kept == [5, 6, 7, 8]


@pytest.mark.skipif(DEVICE == "cpu", reason="bfloat16 is read with on a GPU")
@torch.inference_mode()
def test_in_bfloat16_the_sums_stay_near_those_of_float32():
    decoder = make_decoder(norm="pre", tied=True, width=64, heads=4, max_length=40)
    memory = torch.randn(8, 30, decoder.width, device=DEVICE)
    arguments = {"start": 1, "end": None, "pad": 3, "max_length": 2}
    exact = gpu_steps.read_greedily(decoder, memory, None, **arguments)[1].clone()
    with torch.autocast("cuda", torch.bfloat16):
        rounded = gpu_steps.read_greedily(decoder, memory, None, **arguments)[1]
    assert torch.allclose(exact, rounded, atol=0.05)


@torch.no_grad()
def test_a_decoder_that_is_gone_takes_its_recordings_with_it():
    decoder = make_decoder(norm="pre", tied=True, max_length=3)
    memory = torch.randn(1, 3, decoder.width, device=DEVICE)
    gpu_steps.read_greedily(decoder, memory, None, start=1, end=2, pad=3, max_length=3)
    recorded = weakref.ref(next(iter(gpu_steps._recorded[decoder].values())))
    del decoder
    gc.collect()
    assert recorded() is None
