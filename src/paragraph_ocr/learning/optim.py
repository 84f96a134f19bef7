"""Optimizers and schedules by name, with the parameters that should not decay left alone."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from paragraph_ocr.cuda_graph import Recorded
from paragraph_ocr.errors import UserError

_OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}


def build_optimizer(
    module: nn.Module,
    *,
    name: str,
    lr: float,
    weight_decay: float,
    extra: dict[str, Any],
    fused: bool = False,
    recorded: bool = False,
) -> torch.optim.Optimizer:
    """Return the optimizer over the parameters that want a gradient.

    Biases, norms and embeddings never decay: their size carries meaning, not complexity.

    Args:
        fused: one kernel for all parameters, unless `extra` says otherwise.
        recorded: what Muon launches hundreds of kernels for, as one CUDA graph.

    Raises:
        UserError: `extra` holds an argument that the optimizer does not take.
    """
    embeddings = {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Embedding)}
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    decay = [p for p in trained if p.ndim >= 2 and id(p) not in embeddings]
    plain = [p for p in trained if p.ndim < 2 or id(p) in embeddings]
    try:
        if name == "muon":
            return MuonWithAdamW(
                decay,
                plain,
                lr=lr,
                weight_decay=weight_decay,
                extra=extra,
                fused=fused,
                recorded=recorded,
            )
        groups: list[dict[str, Any]] = [
            {"params": decay, "weight_decay": weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        if fused and not {"fused", "foreach", "differentiable"} & extra.keys():
            extra = {**extra, "fused": True}
        return _OPTIMIZERS[name]([g for g in groups if g["params"]], lr=lr, **extra)
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(
            f"optimizer.extra={extra} does not suit optimizer={name}: {error}. "
            f"Pass only arguments of torch.optim.{name}."
        ) from error


class BatchedMuon(torch.optim.Muon):
    """torch's Muon with all matrices of one shape orthogonalised together, and with filters.

    A decoder has dozens of small ones, and one at a time they keep a GPU waiting for its CPU. On a
    CPU they are computed in float32, where bfloat16 is slower. A convolution's filters "out in h w" are
    the rows of a matrix; torch takes them in groups that are added.

    Args:
        recorded: orthogonalise as one CUDA graph.
    """

    def __init__(self, *args: Any, recorded: bool = False, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._orthogonalised = Recorded(self._orthogonalise) if recorded else self._orthogonalise

    @torch.no_grad()
    def step(self, closure=None):  # type: ignore[override]
        assert closure is None, "MuonWithAdamW has called it"
        parts: list[_OfOneShape] = []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            by_shape: dict[torch.Size, _OfOneShape] = {}
            for p, update in zip(params, self._updates(group, params), strict=True):
                part = by_shape.setdefault(p.shape, _OfOneShape(group, [], []))
                part.params.append(p)
                part.updates.append(update.flatten(1))
            parts += by_shape.values()
        if not parts:
            return
        directions = self._orthogonalised([torch.stack(part.updates) for part in parts])
        for part, found in zip(parts, directions, strict=True):
            rate = part.group["lr"] * _share_of_rate(found.shape[1:], part.group["adjust_lr_fn"])
            steps = found.unflatten(2, part.params[0].shape[1:]).unbind()
            torch._foreach_add_(part.params, list(steps), alpha=-rate)

    def _updates(self, group: dict[str, Any], params: list[nn.Parameter]) -> Sequence[Tensor]:
        """Return the parameters' momentum, the newest gradients in it."""
        grads = [p.grad for p in params if p.grad is not None]
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        if not group["nesterov"]:
            return buffers
        return torch._foreach_lerp(grads, buffers, group["momentum"])

    def _orthogonalise(self, stacks: Sequence[Float[Tensor, "_ _ _"]]) -> list[Tensor]:
        group = self.param_groups[0]
        return [
            orthogonalise(
                stacked,
                coefficients=group["ns_coefficients"],
                steps=group["ns_steps"],
                eps=group["eps"],
            ).to(stacked.dtype)
            for stacked in stacks
        ]


class _OfOneShape(NamedTuple):
    group: dict[str, Any]
    params: list[Tensor]
    updates: list[Tensor]


