import pytest
import torch
import torch.nn.functional as F

from paragraph_ocr.model.generate import Greedy

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


@pytest.mark.parametrize("vary", [False, True])
def test_compiled_it_gives_the_same_logits_on_every_canvas(
    make_recognizer, pages, monkeypatch, vary
):
    compile, compiled_with = torch.compile, []

    def trace(function, **options):  # and leave out what takes minutes
        compiled_with.append((function, options))
        return compile(function, **options, backend="eager")

    monkeypatch.setattr(torch, "compile", trace)
    recognizer = make_recognizer()
    compiled = recognizer.compiled(canvases_vary=vary)
    for canvas in (pages, F.pad(pages, (0, 32, 0, 32))):
        for length in (10, 6):
            tokens = torch.randint(4, 20, (6, length))
            torch.testing.assert_close(compiled(canvas, tokens), recognizer(canvas, tokens))
    # where lengths vary on each of many canvases, the decoder's work is left out
    whole, part = (recognizer.forward, {}), (recognizer.encode, {"dynamic": False})
    assert compiled_with == [part if vary else whole]


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
