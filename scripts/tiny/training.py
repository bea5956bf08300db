"""The training loop: one learning-rate schedule over wall time, in pieces that resume where the last one stopped."""

import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tiny.batches import Batch, to_device
from tiny.network import MoE, TinyKimiVL
from tiny.questions import SHARES

STATE = "state"  # the folder beside a checkpoint, in which no files may be that are not its own
FILE_BYTES = 14_000_000  # of a resume file, so that each can be moved on its own
LOG_SECONDS = 10


@dataclass
class Schedule:
    """Everything that changes with progress, from 0 to 1."""

    total_seconds: float
    progress: float = 0.0

    @property
    def learning_rate(self) -> float:
        """Share of the full rate: a short warm-up, constant to 45 %, then down to nearly nothing."""
        decay = 1 if self.progress < 0.45 else max(0.01, (1 - self.progress) / 0.55)
        return min(1.0, (self.progress + 1e-3) / 0.02) * decay

    @property
    def difficulty(self) -> float:
        """Share of hard examples."""
        return min(1.0, max(0.0, (self.progress - 0.04) / 0.12))

    @property
    def label_weight(self) -> float:
        """Of what each patch shows, beside the output's loss."""
        return 0.5 if self.progress < 0.6 else 0.15


def train(
    model: TinyKimiVL,
    optimisers: list[torch.optim.Optimizer],
    batches: Iterator[Batch],
    difficulty: "Synchronized[float]",
    schedule: Schedule,
    seconds: float,
) -> None:
    """Trains for so many seconds, or to the schedule's end."""
    device = model.embed_tokens.weight.device
    rates = [optimiser.param_groups[0]["lr"] for optimiser in optimisers]
    model.train()
    started = last = time.monotonic()
    first_progress = schedule.progress
    steps, waited = 0, 0.0
    right: defaultdict[str, list[bool]] = defaultdict(list)
    now = started
    while schedule.progress < 1 and now - started < seconds:
        asked = time.monotonic()
        batch = to_device(next(batches), device)
        waited += time.monotonic() - asked
        for optimiser, rate in zip(optimisers, rates, strict=True):
            optimiser.param_groups[0]["lr"] = rate * schedule.learning_rate
        loss, predicted = losses(model, batch, schedule.label_weight)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        for layer in model.layers:
            if isinstance(layer.mlp, MoE):
                layer.mlp.rebalance()
        steps += 1
        if steps % 20 == 1:
            _exact(batch, predicted, right)
        now = time.monotonic()
        schedule.progress = min(1.0, first_progress + (now - started) / schedule.total_seconds)
        difficulty.value = schedule.difficulty
        if now - last > LOG_SECONDS or schedule.progress >= 1:
            shares = "  ".join(f"{f} {sum(right[f]) / len(right[f]):.2f}" for f in SHARES if right[f])
            print(
                f"{schedule.progress:.3f}  {now - started:4.0f} s  step {steps}  rate {schedule.learning_rate:.2f}  "
                f"waited {waited:.1f} s  loss {loss.item():.3f} | {shares}",
                flush=True,
            )
            right.clear()
            last = now
    if torch.cuda.is_available():
        print(f"{steps} steps, peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB", flush=True)


def losses(model: TinyKimiVL, batch: Batch, label_weight: float) -> tuple[Tensor, Tensor]:
    """The loss to minimise, and the likeliest tokens at the batch's targets."""
    device = batch.targets.device
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        features, seen = model.see(batch.pictures) if batch.pictures else (None, None)
        hidden = model.read(batch.tokens, features)[batch.selected]
        logits = model.lm_head(hidden).float()
        loss = F.cross_entropy(logits, batch.targets)
        if seen is not None:
            labels = model.labels(seen).float()
            wrong = F.binary_cross_entropy_with_logits(labels, batch.labels.float(), reduction="sum")
            loss = loss + label_weight * wrong / len(labels)
    return loss, logits.argmax(-1)


def _exact(batch: Batch, predicted: Tensor, right: dict[str, list[bool]]) -> None:
    """Notes for each example whether every token of its output was the likeliest."""
    wrong = torch.zeros(len(batch.families), device=predicted.device)
    wrong.index_add_(0, batch.owner, (predicted != batch.targets).float())
    for family, count in zip(batch.families, wrong.tolist(), strict=True):
        right[family].append(count == 0)


def save_state(folder: Path, model: TinyKimiVL, optimisers: list[torch.optim.Optimizer], schedule: Schedule) -> None:
    """Writes what resuming needs: float32 weights, the optimisers' state with momenta in bfloat16, the progress."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for index, optimiser in enumerate(optimisers):
        for parameter, values in optimiser.state_dict()["state"].items():
            for name, value in values.items():
                small = value.to(torch.bfloat16) if name == "momentum" else value
                tensors[f"optimiser.{index}.{parameter}.{name}"] = small
    tensors["progress"] = torch.tensor(schedule.progress, dtype=torch.float64)
    files: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if files[-1] and size + tensor.nbytes > FILE_BYTES:
            files.append({})
            size = 0
        files[-1][name] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
    state = folder / STATE
    state.mkdir(parents=True, exist_ok=True)
    for old in state.iterdir():
        old.unlink()
    for index, part in enumerate(files):
        save_file(part, state / f"{index}.safetensors")


def load_state(folder: Path, model: TinyKimiVL, optimisers: list[torch.optim.Optimizer], schedule: Schedule) -> None:
    """Takes up what save_state wrote."""
    tensors: dict[str, Tensor] = {}
    for file in (folder / STATE).glob("*.safetensors"):
        with safe_open(file, "pt") as stored:
            tensors.update({name: stored.get_tensor(name) for name in stored.keys()})  # noqa: SIM118
    model.load_state_dict({n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")})
    for index, optimiser in enumerate(optimisers):
        state: defaultdict[int, dict[str, Tensor]] = defaultdict(dict)
        for name, tensor in tensors.items():
            if name.startswith(f"optimiser.{index}."):
                _, _, parameter, key = name.split(".")
                state[int(parameter)][key] = tensor.float()
        optimiser.load_state_dict({"state": dict(state), "param_groups": optimiser.state_dict()["param_groups"]})
    schedule.progress = tensors["progress"].item()
