"""What the tests of all kernels share."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kimi_vl.engine.fast.kernels.operation import Operation
from kimi_vl.engine.fast.matrix import Matrix
from kimi_vl.engine.fast.weights import Attention, Mlp, dense

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16  # the interpreter cannot dot bfloat16
TYPES = [HALF] if DEVICE.type == "cuda" else [torch.float32, HALF]  # a GPU's float32 products are less exact
DTYPES = pytest.mark.parametrize("dtype", TYPES, ids=str)
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 8e-3}


def normal(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(DEVICE, dtype)


def gains(size: int, dtype: torch.dtype) -> Tensor:
    return (1 + torch.randn(size) / 4).to(DEVICE, dtype)


def poison(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def check(operation: Operation[Any], written: list[Tensor], *arguments: Any, tolerance: float) -> None:
    """Runs the reference and the kernel from the same state, poisoned outputs included, and compares them."""
    before = [tensor.clone() for tensor in written]
    operation.reference(*arguments)
    expected = [tensor.clone() for tensor in written]
    for tensor, saved in zip(written, before, strict=True):
        tensor.copy_(saved)
    operation.launch(*arguments)
    for tensor, wanted in zip(written, expected, strict=True):
        if not wanted.is_floating_point():
            assert tensor.tolist() == wanted.tolist()
        else:
            finite = wanted.isfinite()
            assert tensor[~finite].equal(wanted[~finite]), "not finite elsewhere"
            error = (tensor[finite].float() - wanted[finite].float()).norm() / wanted[finite].float().norm()
            assert error < tolerance, f"relative error {error:.1e}"


def matrix(*shape: int, bits: int = 16, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Matrix:
    return Matrix.of(normal(*shape, dtype=dtype, scale=scale)).quantised(bits)


def attention_weights(heads: int, dtype: torch.dtype, width: int = 40) -> Attention:
    nope, rope, value, latent = 32, 16, 64, 128
    return Attention(
        gain=gains(width, dtype),
        projections=matrix(heads * (nope + rope) + latent + rope, width, dtype=dtype),
        kv_gain=gains(latent, dtype),
        kv_b=normal(heads * (nope + value), latent, dtype=dtype, scale=0.2),
        out=matrix(width, heads * value, dtype=dtype),
        heads=heads,
        eps=1e-5,
        kv_eps=1e-6,
    )


def mlp_weights(
    width: int, inner: int, experts: int, chosen: int, shared: int, dtype: torch.dtype, bits: int = 16
) -> Mlp:
    gate_up = matrix(2 * shared, width, bits=bits, dtype=dtype, scale=0.2)
    layer = dense(gains(width, dtype), gate_up, matrix(width, shared, bits=bits, dtype=dtype), 1e-5)
    if not experts:
        return layer
    return replace(
        layer,
        router=normal(experts, width, dtype=dtype, scale=0.2),
        bias=normal(experts, scale=0.1),
        gate_up=matrix(experts, 2 * inner, width, bits=bits, dtype=dtype, scale=0.2),
        down=matrix(experts, width, inner, bits=bits, dtype=dtype),
        chosen=chosen,
        factor=2.446,
    )


def plain_attention(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, scale: float, **_: Any) -> tuple[Tensor, ...]:
    """What cuDNN's operation gives: the mixed values, and the logarithms of the sums of exp(score)."""
    scores = q.float() @ k.float().mT * scale
    if is_causal:
        scores = scores.where(torch.ones_like(scores, dtype=torch.bool).tril(), float("-inf"))
    return (scores.softmax(-1) @ v.float()).to(v.dtype), scores.logsumexp(-1, keepdim=True)
