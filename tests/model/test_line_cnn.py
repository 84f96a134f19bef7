"""The sliding-window baseline: windows see their own part of the line, and both losses read it."""

import pytest
import torch
import torch.nn.functional as F

from paragraph_ocr.model.generate import Greedy, SpecialTokens
from paragraph_ocr.model.line_cnn import LineCnn

START, END, PAD = 1, 2, 3


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads of torch, on cores that are busy, take twenty times as long for steps this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


SPACE = 9
NUM_TOKENS = 10


def make(*, loss="windows", window=12, stride=12, seed=0, **changes) -> LineCnn:
    torch.manual_seed(seed)
    settings = {"height": 16, "channels": 6, "width": 32, "dropout": 0.0} | changes
    return LineCnn(
        num_tokens=NUM_TOKENS,
        window_width_px=window,
        window_stride_px=stride,
        loss=loss,
        special=SpecialTokens(START, END, PAD),
        blank=0,
        **settings,
    ).eval()


def bars(texts, *, pitch=12, width=72) -> torch.Tensor:
    """Return lines "B 1 16 width" on which token 4 + k is a bar at height 3k, `pitch` px broad."""
    lines = torch.zeros(len(texts), 1, 16, width, dtype=torch.uint8)
    for row, text in enumerate(texts):
        for place, token in enumerate(text):
            if token == SPACE:
                continue
            top = 3 * (token - 4)
            lines[row, 0, top : top + 3, place * pitch + 2 : (place + 1) * pitch - 2] = 255
    return lines


def labels(texts, length) -> torch.Tensor:
    rows = [[START, *text, END] for text in texts]
    return torch.tensor([row + [PAD] * (length - len(row)) for row in rows])


def random_texts(count, *, longest=6, generator=None):
    generator = generator or torch.Generator().manual_seed(0)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(4, 9, (n,), generator=generator).tolist() for n in lengths]


def learn(model, lines, tokens, *, steps=60, lr=3e-3) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr)
    for _ in range(steps):
        loss, count = model.loss(model(lines, tokens[:, :-1]), tokens[:, 1:], label_smoothing=0.0)
        optimizer.zero_grad()
        (loss / count).backward()
        optimizer.step()


def read(model, lines, **arguments):
    readings = model.read(lines, decoding=Greedy(), max_length=20, **arguments)
    return [reading.tokens for reading in readings]


@pytest.mark.parametrize("window", [12, 20])
@pytest.mark.parametrize("stride", [4, 12])
def test_a_window_sees_its_own_part_of_the_line_and_a_margin(window, stride):
    model = make(window=window, stride=stride)
    line = torch.randint(0, 256, (1, 1, 16, 96), dtype=torch.uint8)
    line[..., 95] = 255  # where the line ends is known to all windows
    before = model.look(line)
    for place in (0, 40, 94):
        changed = line.clone()
        changed[..., place] = 255 - changed[..., place]
        touched = (model.look(changed) - before).abs().amax(dim=(0, 2)) > 0
        starts = torch.arange(before.shape[1]) * stride
        near = (starts - 2 <= place) & (place < starts + window + 2)
        assert torch.equal(touched & ~near, torch.zeros_like(near))
        assert touched.any()


def test_windows_cover_the_line_and_one_step_more_would_cover_nothing():
    for stride in (4, 6, 12, 20):
        model = make(stride=stride)
        for width in (4, 12, 13, 50, 96):
            count = model.num_windows(width)
            assert model.look(torch.zeros(1, 1, 16, width, dtype=torch.uint8)).shape[1] == count
            last_end = (count - 1) * stride + 12
            assert last_end >= width
            assert count == 1 or last_end - stride < width


def test_logits_are_as_many_as_the_tokens_even_beyond_the_line():
    model = make()
    lines = bars([[4, 5, 6]])
    for length in (1, 5, 11):
        tokens = torch.full((1, length), START)
        assert model(lines, tokens).shape == (1, length, NUM_TOKENS)
    assert make(loss="ctc", stride=4)(lines, torch.full((1, 3), START)).shape[1] == 16


