"""Measures an engine on the machine at hand against what the machine could do, and against transformers.

Every figure is a median. The floor of a decoded token is the bytes that it must read over the read bandwidth, that of a
prompt or a picture its arithmetic over the rate of matrix products, both measured in the same run.
"""

import argparse
import gc
import shlex
import sys
from pathlib import Path
from platform import python_version
from typing import Any

import torch
import transformers
import triton
from bench.ceilings import Ceilings, measure_ceilings
from bench.figure import Figure
from bench.measures import SKIPPED, TURN, decode, distinct_experts, next_turn, prefill
from bench.pictures import Album, encode, first_token
from bench.ready import ready
from bench.report import Report
from bench.subject import ENGINES, Subject, load, machine, make_engine

from kimi_vl.engine.fast.scheme import SCHEMES
from kimi_vl.model.modeling import KimiVLForConditionalGeneration
from kimi_vl.prompt.processor import KimiVLProcessor

CONTEXTS, PROMPTS = [1024, 4096, 16384, 32768], [4096, 32768, 120000]
PICTURES = [Album.parse(text) for text in ("1x512x512", "1x1024x768", "8x1024x768", "1x1792x1792", "8x1792x1792")]
ASKED = Album(1, 1024, 768)
SCHEMA = '{"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}'  # of an endless string
READY_RUNS = 1  # at most: each starts two processes and makes the weights anew
REFERENCE_TOKENS, REFERENCE_RUNS = 32, 2  # generate() is too slow for more
REFERENCE_LONGEST = 40_000  # tokens: its cache takes 280 kB for each


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--weights", default="random", help="random (full size), tiny, or a checkpoint folder (default: %(default)s)")
    add("--engine", choices=ENGINES, default="fast", help="what is measured (default: %(default)s)")
    add(
        "--quantization",
        nargs="+",
        choices=SCHEMES,
        default=["none"],
        help="bits of the fast engine's weights; with those after the first only decoding is measured, "
        "at the first context (default: none)",
    )
    add("--contexts", type=int, nargs="*", default=CONTEXTS, help="for decoding (default: %(default)s)")
    add(
        "--prompts",
        type=int,
        nargs="*",
        default=PROMPTS,
        help="for prefill, and a turn after it (default: %(default)s)",
    )
    album: dict[str, Any] = {"type": Album.parse, "metavar": "NxWxH"}
    shown = " ".join(map(str, PICTURES))
    add("--pictures", **album, nargs="*", default=PICTURES, help=f"for MoonViT (default: {shown})")
    add("--asked", **album, default=ASKED, help="for the time to the first token (default: %(default)s)")
    add("--tokens", type=int, default=256, help="decoded in each run (default: %(default)s)")
    add("--repeats", type=int, default=5, help="of every measurement (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="keep the figures there too, for scripts/plot_decode.py")
    given = parser.parse_args()
    if given.tokens <= SKIPPED + 1:
        parser.error(f"--tokens must be more than {SKIPPED + 1}: the first ones are not counted")
    if len(given.quantization) > 1 and not given.contexts:
        parser.error("--quantization with several names takes the first of --contexts")
    return given


def measure(given: argparse.Namespace) -> Report:
    """Everything, the engine's start first, while the GPU's memory is free, then transformers, then the engine."""
    first, *others = given.quantization
    runs = min(given.repeats, READY_RUNS)
    started = ready(given.weights, first, given.asked, runs) if given.engine == "fast" else []
    device = machine()
    model, processor = load(given.weights, device)
    ceilings = measure_ceilings(device, model.dtype)
    beside = [] if given.engine == "reference" else run(given, "reference", model, processor, ceilings)[0]
    figures, experts = run(given, given.engine, model, processor, ceilings)
    otherwise = {name: decoded(given, name, model, processor, ceilings) for name in others}
    if given.engine == "fast" and given.contexts:
        otherwise["a JSON schema"] = decoded(given, first, model, processor, ceilings, SCHEMA)
    return Report(
        command=shlex.join(sys.argv),
        machine=torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU",
        versions={
            "Python": python_version(),
            **{module.__name__: module.__version__ for module in (torch, triton, transformers)},
        },
        weights=given.weights,
        engine=given.engine,
        quantization=first,
        ceilings=ceilings,
        distinct_experts=experts,
        experts=model.config.text_config.n_routed_experts,
        decoded=given.tokens,
        figures=started + figures,
        transformers=beside,
        otherwise=otherwise,
    )


def run(
    given: argparse.Namespace,
    name: str,
    model: KimiVLForConditionalGeneration,
    processor: KimiVLProcessor,
    ceilings: Ceilings,
) -> tuple[list[Figure], list[int]]:
    """All figures of one engine for which it has the memory, and of the fast one the distinct experts of each layer."""
    gc.collect()  # what another engine held
    engine = make_engine(name, model, processor, given.quantization[0])
    tokens, repeats, longest = given.tokens, given.repeats, engine.context_length
    if name == "reference":
        tokens, repeats = min(tokens, REFERENCE_TOKENS), min(repeats, REFERENCE_RUNS)
        longest = min(longest, REFERENCE_LONGEST)
    subject = Subject(model, processor, engine, ceilings, tokens, repeats)
    try:
        figures = [decode(subject, context) for context in given.contexts if context + tokens <= longest]
        figures += [prefill(subject, length) for length in given.prompts if length < longest]
        figures += [next_turn(subject, length) for length in given.prompts if length + 2 * TURN < longest]
        figures += [encode(subject, album) for album in given.pictures]
        figures += first_token(subject, given.asked)
        return figures, distinct_experts(subject.fast, model, tokens) if subject.fast else []
    finally:
        engine.close()


def decoded(
    given: argparse.Namespace,
    quantization: str,
    model: KimiVLForConditionalGeneration,
    processor: KimiVLProcessor,
    ceilings: Ceilings,
    schema: str = "",
) -> Figure:
    """A token of the fast engine at the first of the contexts, with weights of other bits, or by a JSON Schema."""
    gc.collect()
    engine = make_engine("fast", model, processor, quantization)
    try:
        subject = Subject(model, processor, engine, ceilings, given.tokens, given.repeats)
        return decode(subject, given.contexts[0], schema)
    finally:
        engine.close()


def main() -> None:
    """Measures and prints."""
    given = arguments()
    report = measure(given)
    print(report.markdown())
    if given.json:
        given.json.write_text(report.json())


if __name__ == "__main__":
    main()
