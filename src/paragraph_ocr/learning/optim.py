"""Optimizers and schedules by name, with the parameters that should not decay left alone."""

import math
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from paragraph_ocr.errors import UserError

_OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}


def build_optimizer(
    module: nn.Module, *, name: str, lr: float, weight_decay: float, extra: dict[str, Any]
) -> torch.optim.Optimizer:
    """Return the optimizer over the parameters that want a gradient.

    Biases, norms and embeddings never decay: their size carries meaning, not complexity.

    Raises:
        UserError: `extra` holds an argument that the optimizer does not take.
    """
    embeddings = {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Embedding)}
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    decay = [p for p in trained if p.ndim >= 2 and id(p) not in embeddings]
    plain = [p for p in trained if p.ndim < 2 or id(p) in embeddings]
    try:
        if name == "muon":
            hidden = [p for p in decay if p.ndim == 2]
            rest = [p for p in decay if p.ndim != 2]
            return MuonWithAdamW(hidden, rest, plain, lr=lr, weight_decay=weight_decay, extra=extra)
        groups: list[dict[str, Any]] = [
            {"params": decay, "weight_decay": weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        return _OPTIMIZERS[name]([g for g in groups if g["params"]], lr=lr, **extra)
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(
            f"optimizer.extra={extra} does not suit optimizer={name}: {error}. "
            f"Pass only arguments of torch.optim.{name}."
        ) from error


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for the hidden matrices, AdamW for everything else, as one.

    The two inner optimizers work on this one's parameter groups and state, so schedules,
    gradient scaling and checkpoints see a single optimizer.
    """

    def __init__(
        self,
        hidden: list[nn.Parameter],
        rest: list[nn.Parameter],
        plain: list[nn.Parameter],
        *,
        lr: float,
        weight_decay: float,
        extra: dict[str, Any],
    ) -> None:
        self._muon = torch.optim.Muon(hidden, lr=lr, weight_decay=weight_decay, **extra)
        others: list[dict[str, Any]] = [{"params": rest}, {"params": plain, "weight_decay": 0.0}]
        self._adamw = torch.optim.AdamW(others, lr=lr, weight_decay=weight_decay)
        super().__init__([{"params": [*hidden, *rest, *plain]}], {"lr": lr})
        self.param_groups = [*self._muon.param_groups, *self._adamw.param_groups]
        self._share()

    def _share(self) -> None:
        self._muon.param_groups, self._adamw.param_groups = (
            self.param_groups[:1],
            self.param_groups[1:],
        )
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
    total_steps: int,
    warmup_steps: int,
    final_factor: float,
) -> LRScheduler:
    """Return the schedule, to be stepped after each optimizer step; its peak is the optimizer's rate.

    one_cycle rises from a 25th of the peak (Smith & Topin 2018, torch's defaults) and so takes no
    warm-up of its own.
    """
    if name == "one_cycle":
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
        done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return final_factor + (1 - final_factor) * 0.5 * (1 + math.cos(math.pi * done))

    return LambdaLR(optimizer, factor)