def orthogonalise(
    matrices: Float[Tensor, "N rows columns"],
    *,
    coefficients: tuple[float, float, float],
    steps: int,
    eps: float,
) -> Float[Tensor, "N rows columns"]:
    """Return each matrix with its singular values brought near 1 (0.5 to 1.5).

    The quintic Newton-Schulz iteration of Jordan et al. 2024, in bfloat16 on a GPU.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    found = matrices.mT if tall else matrices
    found = found.bfloat16() if matrices.is_cuda else found.float()
    found = found / found.flatten(1).norm(dim=1).clamp(min=eps)[:, None, None]
    a, b, c = coefficients
    for _ in range(steps):
        gram = found @ found.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        found = torch.baddbmm(found, gram, found, beta=a)
    return found.mT if tall else found


def _share_of_rate(shape: torch.Size, rule: str | None) -> float:
    """Return the factor by which a matrix's shape changes its rate, as torch.optim.Muon names them."""
    rows, columns = shape
    if rule in (None, "original"):
        return math.sqrt(max(1.0, rows / columns))
    if rule == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(rows / columns)  # spectral_unclamped


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for matrices and filters, AdamW for everything else, as one.

    The two inner optimizers work on this one's parameter groups and state, so schedules,
    gradient scaling and checkpoints see a single optimizer.

    Args:
        extra: arguments of torch.optim.Muon; and `filters`, false to leave convolutions to AdamW.
    """

    def __init__(
        self,
        decay: list[nn.Parameter],
        plain: list[nn.Parameter],
        *,
        lr: float,
        weight_decay: float,
        extra: dict[str, Any],
        fused: bool = False,
        recorded: bool = False,
    ) -> None:
        extra = dict(extra)
        dimensions = {2, 4} if extra.pop("filters", True) else {2}
        matrices = [p for p in decay if p.ndim == 2]
        filters = [p for p in decay if p.ndim in dimensions - {2}]
        rest = [p for p in decay if p.ndim not in dimensions]
        self._muon = BatchedMuon(
            matrices, lr=lr, weight_decay=weight_decay, recorded=recorded, **extra
        )
        if filters:
            self._muon.add_param_group({"params": filters})
        others: list[dict[str, Any]] = [{"params": rest}, {"params": plain, "weight_decay": 0.0}]
        # None, not False: torch's own default is a middle way
        self._adamw = torch.optim.AdamW(
            others, lr=lr, weight_decay=weight_decay, fused=fused or None
        )
        super().__init__([{"params": [*decay, *plain]}], {"lr": lr})
        self.param_groups = [*self._muon.param_groups, *self._adamw.param_groups]
        self._share()

    def _share(self) -> None:
        count = len(self._muon.param_groups)
        self._muon.param_groups = self.param_groups[:count]
        self._adamw.param_groups = self.param_groups[count:]
        self._muon.state = self._adamw.state = self.state

    @torch.no_grad()
    def step(self, closure=None):  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._muon.step()
        self._adamw.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()


def build_schedule(
    optimizer: torch.optim.Optimizer,
    *,
    name: str,
    total_steps: int | None,
    warmup_steps: int,
    decay_share: float,
    final_factor: float,
    time_share: Callable[[], float] | None = None,
) -> LRScheduler:
    """Return the schedule, to be stepped after each optimizer step; its peak is the optimizer's rate.

    warmup_stable_decay keeps the peak until the last `decay_share` (Hu et al. 2024), which is half a cosine,
    as is the whole of cosine. one_cycle rises from a 25th of the peak (Smith & Topin 2018, torch's
    defaults) and so takes no warm-up of its own.

    Args:
        total_steps: None if the steps have no limit; one_cycle needs one.
        time_share: returns the share of the training's time that is gone, if that has a limit; the
            schedule is as far as the steps or the time, whichever is further.
    """
    if name == "one_cycle":
        assert total_steps is not None
        peaks = [group["lr"] for group in optimizer.param_groups]
        # cycling Adam's momentum too would override optimizer.extra
        return OneCycleLR(
            optimizer,
            peaks,
            total_steps=max(total_steps, 2),
            cycle_momentum=False,
            final_div_factor=1 / (25 * max(final_factor, 1e-12)),
        )

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        if name == "constant":
            return 1.0
        done = 0.0
        if total_steps is not None:
            done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        if time_share is not None:
            done = max(done, time_share())
        decay = decay_share if name == "warmup_stable_decay" else 1.0
        decayed = min(1.0, max(0.0, 1 - (1 - done) / decay) if decay else float(done >= 1))
        return final_factor + (1 - final_factor) * 0.5 * (1 + math.cos(math.pi * decayed))

    return LambdaLR(optimizer, factor)
