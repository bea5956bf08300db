"""Compiles every kernel, at the real model's sizes, for a GPU that need not be there: what the interpreter cannot show.

usage: python -m tests.engine.fast.cross_compile COMPUTE_CAPABILITY
Prints of each the shared memory that it takes, and the lists of argument types that it has, as JSON.
"""

import json
import os
import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import LayerNorm

os.environ.pop("TRITON_INTERPRET", None)  # before Triton's decorators are met

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from kimi_vl.engine.fast.kernels import (
    experts,
    experts_down,
    gated_product,
    join,
    latent_attention,
    latent_query,
    linear,
    picture,
    picture_attention,
    product,
    prompt,
    prompt_attention,
    prompt_routing,
    quantise,
    routing,
    sampling,
)
from kimi_vl.engine.fast.matrix import Matrix
from kimi_vl.engine.fast.weights import Attention, Mlp, dense

INTEGERS = {torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64"}
POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32", **INTEGERS}
OPTIONS = ("num_warps", "num_stages", "launch_pdl")
MODULES: tuple[ModuleType, ...] = (
    experts,
    experts_down,
    gated_product,
    latent_attention,
    latent_query,
    linear,
    product,
    prompt_attention,
    routing,
    sampling,
)


def compile_launches(capability: int, found: dict[str, Any]) -> None:
    """From here on a launch compiles for a GPU, and notes what is found of the kernel."""

    def compile_one(kernel: Any, *args: Any, grid: Any, warmup: bool, **given: Any) -> None:
        options = {name: given.pop(name) for name in OPTIONS if name in given}
        values = dict(zip((p.name for p in kernel.params), args, strict=False)) | given
        signature, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(kernel.params):
            value = values[parameter.name]
            if parameter.is_constexpr or value is None:
                signature[parameter.name], constants[index,] = "constexpr", value
            elif isinstance(value, Tensor):
                signature[parameter.name] = POINTERS[value.dtype]
                attributes[index,] = [["tt.divisibility", 16]]
            elif isinstance(value, TensorDescriptor):
                signature[parameter.name] = f"tensordesc<{POINTERS[value.base.dtype][1:]}{value.block_shape}>"
            else:
                signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
                if isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize:
                    attributes[index,] = [["tt.divisibility", 16]]  # as at a launch: more then goes by shared memory
        source = ASTSource(kernel, signature, constants, attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        kept = found.setdefault(kernel.fn.__name__, {"shared": 0, "types": []})
        kept["shared"] = max(kept["shared"], compiled.metadata.shared)
        kept["types"].append(list(signature.values()))

    JITFunction.run = compile_one
    dependent = {"PDL": True, "launch_pdl": True} if capability >= 90 else {"PDL": False}
    for module in MODULES:
        module.launch_options = lambda tensor, warps: {"num_warps": warps, **dependent}
        module.is_hopper = lambda device: capability // 10 == 9


def of(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Never read, so never filled."""
    return torch.empty(shape, dtype=dtype)


def floats(*shape: int) -> Tensor:
    return of(*shape, dtype=torch.float32)


def integers(*shape: int) -> Tensor:
    return of(*shape, dtype=torch.int32)


def matrix(*shape: int, bits: int) -> Matrix:
    return Matrix.empty(shape, bits, torch.device("cpu"), torch.bfloat16)


def launch_all() -> None:
    """Each kernel as the engine launches it."""
    for experts_bits, bits in ((16, 16), (8, 8), (4, 8)):
        launch_decoder(experts_bits, bits)
    launch_others()
    quantise.quantise_groups.launch(of(2816, 2048), integers(2816, 256), of(2816, 32))
    for bits in (8, 4):
        weight = matrix(64, 2816, 2048, bits=bits)
        quantise.dequantise.launch(weight.values, weight.scales, bits, of(64, 2816, 2048))
    for columns in (1408, 2048, 11264):
        quantise.quantise_rows.launch(of(2048, columns), integers(2048, columns // 4), floats(2048))


def launch_decoder(experts_bits: int, bits: int) -> None:
    """What reads large matrices, or has an attention layer's weights."""
    projections, output = matrix(3648, 2048, bits=bits), matrix(2048, 2048, bits=bits)
    attention = Attention(of(2048), projections, of(512), of(4096, 512), output, 16, 1e-5, 1e-6)
    first = dense(of(2048), matrix(2 * 11264, 2048, bits=bits), matrix(2048, 11264, bits=bits), 1e-5)
    other = experts_layer(experts_bits)
    x, position, cache, rotary = floats(2048), integers(1), of(4096, 576), floats(4096, 64)
    query, parts, sums, attended = of(16, 576), of(132, 16, 512), floats(132, 16), of(2048)
    linear.norm_linear.launch(x, attention.gain, attention.projections, floats(3648), 1e-5, "projections")
    latent_query.absorb.launch(floats(3648), attention, rotary, position, cache, query)
    latent_attention.attend.launch(query, cache, position, parts, sums, attention)
    latent_attention.merge.launch(parts, sums, position, of(16, 512))
    latent_attention.project_up.launch(of(16, 512), attention, attended)
    linear.linear_add.launch(x, attention.out, attended)
    for mlp in (first, other):
        work = routing.Scratch.of(mlp, integers(mlp.chosen))
        routing.route.launch(x, mlp, work)
        experts.expand.launch(x, mlp, work)
    experts.contract.launch(x, other, work)
    linear.norm_linear.launch(x, attention.gain, matrix(163840, 2048, bits=bits), floats(163840), 1e-5, "head")

    span, projected = integers(2), of(64, 3648)
    for rows in (projected, of(64, 576)):
        prompt.rotate.launch(rows, attention, rotary, cache, span)
    k, v = of(4096, 16, 256).split(128, 2)
    prompt_attention.attend_parts.launch(
        projected[:, :-576], k, v, cache, attention, span, of(8, 64, 16, 128), floats(8, 16, 64)
    )
    if bits == 16:
        return
    for tokens in (64, 16384):
        for weight in (projections, first.shared_down, other.shared_gate_up, other.shared_down):
            product.product.launch(of(tokens, weight.columns), weight, None, of(tokens, weight.shape[0]))
        for weight in (other.gate_up, other.down):
            rows = of(6 * tokens, weight.columns)
            product.product.launch(rows, weight, integers(64), of(6 * tokens, weight.shape[1]))


def experts_layer(bits: int) -> Mlp:
    """A layer with a router."""
    return replace(
        dense(of(2048), matrix(2 * 2816, 2048, bits=bits), matrix(2048, 2816, bits=bits), 1e-5),
        router=of(64, 2048),
        bias=floats(64),
        gate_up=matrix(64, 2816, 2048, bits=bits),
        down=matrix(64, 2048, 1408, bits=bits),
        chosen=6,
        factor=2.446,
    )


def launch_others() -> None:
    """What is the same for weights of any bits."""
    x, position = floats(2048), integers(1)
    draw = sampling.Draw.empty(torch.device("cpu"))
    sampling.restrict.launch(floats(163840), integers(5120))
    sampling.pick.launch(floats(163840), draw, position, floats(160), integers(160))
    for counts in (None, integers(163840)):
        sampling.finish.launch(x, floats(160), integers(160), of(163840, 2048), position, integers(64), counts)
    sampling.penalise.launch(floats(163840), integers(163840), draw)

    span, tokens, chosen, counts = integers(2), of(64, 2048), integers(64, 6), integers(2, 64)
    other = experts_layer(16)
    prompt.gate.launch(of(64, 2816), of(64, 1408))
    gated_product.gated_product.launch(tokens, other.gate_up.values, integers(384), integers(64), of(384, 1408))
    gated_product.gated_product.launch(tokens, other.shared_gate_up.values, None, None, of(64, 2816))
    prompt_routing.choose.launch(tokens, other, chosen, floats(64, 6), counts, span)
    prompt_routing.arrange.launch(chosen, counts, integers(384), chosen, integers(64), span)
    prompt.mix.launch(tokens, tokens, of(384, 2048), chosen, floats(64, 6), span)
    join.join.launch(of(64, 16, 128), floats(16, 64), of(2, 64, 16, 128), floats(2, 16, 64))

    norm = LayerNorm(1152, dtype=torch.bfloat16)
    for delta in (of(64, 1152), floats(64, 1152)):
        picture.add_norm.launch(of(64, 1152), delta, norm, of(64, 1152))
    picture.look_up.launch(of(64, 3, 14, 14, dtype=torch.uint8), floats(3, 256), of(64, 592))
    heads = picture_attention.empty_heads(of(64, 3, 16, 72))
    picture.rotate_patches.launch(of(64, 3, 16, 72), floats(64, 36), floats(64, 36), integers(1), *heads)
    picture_attention.attend_picture.launch(*heads, integers(1), of(64, 1152))


if __name__ == "__main__":
    found: dict[str, Any] = {}
    compile_launches(int(sys.argv[1]), found)
    launch_all()
    print(json.dumps(found))
