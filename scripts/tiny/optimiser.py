"""Muon for the inner matrices, AdamW for everything else."""

from typing import Any

import torch
from torch import Tensor, nn

from tiny.network import TinyKimiVL

INNER = ("blocks", "layers", "linear_1", "linear_2")


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal by Newton-Schulz steps (Keller Jordan, 2024), matrices of one shape together."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": 0.95, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Applies one update."""
        (group,) = self.param_groups
        shapes: dict[torch.Size, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            shapes.setdefault(_matrices(parameter).shape[1:], []).append(parameter)
        for (rows, columns), parameters in shapes.items():
            gradients = torch.cat([_matrices(parameter, parameter.grad) for parameter in parameters])
            state = self.state[parameters[0]]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(gradients)
            state["momentum"].lerp_(gradients, 1 - group["momentum"])
            updates = orthogonal(gradients.lerp(state["momentum"], group["momentum"]))
            scale = group["lr"] * max(1, rows / columns) ** 0.5
            sizes = [len(_matrices(parameter)) for parameter in parameters]
            for parameter, update in zip(parameters, updates.split(sizes), strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                _matrices(parameter).add_(update, alpha=-scale)


def orthogonal(matrices: Tensor) -> Tensor:
    """Nearly the orthogonal factor of each matrix [n, rows, columns], by five quintic Newton-Schulz steps."""
    x = matrices.to(torch.bfloat16) if matrices.is_cuda else matrices
    if tall := x.shape[1] > x.shape[2]:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if tall else x


def _matrices(parameter: Tensor, values: Tensor | None = None) -> Tensor:
    """[n, rows, columns] view: experts apart, and q, k and v of a fused projection apart."""
    values = parameter.data if values is None else values
    if parameter.dim() == 3:
        return values
    if parameter.shape[0] == 3 * parameter.shape[1]:
        return values.view(3, -1, parameter.shape[1])
    return values[None]


def optimisers(model: TinyKimiVL, on_cpu: bool) -> list[torch.optim.Optimizer]:
    """Both optimisers; on a CPU AdamW alone, for Muon's products take seconds there."""
    inner: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_inner = parameter.dim() > 1 and name.split(".")[0] in INNER and not name.endswith("mlp.gate.weight")
        (inner if is_inner and not on_cpu else others).append(parameter)
    adam = torch.optim.AdamW(others, lr=0.003, betas=(0.9, 0.95), weight_decay=0.0, fused=not on_cpu)
    return [adam] if on_cpu else [adam, Muon(inner, lr=0.02, weight_decay=0.1)]
