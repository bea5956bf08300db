"""Answers about eight pictures, then a text, many turns and many pictures as long as fit, as on a GPU of so many bytes.

The weights are random ones of the full size. The prompt of eight pictures and its answer have 32,768 tokens, or fewer
where the engine offers fewer: what it took is told in any case.

usage: python -m tests.gpu.capped SCHEME BYTES USED_BY_OTHERS
Prints JSON: the context that the engine offers, the most that torch reserved, and the most that this process had in
use of the GPU, which is what nvidia-smi shows.
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Event

import torch
from bench.full_size import TEXT, VISION
from bench.pictures import QUESTION, Album

from kimi_vl.engine.base import ModelInputs, SamplingParams
from kimi_vl.engine.fast.engine import FastEngine
from kimi_vl.engine.fast.loading import _allocate
from kimi_vl.engine.fast.matrix import Matrix
from kimi_vl.engine.fast.network import Network
from kimi_vl.engine.fast.weights import parts
from kimi_vl.model.configuration import KimiVLConfig
from kimi_vl.model.variants import WEIGHTS
from kimi_vl.prompt.chat import question, render
from kimi_vl.prompt.processor import KimiVLProcessor

CUDA = torch.device("cuda")
LATER_BYTES = 250_000_000  # that CUDA takes later, for kernels and graphs, and a smaller GPU would not leave to torch
TOKENS, NEW_TOKENS = 32_768, 64  # of them the last ones are the answer
TURN, ANSWER = 1500, 2  # tokens of a turn of the conversation, and the id that begins each answer
PICTURE = 1050  # tokens of a picture and of what stands around it, or fewer
read_memory = torch.cuda.mem_get_info


def used() -> int:
    """Bytes of the GPU that this process has in use, its CUDA context included."""
    free, total = read_memory()
    return total - free - int(sys.argv[3])


def limit(size: int) -> None:
    """From here on this process has a GPU of so many bytes, of which torch has those that the context leaves."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((size - used() - LATER_BYTES) / total)
    torch.cuda.mem_get_info = lambda device=None: (size - used(), size)


@torch.no_grad()
def fill(network: Network) -> Network:
    """Puts random numbers everywhere."""
    for part in (*parts(network.weights), *network.tower.parameters(), *network.projector.parameters()):
        if isinstance(part, Matrix) and part.scales is not None:
            part.values.random_(-(2**31), 2**31 - 1)
            part.scales.fill_(2.0 ** -(part.bits + 5))
        else:
            (part.values if isinstance(part, Matrix) else part).normal_(0, 0.02)
    return network


def main() -> None:
    """Does it all."""
    scheme, size = sys.argv[1], int(sys.argv[2])
    limit(size)
    processor = KimiVLProcessor.from_pretrained(WEIGHTS / "tiny")
    config = KimiVLConfig(text_config=TEXT, vision_config=VISION, media_placeholder_token_id=processor.media_id)
    engine = FastEngine(fill(_allocate(config, CUDA, torch.bfloat16, scheme)), (ANSWER,))
    longest = engine.context_length - NEW_TOKENS
    with ThreadPoolExecutor(4) as pool, ThreadPoolExecutor(1) as watcher:

        def ask(pictures: int, length: int) -> ModelInputs:
            drawn = Album(pictures, 1024, 768).draw(0)
            inputs = processor.prepare(drawn, render([question(QUESTION, pictures)]), pool)
            rest = torch.ones(1, length - inputs.input_ids.shape[1], dtype=torch.int64)
            return replace(inputs, input_ids=torch.cat([inputs.input_ids, rest], 1))

        text = ModelInputs(torch.ones(1, longest, dtype=torch.int64))
        turns = replace(text, input_ids=text.input_ids.clone())
        turns.input_ids[:, ::TURN] = ANSWER
        done = Event()
        most_used = watcher.submit(lambda: max(used() for _ in iter(lambda: done.wait(0.001), True)))
        try:
            params = SamplingParams(NEW_TOKENS, frozenset((config.text_config.vocab_size,)))
            prompts = ask(8, min(longest, TOKENS - NEW_TOKENS)), text, turns, ask(longest // PICTURE, longest)
            answers = [list(engine.generate(prompt, params)) for prompt in prompts]
        finally:
            done.set()  # or the watcher would never end
    assert [len(tokens) for tokens in answers] == [NEW_TOKENS] * len(prompts)
    found = {
        "context": engine.context_length,
        "reserved": torch.cuda.max_memory_reserved(),
        "used": max(most_used.result(), used()),
    }
    print(json.dumps(found))
    engine.close()


if __name__ == "__main__":
    main()
