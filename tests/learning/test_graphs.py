"""Recorded training steps: what can be seen without a GPU, and with one that the numbers are the same."""

import pytest
import torch

from paragraph_ocr.learning.graphs import PADDED_LENGTH, RecordedLoss

needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def make_loss(module):
    def loss(images, tokens, sizes, letters=None):
        cost = module(images.float().flatten(1)).square().sum(dim=1) * (tokens != 3).sum(dim=1)
        if letters is not None:
            cost = cost * letters.nan_to_num().sum(dim=(1, 2))
        return cost.sum(), (tokens != 3).sum()

    return loss


def test_without_a_gpu_the_loss_is_computed_as_it_stands():
    module, seen = torch.nn.Linear(4, 2), []
    loss = make_loss(module)

    def watched(*batch):
        seen.append(batch)
        return loss(*batch)

    recorded = RecordedLoss(watched, module, pad=3, longest=100)
    batch = (
        torch.ones(2, 1, 2, 2, dtype=torch.uint8),
        torch.ones(2, 5, dtype=torch.long),
        None,
        None,
    )
    for _ in range(3):
        assert torch.equal(recorded(*batch)[0], loss(*batch)[0])
    assert all(one is other for one, other in zip(seen[-1], batch, strict=True))


@needs_a_gpu
def test_replayed_steps_have_the_gradients_of_plain_ones():
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Linear(16, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2)
    ).cuda()
    loss = make_loss(module)
    recorded = RecordedLoss(loss, module, pad=3, longest=1000)
    for step in range(8):
        images = torch.randint(0, 255, (4, 1, 4, 4), dtype=torch.uint8, device="cuda")
        tokens = torch.randint(4, 9, (4, 20 + step), device="cuda")
        kept = {name: buffer.clone() for name, buffer in module.named_buffers()}
        letters = torch.rand(4, 20 + step, 2, device="cuda") if step % 2 else None
        plain, count = loss(images, tokens, None, letters)
        expected = torch.autograd.grad(plain, list(module.parameters()))
        statistics = {name: buffer.clone() for name, buffer in module.named_buffers()}
        for name, buffer in module.named_buffers():
            buffer.copy_(kept[name])
        found, found_count = recorded(images, tokens, None, letters)
        gradients = torch.autograd.grad(found, list(module.parameters()))
        assert torch.allclose(found, plain) and found_count == count
        for one, other in zip(gradients, expected, strict=True):
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-3)
        for name, buffer in module.named_buffers():
            assert torch.allclose(buffer.float(), statistics[name].float()), name
    # lengths up to a multiple share a recording; with letters it is another
    assert len(recorded._recordings) == 2


@needs_a_gpu
def test_random_numbers_go_on_from_step_to_step():
    module = torch.nn.Linear(16, 2).cuda()

    def loss(images, tokens, sizes, letters):
        return (module(images.float().flatten(1)).sum() * torch.rand((), device="cuda")), (
            tokens > 3
        ).sum()

    recorded = RecordedLoss(loss, module, pad=3, longest=1000)
    images = torch.ones(4, 1, 4, 4, dtype=torch.uint8, device="cuda")
    tokens = torch.full((4, PADDED_LENGTH), 5, device="cuda")

    def losses():
        torch.cuda.manual_seed(1)
        return [float(recorded(images, tokens, None)[0]) for _ in range(5)]

    first = losses()  # plain, recorded, replayed
    again = losses()
    assert len(set(again)) == 5
    assert again == losses()
    assert first[1:] == pytest.approx(first[1:])


@needs_a_gpu
def test_the_first_step_has_the_bits_of_replayed_ones():
    from torchvision.models import resnet18

    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    module = torch.nn.Sequential(resnet18(num_classes=4), torch.nn.Dropout(0.5)).cuda()

    def loss(images, tokens, sizes, letters):
        pages = images.float().expand(-1, 3, -1, -1) / 255
        cost = module(pages + 0.1 * torch.randn_like(pages)).square().sum()
        return cost, (tokens != 3).sum()

    recorded = RecordedLoss(loss, module, pad=3, longest=100)
    images = torch.randint(0, 255, (4, 1, 64, 64), dtype=torch.uint8, device="cuda")
    tokens = torch.randint(4, 9, (4, 20), device="cuda")
    buffers = [buffer.clone() for buffer in module.buffers()]
    found = []
    try:
        for _ in range(3):
            torch.cuda.manual_seed(1)
            for buffer, kept in zip(module.buffers(), buffers, strict=True):
                buffer.copy_(kept)
            with torch.autocast("cuda", torch.bfloat16):
                total, count = recorded(images, tokens, None)
            gradients = torch.autograd.grad(total / count, list(module.parameters()))
            found.append([total.detach(), *gradients, torch.cuda.get_rng_state()])
    finally:
        torch.use_deterministic_algorithms(False)
    for later in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], later, strict=True))


@needs_a_gpu
def test_a_step_that_cannot_be_recorded_is_refused_with_the_remedy():
    from paragraph_ocr.errors import UserError

    module = torch.nn.Linear(16, 2).cuda()

    def loss(images, tokens, sizes, letters):
        total = module(images.float().flatten(1)).sum()
        return total * float(total.item()), (tokens > 3).sum()

    recorded = RecordedLoss(loss, module, pad=3, longest=1000)
    batch = (
        torch.ones(4, 1, 4, 4, dtype=torch.uint8, device="cuda"),
        torch.ones(4, 5, device="cuda", dtype=torch.long),
        None,
    )
    recorded(*batch)
    with pytest.raises(UserError, match="trainer.cuda_graphs=false"):
        recorded(*batch)
    torch.cuda.manual_seed(1)
    first = torch.rand(3, device="cuda")
    torch.cuda.manual_seed(1)
    assert torch.equal(first, torch.rand(3, device="cuda")), "others in the process go on"


@needs_a_gpu
def test_a_recording_outlives_what_was_recorded_before_it():
    """Lightning frees cuBLAS's workspaces at the end of a training, and then all unused memory."""
    torch.manual_seed(0)
    modules = [torch.nn.Linear(1024, 1024, bias=False).cuda() for _ in range(2)]
    first, second = (
        RecordedLoss(make_loss(module), module, pad=3, longest=1000) for module in modules
    )
    images = torch.randint(0, 2, (64, 1, 32, 32), dtype=torch.uint8, device="cuda")
    tokens = torch.randint(4, 9, (64, 20), device="cuda")
    for recorded in (first, first, second, second):
        loss = recorded(images, tokens, None)[0]
    (expected,) = torch.autograd.grad(loss, modules[1].parameters())
    first.forget()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    (found,) = torch.autograd.grad(second(images, tokens, None)[0], modules[1].parameters())
    assert torch.equal(found, expected)
