"""Reading by a compiled function, and by the cache, against the loop that decodes the prefix anew."""

import itertools

import numba.core.caching
import numpy as np
import pytest
import torch

from paragraph_ocr.model import cpu_steps
from paragraph_ocr.model.decoder import Decoder
from paragraph_ocr.model.generate import read_greedily_by_cache
from paragraph_ocr.quantised import quantise, restore

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


def make_released(**options):
    """Return a decoder as it is after a release: each matrix is whole numbers of a byte times scales."""
    decoder = make_decoder(**{"width": 64, "heads": 4, "num_tokens": 20, **options})
    decoder.load_state_dict(restore(quantise(decoder.state_dict())))
    return decoder


def stacked(decoder, stored=torch.float32):
    with torch.inference_mode():
        return cpu_steps._stacked(decoder, list(decoder.layers), stored)


def linears(weights):
    return {name: its for name, its in weights._asdict().items() if hasattr(its, "matrix")}


def in_steps(rows):
    """Return rows to the nearest 127th of their largest number."""
    steps = rows.abs().amax(dim=-1, keepdim=True) / 127
    return (rows / steps).round() * steps


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


@pytest.mark.parametrize("rows", [1, 2, 6])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_release_is_read_as_by_the_cache_with_keys_and_values_in_steps(
    norm, tied, masked, rows, monkeypatch
):
    decoder = make_released(norm=norm, tied=tied)
    start = decoder.start

    def start_in_steps(*arguments, **options):
        cache = start(*arguments, **options)
        cache.crosses = [in_steps(cross) for cross in cache.crosses]
        return cache

    monkeypatch.setattr(decoder, "start", start_in_steps)
    memory = torch.randn(rows, 9, decoder.width)
    mask = torch.arange(9) < torch.tensor([[9], [1], [5], [8], [2], [7]])[-rows:]
    mask = mask if masked else None
    for end in (None, END):
        by_cache = read(decoder, memory, mask, end=end, max_length=16, by=read_greedily_by_cache)
        written, scores = read(decoder, memory, mask, end=end, max_length=16)
        assert written.tolist() == by_cache[0].tolist()
        assert torch.allclose(scores, by_cache[1], atol=1e-3)  # a number may lie between two steps


def test_scores_of_a_release_are_near_those_of_float32_and_not_the_same():
    decoder = make_released(norm="pre")
    memory = torch.randn(5, 40, decoder.width)
    exact = read(decoder, memory, None, end=None, max_length=2, by=read_greedily_by_cache)
    rounded = read(decoder, memory, None, end=None, max_length=2)
    assert torch.equal(exact[0], rounded[0])
    assert torch.allclose(exact[1], rounded[1], atol=0.02)
    assert not torch.allclose(exact[1], rounded[1], atol=1e-5)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_matrices_of_a_release_are_kept_in_bytes_and_none_of_another_model(tied, stored):
    decoder = make_released(tied=tied)
    exact = linears(stacked(make_decoder(tied=tied, width=64, heads=4, num_tokens=20)))
    released = linears(stacked(decoder, stored))
    assert len(released) == 7
    for name, (matrix, bias) in released.items():
        assert matrix.numbers.dtype == np.int8
        assert np.abs(matrix.numbers).max(axis=-1) == pytest.approx(127)
        steps = matrix.scales[..., None]
        assert (np.abs(matrix.numbers * steps - exact[name].matrix.numbers) <= 0.51 * steps).all()
        assert np.array_equal(bias, exact[name].bias)
    kind = {torch.float32: np.float32, torch.bfloat16: np.uint16}[stored]
    for model in (make_decoder(tied=tied, width=64), make_decoder(tied=tied), decoder.bfloat16()):
        for matrix, _ in linears(stacked(model, stored)).values():
            assert matrix.numbers.dtype == kind
            assert (matrix.scales == 1).all()


@pytest.mark.parametrize(
    "name",
    [
        "embedding",  # the read-out's, too
        "layers.0.self_attention.query",
        "layers.1.self_attention.key_value",
        "layers.1.self_attention.out",
        "layers.0.cross_attention.query",
        "layers.1.cross_attention.out",
        "layers.0.expand",
        "layers.1.contract",
    ],
)
def test_one_weight_between_two_steps_makes_a_model_another(name):
    decoder = make_released(tied=True)
    weight = decoder.get_submodule(name).weight.data
    steps = weight[-1].abs().max() / 127
    column = int(weight[-1].abs().argmin())
    weight[-1, column] += steps
    assert stacked(decoder).own.matrix.numbers.dtype == np.int8
    weight[-1, column] += 0.1 * steps
    assert stacked(decoder).own.matrix.numbers.dtype == np.float32


def test_a_row_of_zeros_is_whole():
    decoder = make_released()
    decoder.layers[0].expand.weight.data[3] = 0.0
    matrix = stacked(decoder).expand.matrix
    assert matrix.numbers.dtype == np.int8
    assert (matrix.numbers[0, 3] == 0).all()
    assert np.isfinite(matrix.scales).all()


def test_keys_and_values_in_bytes_are_rounded_to_the_nearest_step():
    decoder = make_released()
    cells = torch.randn(50, decoder.width)
    with torch.inference_mode():
        exact, rounded = (
            cpu_steps._projected(list(decoder.layers), cells, in_bytes=given)
            for given in (False, True)
        )
        theirs = torch.stack(
            [its.cross_attention.keys_values(cells[None])[:, 0] for its in decoder.layers], dim=1
        )
    assert exact.numbers == pytest.approx(theirs.numpy(), abs=1e-5)
    assert exact.numbers.shape == rounded.numbers.shape == (2, 2, 4, 50, 16)
    assert (exact.scales[0] == 1 / 4).all(), "scores are divided by the root of the width"
    assert (exact.scales[1] == 1).all()
    assert rounded.numbers.dtype == np.int8
    largest = np.abs(exact.numbers).max(axis=-1)
    assert rounded.scales == pytest.approx(largest / 127 * exact.scales, rel=1e-5)
    away = np.abs(
        rounded.numbers - exact.numbers * exact.scales[..., None] / rounded.scales[..., None]
    )
    assert away.max() == pytest.approx(0.5, abs=1e-2)


def test_a_release_is_read_in_bytes_under_autocast_too():
    decoder = make_released(norm="pre")
    memory = torch.randn(3, 40, decoder.width)
    exact = read(decoder, memory, None, end=None, max_length=2)[1]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = read(decoder, memory.bfloat16(), None, end=None, max_length=2)[1]
    assert torch.allclose(exact, rounded, atol=0.05)


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


@pytest.mark.parametrize("make", [make_decoder, make_released])
def test_a_row_is_read_alike_alone_and_beside_others_by_any_number_of_threads(make):
    decoder = make(norm="pre", width=64, heads=4)
    memory = torch.randn(5, 40, 64)
    alone = [read(decoder, row[None], None, end=END, max_length=20) for row in memory]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            written, scores = read(decoder, memory, None, end=END, max_length=20)
            assert torch.equal(written, torch.cat([tokens for tokens, _ in alone]))
            near = 1e-5 if make is make_decoder else 1e-3  # a number may lie between two steps
            assert torch.allclose(scores, torch.cat([one for _, one in alone]), atol=near)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_what_a_page_raises_is_raised_and_torch_has_its_threads_again():
    decoder = make_decoder()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(RuntimeError, match="shapes"):
            read(decoder, torch.randn(3, 5, decoder.width + 3), None, end=None, max_length=4)
        assert torch.get_num_threads() == 2
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
