"""How far the fast engine's logits are from float32."""

import pytest
import torch
from torch import Tensor

from kimi_vl.engine.base import ModelInputs
from kimi_vl.engine.fast.engine import FastEngine
from kimi_vl.engine.fast.kernels.prompt_routing import choose
from kimi_vl.engine.fast.prompt_graphs import PromptGraphs
from kimi_vl.engine.fast.weights import Mlp, Weights
from tests.gpu.float32 import last_logits


def random_ids(length: int) -> Tensor:
    return torch.randint(0, 160_000, (1, length), generator=torch.Generator().manual_seed(length))


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return float((got.float() - wanted).norm() / wanted.norm())


def fast_error(
    engine: FastEngine, ids: Tensor, decoded: int, monkeypatch: pytest.MonkeyPatch, exact: Weights | None = None
) -> float:
    """Of the fast engine, the last `decoded` tokens step by step, against float32 with the experts that it chose.

    Float32 takes the `exact` weights if the engine's own have lost bits.
    """
    chosen: dict[int, list[Tensor]] = {id(mlp): [] for _, mlp in engine.weights.layers[:-1] if mlp.chosen}

    def note(hidden: Tensor, mlp: Mlp, experts: Tensor, *rest: Tensor) -> None:
        choose(hidden, mlp, experts, *rest)
        chosen[id(mlp)].append(experts.long())

    with torch.inference_mode(), monkeypatch.context() as patch:
        patch.setattr("kimi_vl.engine.fast.prefill.choose", note)
        # graphs would not say what they choose; of the class, since an undone patch of an object makes a cycle of it
        patch.setattr(PromptGraphs, "run", lambda graphs, x, start: None)
        length = ids.shape[1]
        if length > decoded:
            engine._seen = None
            engine._read(ModelInputs(ids[:, : length - decoded]))
        for place in range(max(0, length - decoded), length):
            engine.decoder._buffers.x.copy_(engine.weights.embeddings[ids[0, place]])
            engine.decoder.position.fill_(place)
            engine.decoder.forward()
            steps = [e for e, (_, mlp) in zip(engine.decoder.experts, engine.weights.layers, strict=True) if mlp.chosen]
            for layer, step in zip(chosen.values(), steps[:-1], strict=True):
                layer.append(step[None].long().clone())
        last_layers = engine.decoder.experts[-1:]
        of_last_layer = last_layers.new_zeros(length, last_layers.shape[1], dtype=torch.int64)
        of_last_layer[-1:] = last_layers  # the only token for which that layer was run to its end
        experts = [*(torch.cat(layer) for layer in chosen.values()), of_last_layer]
        wanted = last_logits(exact or engine.weights, ids[0].to(engine.cache.device), experts)
    return relative_error(engine.decoder.logits, wanted)
