"""Reading by clusters of a GPU's blocks; without a GPU: that the kernel compiles, and what it is given."""

import copy
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("cuda.bindings")

from omegaconf import OmegaConf
from torch import nn

from paragraph_ocr.model import cluster_steps
from paragraph_ocr.model.cluster_steps import Sizes
from paragraph_ocr.model.decoder import Decoder
from paragraph_ocr.model.generate import Greedy, SpecialTokens, generate, read_greedily_by_cache

START, END, PAD = 1, 2, 3
DECODERS = Path(__file__).parents[2] / "conf" / "model" / "decoder"

on_a_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 9,
    reason="clusters are read with on a Hopper GPU",
)


def make_decoder(
    *, norm="pre", tied=False, width=64, heads=4, depth=2, feed_forward=128, noise=0.1
):
    torch.manual_seed(0)
    decoder = Decoder(
        num_tokens=37,
        depth=depth,
        width=width,
        heads=heads,
        feed_forward=feed_forward,
        dropout=0.3,  # must not be seen
        norm=norm,
        tied=tied,
        max_length=60,
    )
    for parameter in decoder.parameters():
        parameter.data += noise * torch.randn_like(parameter)
    return decoder.eval()


REFERENCE = {"width": 256, "depth": 4, "feed_forward": 1024}


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_the_kernel_compiles_for_a_gpu_that_is_not_here(half, norm, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    sizes = Sizes.of(make_decoder(norm=norm, **REFERENCE), half=half, cluster=16)
    assert cluster_steps.can_be_shared(sizes)
    assert (sizes.staged_bytes > 0) == half, "float32 weights are too large to be staged"
    code = cluster_steps.compiled(sizes, "sm_90")
    assert code.startswith(b"\x7fELF")
    (kept,) = tmp_path.rglob("*.cubin")
    assert kept.read_bytes() == code
    kept.write_bytes(b"what was kept")
    assert cluster_steps.compiled(sizes, "sm_90") == b"what was kept"


def test_a_source_that_does_not_compile_says_where(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    broken = tmp_path / "broken.cu"
    broken.write_text("int missing_semicolon = 1")
    monkeypatch.setattr(cluster_steps, "_SOURCE", broken)
    with pytest.raises(RuntimeError, match=r"broken\.cu\(1\): error"):
        cluster_steps.compiled(Sizes.of(make_decoder(), half=True, cluster=16), "sm_90")


@pytest.mark.parametrize(
    ("changed", "cluster", "can"),
    [
        ({}, 16, True),
        ({"width": 384, "heads": 6, "feed_forward": 1536}, 12, True),
        ({"width": 96}, 16, False),  # 6 columns of the stream a block: no fours
        ({"feed_forward": 100}, 16, False),
        ({"width": 1024, "feed_forward": 1024}, 16, False),  # 64 columns: a warp has 32 lanes
        ({"width": 256, "depth": 40, "feed_forward": 1024}, 16, False),  # biases of all layers
    ],
)
def test_sizes_that_cannot_be_shared_out_are_left_to_others(changed, cluster, can):
    sizes = Sizes.of(make_decoder(**changed), half=True, cluster=cluster)
    assert cluster_steps.can_be_shared(sizes) == can


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("path", sorted(DECODERS.glob("*.yaml")), ids=lambda path: path.stem)
def test_decoders_of_all_configs_can_be_shared_out(path, half):
    config = OmegaConf.load(path)
    names = ("norm", "tied", "width", "heads", "depth", "feed_forward")
    decoder = make_decoder(**{name: config[name] for name in names})
    cluster = cluster_steps.cluster_sizes(config.heads)[0]
    assert cluster_steps.can_be_shared(Sizes.of(decoder, half=half, cluster=cluster))


def test_clusters_have_as_many_blocks_as_heads_can_be_cut_into():
    assert cluster_steps.cluster_sizes(4) == [16, 8, 4]
    assert cluster_steps.cluster_sizes(6) == [12, 6]
    assert cluster_steps.cluster_sizes(17) == []


@torch.no_grad()
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_packed_weights_do_to_normalised_inputs_what_the_layers_do(norm):
    decoder = make_decoder(norm=norm, tied=norm == "pre")
    sizes, layers = Sizes.of(decoder, half=False, cluster=16), list(decoder.layers)
    width, head = sizes.width, sizes.head
    inward, biases, outward, shifts, norms = cluster_steps._packed(decoder, layers, sizes)
    inputs = nn.functional.layer_norm(torch.randn(width), (width,))
    before = [one for layer in layers for one in layer.norms]
    before = before if norm == "pre" else [nn.Identity(), *before[:-1]]
    row = place = 0

    def seen(rows):
        nonlocal row
        row += rows
        return inward[row - rows : row] @ inputs + biases[row - rows : row]

    for index, layer in enumerate(layers):
        own, cross = layer.self_attention, layer.cross_attention
        normal = [one(inputs) for one in before[3 * index : 3 * index + 3]]
        parts = torch.cat([own.query(normal[0]), own.key_value(normal[0])]).view(3, -1, head)
        for its in range(sizes.heads):
            assert torch.allclose(seen(3 * head), parts[:, its].flatten(), atol=1e-5)
        assert torch.allclose(seen(width), cross.query(normal[1]), atol=1e-5)
        assert torch.allclose(seen(sizes.hidden), layer.expand(normal[2]), atol=1e-5)
        for sublayer, (linear, shares) in enumerate(
            [(own.out, sizes.heads), (cross.out, sizes.heads), (layer.contract, sizes.cluster)]
        ):
            numbers = torch.randn(linear.in_features)
            total = shifts[(3 * index + sublayer) * width :][:width].clone()
            for share in numbers.view(shares, -1):
                total += outward[place : place + width * len(share)].view(width, -1) @ share
                place += width * len(share)
            assert torch.allclose(total, linear(numbers), atol=1e-5)
        for sublayer, one in enumerate(before[3 * index : 3 * index + 3]):
            gain, shift = norms[(3 * index + sublayer) * 2 * width :][: 2 * width].view(2, width)
            assert torch.allclose(gain * inputs + shift, one(inputs), atol=1e-5)
    assert torch.allclose(
        seen(sizes.tokens),
        decoder.logits(inputs) if norm == "pre" else decoder.logits(layers[-1].norms[2](inputs)),
        atol=1e-5,
    )
    assert row == len(inward) and place == len(outward)


SHAPES = [
    {},
    {"width": 128, "heads": 2, "depth": 1},
    REFERENCE,
    {"width": 384, "heads": 6, "feed_forward": 1536},
]
CASES = [
    pytest.mark.parametrize("shape", SHAPES),
    pytest.mark.parametrize(("norm", "masked"), [("pre", True), ("post", False)]),
]


def in_all_cases(test):
    for case in CASES:
        test = case(test)
    return torch.no_grad()(test)


def pages_and_texts(norm, masked, shape):
    """Return a decoder, memory and mask of eleven pages (more than are read at once), the texts, and an end.

    The end is the token at which they end at the most different lengths.
    """
    decoder = make_decoder(norm=norm, tied=masked, noise=0.25 if norm == "pre" else 0.15, **shape)
    memory, mask = torch.randn(11, 50, decoder.width), None
    if masked:
        seen = torch.randint(1, 51, (11, 1))
        mask = torch.arange(50) < seen
    arguments = {"start": START, "end": None, "pad": PAD, "max_length": 60}
    texts = read_greedily_by_cache(decoder, memory, mask, **arguments)[0].tolist()
    lengths = {end: {text.index(end) for text in texts if end in text} for end in range(37)}
    end = max(lengths, key=lambda end: len(lengths[end]))
    return decoder, memory, mask, arguments, end, len(lengths[end])


@in_all_cases
def test_the_cases_read_on_a_gpu_end_at_different_lengths(norm, masked, shape):
    assert pages_and_texts(norm, masked, shape)[-1] > 1


@on_a_gpu
@in_all_cases
def test_tokens_and_scores_are_those_of_the_cached_step(norm, masked, shape):
    decoder, memory, mask, arguments, end, _ = pages_and_texts(norm, masked, shape)
    decoder, memory = decoder.cuda(), memory.cuda()
    precise = copy.deepcopy(decoder).double()
    mask = None if mask is None else mask.cuda()
    for ended_by in (None, end):
        arguments["end"] = ended_by
        expected, expected_scores = read_greedily_by_cache(decoder, memory, mask, **arguments)
        _, exact = read_greedily_by_cache(precise, memory.double(), mask, **arguments)
        written, scores = cluster_steps.read_greedily(decoder, memory, mask, **arguments)
        assert written.tolist() == expected.tolist()
        # post-norm with such weights amplifies float32's own rounding, so that is the measure
        rounding = (expected_scores - exact).abs().max()
        assert (scores - exact).abs().max() <= 1e-4 + 5 * rounding


@on_a_gpu
@torch.no_grad()
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_in_bfloat16_the_first_scores_stay_near_those_of_float32(norm):
    decoder = make_decoder(norm=norm, **REFERENCE).cuda()
    for parameter in decoder.parameters():
        parameter.data = 0.5 * parameter
    memory = torch.randn(4, 100, decoder.width, device="cuda")
    arguments = {"start": START, "end": None, "pad": PAD, "max_length": 60}
    expected, expected_scores = read_greedily_by_cache(decoder, memory, None, **arguments)
    with torch.autocast("cuda", torch.bfloat16):
        assert cluster_steps.serves(decoder, memory)
        written, scores = cluster_steps.read_greedily(decoder, memory, None, **arguments)
    assert torch.allclose(scores[:, 0], expected_scores[:, 0], atol=0.05)
    assert (written == expected).float().mean() > 0.5


@on_a_gpu
@torch.no_grad()
def test_many_pages_are_read_step_by_step_and_odd_sizes_not_at_all():
    decoder = make_decoder(**REFERENCE).cuda()
    memory = torch.randn(64, 9, decoder.width, device="cuda")
    odd = make_decoder(width=60, heads=3).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        assert cluster_steps.serves(decoder, memory[:4])
        assert not cluster_steps.serves(decoder, memory)
        assert not cluster_steps.serves(odd, torch.randn(1, 9, 60, device="cuda"))
    special = SpecialTokens(start=START, end=END, pad=PAD)
    with pytest.raises(ValueError, match="cannot be read with"):
        cluster_steps.read_greedily(
            odd, torch.randn(1, 9, 60, device="cuda"), None, start=1, end=2, pad=3, max_length=4
        )
    readings = generate(
        decoder, memory[:2], None, special=special, decoding=Greedy(), max_length=20
    )
    assert len(readings) == 2 and all(len(reading.tokens) <= 19 for reading in readings)
