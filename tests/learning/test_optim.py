import copy

import pytest
import torch
from torch import nn

from paragraph_ocr.errors import UserError
from paragraph_ocr.learning.optim import BatchedMuon, build_optimizer, build_schedule, orthogonalise


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3))


def fit(optimizer, net, steps):
    inputs, targets = torch.arange(6), torch.arange(6) % 3
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(inputs), targets)
        loss.backward()
        optimizer.step()
    return float(loss.detach())


@pytest.mark.parametrize(
    ("name", "lr"), [("adamw", 1e-2), ("adam", 1e-2), ("sgd", 0.5), ("muon", 1e-2)]
)
def test_every_optimizer_learns_and_resumes_with_the_same_bits(name, lr):
    net = network()
    optimizer = build_optimizer(net, name=name, lr=lr, weight_decay=0.1, extra={})
    assert fit(optimizer, net, 60) < 0.3
    other = network()
    resumed = build_optimizer(other, name=name, lr=lr, weight_decay=0.1, extra={})
    other.load_state_dict(net.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    fit(optimizer, net, 3)
    fit(resumed, other, 3)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd"])
def test_biases_norms_and_embeddings_never_decay(name):
    net = network()
    optimizer = build_optimizer(net, name=name, lr=0.1, weight_decay=0.5, extra={})
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    assert decayed == {id(net[1].weight), id(net[3].weight)}


@pytest.mark.parametrize("rule", [None, "match_rms_adamw", "spectral_unclamped"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_batched_muon_takes_the_steps_of_torchs_own(rule, nesterov):
    torch.manual_seed(0)
    shapes = [(8, 8), (16, 8), (8, 16), (8, 8), (24, 8)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    settings = {"lr": 0.1, "weight_decay": 0.2, "nesterov": nesterov, "adjust_lr_fn": rule}
    batched, own = BatchedMuon(ours, **settings), torch.optim.Muon(theirs, **settings)
    for _ in range(3):
        before = [p.detach().clone() for p in theirs]
        for a, b in zip(ours, theirs, strict=True):
            a.data.copy_(b)
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        batched.step()
        own.step()
        for a, b, start in zip(ours, theirs, before, strict=True):
            # torch rounds to bfloat16 on a CPU too
            assert (a - b).norm() < 0.08 * (b - start).norm()


def test_muon_takes_filters_as_the_rows_of_a_matrix():
    torch.manual_seed(0)
    convolution, linear = nn.Conv2d(3, 8, 3, bias=False), nn.Linear(27, 8, bias=False)
    linear.weight.data = convolution.weight.data.flatten(1).clone()
    convolution.weight.data = convolution.weight.data.to(memory_format=torch.channels_last)
    settings = {"lr": 0.1, "weight_decay": 0.2}
    extra = {"adjust_lr_fn": "match_rms_adamw", "filters": True}
    other = nn.Linear(4, 4, bias=False)  # torch's Muon wants a matrix
    ours = build_optimizer(
        nn.ModuleList([convolution, other]), name="muon", **settings, extra=extra
    )
    theirs = build_optimizer(linear, name="muon", **settings, extra=extra)
    for _ in range(3):
        convolution.weight.grad = torch.randn_like(convolution.weight)
        linear.weight.grad = convolution.weight.grad.flatten(1).clone()
        ours.step()
        theirs.step()
        assert torch.allclose(convolution.weight.flatten(1), linear.weight, atol=1e-5)


def test_filters_are_left_to_adamw_where_that_is_asked_for():
    steps = []
    for name, more in [("muon", {"filters": False}), ("adamw", {})]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4, 2))
        optimizer = build_optimizer(net, name=name, lr=0.1, weight_decay=0.1, extra=more)
        net(torch.ones(2, 1, 3, 3)).square().sum().backward()
        optimizer.step()
        steps.append(net[0].weight.detach())
    assert torch.allclose(*steps)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU records")
def test_recorded_muon_takes_the_steps_of_the_plain_one():
    nets, optimizers = [], []
    for recorded in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(72, 16), nn.Linear(16, 16))
        nets.append(net.cuda())
        optimizers.append(
            build_optimizer(
                net, name="muon", lr=1e-2, weight_decay=0.1, extra={}, recorded=recorded
            )
        )
    for step in range(4):
        pages = torch.randn(4, 1, 5, 5, device="cuda")
        for net, optimizer in zip(nets, optimizers, strict=True):
            optimizer.zero_grad()
            net(pages).square().sum().backward()
            if step == 2:  # other shapes are recorded anew
                net[3].weight.grad = None
            optimizer.step()
    for plain, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(plain, other)


def test_orthogonalised_matrices_have_singular_values_near_one():
    matrices = torch.randn(3, 20, 12, generator=torch.Generator().manual_seed(0))
    found = orthogonalise(matrices, coefficients=(3.4445, -4.775, 2.0315), steps=8, eps=1e-7)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.5
    assert values.max() < 1.5


def test_an_argument_that_the_optimizer_lacks_is_named():
    with pytest.raises(UserError, match=r"optimizer\.extra.*colour"):
        build_optimizer(network(), name="adamw", lr=0.1, weight_decay=0.0, extra={"colour": 1})


@pytest.mark.parametrize(
    ("name", "warmup", "expected"),
    [
        ("constant", 0, {0: 1.0, 50: 1.0, 99: 1.0}),
        ("constant", 9, {0: 0.1, 4: 0.5, 9: 1.0, 99: 1.0}),
        ("cosine", 0, {0: 1.0, 50: 0.55, 100: 0.1}),
        ("one_cycle", 0, {0: 0.04, 29: 1.0}),
        ("warmup_stable_decay", 9, {0: 0.1, 9: 1.0, 72: 1.0, 86: 0.568, 100: 0.1}),
    ],
)
def test_schedules_pass_through_the_points_that_define_them(name, warmup, expected):
    net = network()
    optimizer = build_optimizer(net, name="sgd", lr=2.0, weight_decay=0.0, extra={})
    schedule = build_schedule(
        optimizer,
        name=name,
        total_steps=100,
        warmup_steps=warmup,
        decay_share=0.3,
        final_factor=0.1,
    )
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    rates.append(optimizer.param_groups[0]["lr"])
    for step, factor in expected.items():
        assert rates[step] == pytest.approx(2.0 * factor, rel=1e-2)


@pytest.mark.parametrize("name", ["cosine", "warmup_stable_decay"])
def test_a_schedule_comes_to_its_end_with_the_time(name):
    optimizer = build_optimizer(network(), name="sgd", lr=2.0, weight_decay=0.0, extra={})
    gone = 0.0
    schedule = build_schedule(
        optimizer, name=name, total_steps=None, warmup_steps=2, decay_share=0.5, final_factor=0.1,
        time_share=lambda: gone,
    )  # fmt: skip
    rates = {}
    for step in range(11):
        gone = step / 10
        optimizer.step()
        schedule.step()
        rates[step] = optimizer.param_groups[0]["lr"]
    assert rates[10] == pytest.approx(0.2)
    assert rates[5] == pytest.approx(1.1 if name == "cosine" else 2.0)
    assert [*rates.values()][1:] == sorted([*rates.values()][1:], reverse=True)
