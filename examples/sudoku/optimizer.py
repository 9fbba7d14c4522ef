"""Muon for the matrices, Adam for everything else, and an average of the weights: plain tensors in, plain state out.

Muon (Jordan et al. 2024) steps along the orthogonalised momentum: on a model of this size it needs about half of Adam's
steps. Expert stacks count as so many matrices. State is a dict of tensors, so that a checkpoint is one torch.save.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

Tensor = torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Learning rates and decay constants."""

    muon: float = 0.02
    adam: float = 0.003
    weight_decay: float = 0.01
    average: float = 0.998
    """Decay of the weight average that is evaluated and shipped."""


def by_muon(name: str, parameter: Tensor) -> bool:
    """Hidden matrices go to Muon; the embedding (also the head) and the router's few rows do not."""
    return parameter.ndim >= 2 and "embed_tokens" not in name and "router" not in name


def orthogonalise(x: Tensor) -> Tensor:
    """Bring the singular values of x [..., M, N] near one by five Newton–Schulz steps, in bfloat16."""
    y = x.bfloat16()
    tall = y.shape[-2] > y.shape[-1]
    y = y.mT if tall else y
    y = y / (y.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = y @ y.mT
        y = 3.4445 * y + (-4.775 * square + 2.0315 * (square @ square)) @ y
    return (y.mT if tall else y).float()


class Optimizer:
    """Both optimizers and the average. `state` may be saved, and given back to go on."""

    def __init__(self, parameters: dict[str, Tensor], rates: Rates, state: dict[str, Tensor] | None = None) -> None:
        self.rates = rates
        self.trained = {name: p for name, p in parameters.items() if p.requires_grad}
        self.state = state or {}
        if not self.state:
            for name, p in parameters.items():
                self.state[f"average.{name}"] = p.detach().clone()
            for name, p in self.trained.items():
                self.state[f"momentum.{name}"] = torch.zeros_like(p)
                if not by_muon(name, p):
                    self.state[f"square.{name}"] = torch.zeros_like(p)

    def average(self) -> dict[str, Tensor]:
        return {name.removeprefix("average."): t for name, t in self.state.items() if name.startswith("average.")}

    @torch.no_grad()
    def step(self, number: int, scale: float) -> None:
        """Apply the gradients: `number` counts from 1, `scale` multiplies both learning rates."""
        self._muon(self.rates.muon * scale)
        self._adam(self.rates.adam * scale, number)
        averages = [self.state[f"average.{name}"] for name in self.trained]
        keep = min(self.rates.average, number / (number + 10))
        torch._foreach_lerp_(averages, list(self.trained.values()), 1 - keep)
        for p in self.trained.values():
            p.grad = None

    def _muon(self, rate: float) -> None:
        groups: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
        for name, p in self.trained.items():
            if by_muon(name, p) and p.grad is not None:
                momentum = self.state[f"momentum.{name}"].mul_(0.95).add_(p.grad)
                update = p.grad + 0.95 * momentum
                groups.setdefault(p.shape[-2:], []).append((p, update.view(-1, *p.shape[-2:])))
        for (rows, columns), members in groups.items():
            directions = orthogonalise(torch.cat([update for _, update in members]))
            size = max(1.0, rows / columns) ** 0.5
            at = 0
            for p, update in members:
                p.mul_(1 - rate * self.rates.weight_decay)
                p.add_(directions[at : at + len(update)].view_as(p), alpha=-rate * size)
                at += len(update)

    def _adam(self, rate: float, number: int) -> None:
        names = [name for name, p in self.trained.items() if not by_muon(name, p) and p.grad is not None]
        parameters = [self.trained[name] for name in names]
        gradients = [p.grad for p in parameters]
        norm = torch.stack([g.norm() for g in gradients]).norm()
        torch._foreach_mul_(gradients, float((1.0 / (norm + 1e-6)).clamp(max=1.0)))
        means, squares = ([self.state[f"{kind}.{name}"] for name in names] for kind in ("momentum", "square"))
        torch._foreach_lerp_(means, gradients, 0.1)
        torch._foreach_mul_(squares, 0.98)
        torch._foreach_addcmul_(squares, gradients, gradients, 0.02)
        bottom = torch._foreach_sqrt(torch._foreach_div(squares, 1 - 0.98**number))
        torch._foreach_add_(bottom, 1e-9)
        torch._foreach_addcdiv_(parameters, means, bottom, -rate / (1 - 0.9**number))
