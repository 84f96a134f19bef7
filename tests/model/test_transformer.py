import pytest
import torch
import torch.nn.functional as F

from paragraph_ocr.model.generate import Greedy
from paragraph_ocr.model.reader import Letters
from paragraph_ocr.reading.explain import attention_weights

PAD = 3


def test_padding_of_labels_changes_no_logits_before_it(make_recognizer, pages):
    recognizer = make_recognizer()
    tokens = torch.randint(4, 20, (6, 10))
    padded = F.pad(tokens, (0, 7), value=PAD)
    torch.testing.assert_close(recognizer(pages, tokens), recognizer(pages, padded)[:, :10])


def test_padding_of_the_canvas_leaves_logits_and_reading_as_they_were(make_recognizer, pages):
    recognizer = make_recognizer()
    tokens = torch.randint(4, 20, (6, 10))
    canvas = F.pad(pages, (0, 37, 0, 29), value=200)
    sizes = torch.tensor([[48, 80]] * 6)
    torch.testing.assert_close(
        recognizer(pages, tokens), recognizer(canvas, tokens, sizes), atol=1e-4, rtol=1e-4
    )
    plain = recognizer.read(pages, decoding=Greedy(), max_length=20)
    padded = recognizer.read(canvas, sizes, decoding=Greedy(), max_length=20)
    assert [r.tokens for r in plain] == [r.tokens for r in padded]


def some_letters(tokens):
    """Return letters to be read on pages of 48x80 px, every third of them at a place that nobody knows."""
    places = torch.rand(*tokens.shape, 2) * torch.tensor([80.0, 48.0])
    places[:, ::3] = torch.nan
    return Letters(tokens.roll(-1, dims=1), places)


def tamed(recognizer):
    """Return it with its weights as they are before training, which the fixture has made larger."""
    for parameter in recognizer.decoder.layers.parameters():
        if parameter.ndim == 2:
            parameter.data /= 3
    recognizer.project.weight.data /= 30
    return recognizer


