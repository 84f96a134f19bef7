"""Weights as bytes: small, near enough, and never mistaken."""

import pytest
import torch

from paragraph_ocr.quantised import quantise, restore


def test_rows_come_back_to_half_a_step_and_small_tensors_as_they_were():
    torch.manual_seed(0)
    weights = {
        "matrix": torch.randn(40, 64) * torch.logspace(-4, 2, 40)[:, None],
        "convolution": torch.randn(32, 16, 3, 3).to(memory_format=torch.channels_last),
        "bias": torch.randn(2000),
        "few": torch.randn(4, 4),
        "nothing": torch.zeros(40, 40),
        "count": torch.tensor(3),
        "half": torch.randn(40, 64).half(),
    }
    packed = quantise(weights)
    assert {packed[n].dtype for n in ("matrix", "convolution", "nothing", "half")} == {torch.int8}
    found = restore(packed)
    assert found.keys() == weights.keys()
    for name, tensor in weights.items():
        assert found[name].shape == tensor.shape
        if name in ("bias", "few", "count"):
            assert torch.equal(found[name], tensor)
            continue
        step = tensor.float().flatten(1).abs().amax(dim=1) / 127
        apart = (found[name] - tensor.float()).flatten(1).abs().amax(dim=1)
        assert (apart <= 0.5001 * step + 1e-3 * step).all(), name


def test_what_is_not_packed_is_left_alone():
    weights = {"a": torch.randn(50, 50), "b": torch.arange(4, dtype=torch.int8)}
    assert all(torch.equal(restore(weights)[name], weights[name]) for name in weights)


def test_a_scale_of_another_shape_is_refused():
    packed = quantise({"matrix": torch.randn(40, 64)})
    for rows in (1, 39):
        with pytest.raises(RuntimeError):
            restore({**packed, "matrix::scale": torch.ones(rows)})