def test_what_lies_beyond_the_size_of_a_line_is_paper():
    model = make()
    lines = bars([[4, 5, 6]], width=36)[:, :, :12]
    canvas = F.pad(lines, (0, 36, 0, 4), value=200)
    sizes = torch.tensor([[12, 36]])
    torch.testing.assert_close(model.look(canvas, sizes), model.look(F.pad(lines, (0, 36, 0, 4))))
    with pytest.raises(ValueError, match="17 px high"):
        model.look(torch.zeros(1, 1, 17, 36, dtype=torch.uint8))


def test_lines_of_the_windows_pitch_are_learned_and_read():
    texts = [[*text[:1], SPACE, *text] for text in random_texts(64, longest=4)]
    lines, tokens = bars(texts), labels(texts, 8)
    model = make()
    learn(model, lines, tokens)
    unseen = random_texts(32, longest=4, generator=torch.Generator().manual_seed(1))
    unseen = [[*text[:1], SPACE, *text] for text in unseen]
    assert read(model, bars(unseen)) == unseen


def test_another_pitch_defeats_windows_and_not_ctc():
    texts = random_texts(64)
    lines, tokens = bars(texts, pitch=8, width=56), labels(texts, 8)
    unseen = random_texts(32, generator=torch.Generator().manual_seed(1))
    windows, ctc = make(), make(loss="ctc", window=8, stride=4)
    learn(windows, lines, tokens, steps=100)
    learn(ctc, lines, tokens, steps=150, lr=2e-2)
    right = [
        sum(
            a == b
            for a, b in zip(read(model, bars(unseen, pitch=8, width=56)), unseen, strict=True)
        )
        for model in (windows, ctc)
    ]
    assert right[0] <= 20
    assert right[1] >= 28


def test_ctc_costs_what_torch_says_for_each_line_and_counts_characters():
    model = make(loss="ctc", stride=2)
    texts = [[4, 4, 5], [6]]
    logits = model(bars(texts), labels(texts, 6)[:, :-1])
    total, count = model.loss(logits, labels(texts, 6)[:, 1:], label_smoothing=0.0)
    alone = [
        F.ctc_loss(
            logits[row].log_softmax(-1)[:, None],
            torch.tensor([text]),
            [logits.shape[1]],
            [len(text)],
            reduction="sum",
        )
        for row, text in enumerate(texts)
    ]
    torch.testing.assert_close(total, sum(alone))
    assert int(count) == 4


def test_ctc_writes_a_repeated_window_once_and_a_repeated_character_twice():
    model = make(loss="ctc", stride=2)
    windows = [0, 4, 4, 0, 4, 5, 5, 0, 0, 6]
    logits = torch.full((1, len(windows), NUM_TOKENS), -9.0)
    logits[0, torch.arange(len(windows)), torch.tensor(windows)] = 9.0
    model.look = lambda images, sizes, at_least: logits
    (reading,) = model.read(bars([[4]]), decoding=Greedy(), max_length=20)
    assert reading.tokens == [4, 4, 5, 6]
    assert len(reading.confidences) == 4
    (short,) = model.read(bars([[4]]), decoding=Greedy(), max_length=4)
    assert short.tokens == [4, 4]


@pytest.mark.parametrize("loss", ["windows", "ctc"])
def test_weights_come_back_from_a_file(tmp_path, loss):
    from safetensors.torch import load_file, save_file

    first, second = make(loss=loss, seed=1), make(loss=loss, seed=2)
    save_file(first.weights(), tmp_path / "weights.safetensors")
    second.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    lines = bars(random_texts(4))
    assert torch.equal(first.look(lines), second.look(lines))


def test_an_odd_window_or_an_unknown_loss_is_the_callers_bug():
    with pytest.raises(ValueError, match="13 px wide"):
        make(window=13)
    with pytest.raises(ValueError, match="none of"):
        make(loss="mse")
