"""Measures an engine on the machine at hand against what the machine could do, and against transformers' generate().

Every figure is a median. The floor of a decoded token is the bytes that it must read over the read bandwidth, that of a
prompt its arithmetic over the rate of matrix products, both measured in the same run.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from time import perf_counter

import torch
from bench.ceilings import gemm_rate, read_bandwidth
from bench.full_size import random_model
from bench.measures import Figure, decode, first_token, prefill

from kimi_vl.engine.base import Engine
from kimi_vl.engine.fast.engine import FastEngine
from kimi_vl.engine.reference import ReferenceEngine
from kimi_vl.model.checkpoint import load_model
from kimi_vl.model.modeling import KimiVLForConditionalGeneration
from kimi_vl.model.variants import find_model
from kimi_vl.prompt.chat import answer_prefix
from kimi_vl.prompt.processor import KimiVLProcessor

ENGINES = ("fast", "reference")
REFERENCE_TOKENS = 48  # generate() is too slow for more


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--weights", default="random", help="random (full size), tiny, or a checkpoint folder (default: %(default)s)")
    add("--engine", choices=ENGINES, default="fast", help="what is measured (default: %(default)s)")
    contexts, prompts = [1024, 16384, 32768], [4096, 32768, 120000]
    add("--contexts", type=int, nargs="*", default=contexts, help="for decoding (default: %(default)s)")
    add("--prompts", type=int, nargs="*", default=prompts, help="for prefill (default: %(default)s)")
    add("--tokens", type=int, default=256, help="decoded in each run (default: %(default)s)")
    add("--repeats", type=int, default=5, help="of every measurement (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="keep the figures there too")
    return parser.parse_args()


def load(weights: str, device: torch.device) -> tuple[KimiVLForConditionalGeneration, KimiVLProcessor]:
    """The model and a processor whose ids it knows."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    folder = find_model("tiny" if weights == "random" else weights)[0]
    processor = KimiVLProcessor.from_pretrained(folder)
    if weights == "random":
        return random_model(device, dtype, processor.media_id), processor
    return load_model(folder, device, dtype), processor


def measure(given: argparse.Namespace, device: torch.device) -> tuple[dict[str, float], list[Figure], list[Figure]]:
    """The machine's ceilings, the engine's figures, and those of generate() that are worth the wait."""
    model, processor = load(given.weights, device)
    bandwidth, rate = read_bandwidth(device), gemm_rate(device, model.dtype)
    ceilings = {"read bandwidth, TB/s": bandwidth / 1e12, "matrix products, TFLOP/s": rate / 1e12}
    other = [] if given.engine == "reference" else run(given, "reference", model, processor, bandwidth, rate)
    return ceilings, run(given, given.engine, model, processor, bandwidth, rate), other


def run(
    given: argparse.Namespace,
    name: str,
    model: KimiVLForConditionalGeneration,
    processor: KimiVLProcessor,
    bandwidth: float,
    rate: float,
) -> list[Figure]:
    """All figures of one engine; the one that stands beside skips the longest."""
    beside = name != given.engine
    started = perf_counter()
    engine: Engine = FastEngine(model, answer_prefix(processor.tokenizer)) if name == "fast" else ReferenceEngine(model)
    figures = [Figure("ready, from weights in memory", [perf_counter() - started], 0.0)]
    tokens, repeats = (REFERENCE_TOKENS, 2) if name == "reference" else (given.tokens, given.repeats)
    try:
        for context in given.contexts[:1] if beside else given.contexts:
            figures.append(decode(engine, model, context, tokens, repeats, bandwidth))
        for length in given.prompts[:1] if beside else given.prompts:
            figures.append(prefill(engine, model, length, repeats, rate))
        for sizes in [(1024, 768)], [(1024, 768)] * 8, [(1792, 1792)] * 8:
            if sum(width * height for width, height in sizes) // 28**2 < engine.context_length * 3 // 4:
                figures += first_token(engine, model, processor, sizes, repeats)
    finally:
        engine.close()
    return figures


def table(figures: list[Figure], other: list[Figure]) -> str:
    """A Markdown table, milliseconds."""
    beside = {figure.name: figure.median for figure in other}
    lines = ["| | median ms | from - to | floor ms | floor / median | generate() ms |", "|---|---|---|---|---|---|"]
    for figure in figures:
        low, high = 1000 * min(figure.values), 1000 * max(figure.values)
        floor = f"{1000 * figure.floor:.2f} | {figure.floor / figure.median:.0%}" if figure.floor else " | "
        reference = f"{1000 * beside[figure.name]:.2f}" if figure.name in beside else ""
        lines.append(f"| {figure.name} | {1000 * figure.median:.2f} | {low:.2f} - {high:.2f} | {floor} | {reference} |")
    return "\n".join(lines)


def main() -> None:
    """Measures and prints."""
    given = arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    ceilings, figures, other = measure(given, device)
    print(f"{given.weights} weights, {given.engine} engine, {name}, torch {torch.__version__}")
    print("".join(f"{ceiling}: {value:.2f}\n" for ceiling, value in ceilings.items()))
    print(table(figures, other))
    if device.type == "cuda":
        print(f"\npeak GPU memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")
    if given.json:
        kept = {given.engine: [asdict(f) for f in figures], "generate()": [asdict(f) for f in other]}
        given.json.write_text(json.dumps({"machine": name, "ceilings": ceilings, **kept}, indent=1))


if __name__ == "__main__":
    main()