def slow_guidance(recognizer, pages, tokens, letters, sizes=None):
    """Return the same as `teach`, letter by letter, from the weights that `explain` sees."""
    memory = recognizer.encode(pages, sizes)
    weights = []

    def record(module, inputs, keywords, _):
        weights.append(attention_weights(module, *inputs, **keywords))

    hooks = [
        layer.cross_attention.register_forward_hook(record, with_kwargs=True)
        for layer in recognizer.decoder.layers
    ]
    recognizer(pages, tokens, sizes)
    for hook in hooks:
        hook.remove()
    down, across = recognizer.encoder.stride
    cost = 0.0
    for page in range(len(tokens)):
        for place, (x, y) in enumerate(letters.places[page].tolist()):
            if x != x:
                continue
            cell = min(int(y // down), memory.grid[0] - 1) * memory.grid[1]
            cell += min(int(x // across), memory.grid[1] - 1)
            read = recognizer.decoder.logits(memory.states[page, cell]).log_softmax(dim=-1)
            cost -= float(read[letters.tokens[page, place]])
            for layer in weights[1:]:
                cost -= float(layer[page, 0, place, cell].log()) / (len(weights) - 1)
    return cost


def test_guidance_costs_what_reading_and_looking_elsewhere_cost(make_recognizer, pages):
    recognizer = tamed(make_recognizer())
    tokens = torch.randint(4, 20, (6, 10))
    letters = some_letters(tokens)
    with torch.no_grad():
        logits, guidance = recognizer.teach(pages, tokens, None, letters)
        torch.testing.assert_close(logits, recognizer(pages, tokens))
        slow = slow_guidance(recognizer, pages, tokens, letters)
        assert float(guidance) == pytest.approx(slow, rel=1e-4)
        # on a larger canvas, whose padding nobody looks at
        canvas = F.pad(pages, (0, 37, 0, 29), value=200)
        sizes = torch.tensor([[48, 80]] * 6)
        padded = recognizer.teach(canvas, tokens, sizes, letters)[1]
        assert float(padded) == pytest.approx(slow, rel=1e-3)


def test_guided_heads_learn_to_look_where_the_next_letter_is(make_recognizer, pages):
    recognizer = tamed(make_recognizer()).train()
    tokens = torch.randint(4, 20, (6, 10))
    rows, columns = recognizer.encode(pages).grid
    cells = torch.stack([torch.randperm(rows * columns)[:10] for _ in tokens])  # a letter each
    places = torch.stack([cells % columns * 80 / columns + 3, cells // columns * 48 / rows + 3], -1)
    letters = Letters(tokens.roll(-1, dims=1), places)
    optimizer = torch.optim.Adam(recognizer.parameters(), lr=3e-3)
    first = None
    for _ in range(60):
        guidance = recognizer.teach(pages, tokens, None, letters)[1]
        first = float(guidance.detach()) if first is None else first
        optimizer.zero_grad()
        guidance.backward()
        optimizer.step()
    assert float(guidance.detach()) / 60 < 0.2 < 1 < first / 60


@pytest.mark.parametrize("several", [False, True])
def test_compiled_it_gives_the_same_logits_on_every_canvas(
    make_recognizer, pages, monkeypatch, several
):
    compile, compiled_with, canvases = torch.compile, [], set()

    def trace(function, **options):  # and leave out what takes minutes
        compiled_with.append((function, options))
        faster = compile(function, **options, backend="eager")

        def counted(images, *others):
            canvases.add(tuple(images.shape[-2:]))
            return faster(images, *others)

        return counted

    monkeypatch.setattr(torch, "compile", trace)
    recognizer = make_recognizer()
    small = tuple(pages.shape[-2:])
    compiled = recognizer.compiled(canvas=small if several else None)
    for canvas in (pages, F.pad(pages, (0, 32, 0, 32))):
        for length in (10, 6):
            tokens = torch.randint(4, 20, (6, length))
            logits, guidance = compiled(canvas, tokens)
            torch.testing.assert_close(logits, recognizer(canvas, tokens))
            assert guidance is None
            letters = some_letters(tokens)
            expected = recognizer.teach(canvas, tokens, None, letters)
            torch.testing.assert_close(compiled(canvas, tokens, None, letters), expected)
    # of several canvases one alone, and without the decoder, whose lengths vary on it
    whole, part = (recognizer.teach, {}), (recognizer.encode, {"dynamic": False})
    assert compiled_with == [part if several else whole]
    assert (canvases == {small}) == several


def test_another_page_gives_another_memory(make_recognizer, pages):
    recognizer = make_recognizer()
    memory = recognizer.encode(pages[:1]).states
    blank = recognizer.encode(torch.zeros_like(pages[:1])).states
    other = recognizer.encode(pages[1:2]).states
    assert not torch.allclose(memory, blank)
    assert not torch.allclose(memory, other)


def test_gradients_reach_every_weight(make_recognizer, pages):
    recognizer = make_recognizer(tied=False).train()
    for module in recognizer.encoder.modules():  # timm starts residual branches at zero
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)
    recognizer(pages, torch.randint(4, 20, (6, 10))).square().mean().backward()
    without = [n for n, p in recognizer.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_a_frozen_encoder_gets_no_gradient_and_the_rest_does(make_recognizer, pages):
    recognizer = make_recognizer(freeze=True).train()
    recognizer(pages, torch.randint(4, 20, (6, 10))).square().mean().backward()
    assert all(p.grad is None for p in recognizer.encoder.parameters())
    assert recognizer.project.weight.grad.any()


@torch.no_grad()
def test_bfloat16_is_close_to_float32(make_recognizer, pages):
    recognizer = make_recognizer()
    tokens = torch.randint(4, 20, (6, 10))
    exact = recognizer(pages, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        rough = recognizer(pages, tokens)
        readings = recognizer.read(pages, decoding=Greedy(), max_length=10)
    error = (rough.float() - exact).norm() / exact.norm()
    assert 1e-5 < float(error) < 2e-2
    assert len(readings) == len(pages)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_go_through_a_file_and_come_back(make_recognizer, pages, tmp_path, tied):
    from safetensors.torch import load_file, save_file

    recognizer, other = make_recognizer(seed=1, tied=tied), make_recognizer(seed=2, tied=tied)
    save_file(recognizer.weights(), tmp_path / "weights.safetensors")
    other.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    tokens = torch.randint(4, 20, (6, 10))
    assert torch.equal(recognizer(pages, tokens), other(pages, tokens))
