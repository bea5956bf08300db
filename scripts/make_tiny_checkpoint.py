"""Trains the tiny Kimi-VL that ships in weights/tiny, from scratch, on pictures and questions that it makes up itself.

In full, on one GPU, in pieces of one schedule:
    python scripts/make_tiny_checkpoint.py --out FOLDER
    python scripts/make_tiny_checkpoint.py --out FOLDER --resume FOLDER     # until the schedule is through
"""

import argparse
import json
import os
import time
from multiprocessing import Value
from pathlib import Path

import torch
from tiny.batches import Examples, loader
from tiny.checkpoint import load_official, save_official
from tiny.evaluation import examine, table
from tiny.network import Sizes, TinyKimiVL
from tiny.optimiser import optimisers
from tiny.pictures import Fonts
from tiny.training import Schedule, load_state, save_state, train
from tiny.vocabulary import write_vocabulary

from kimi_vl.prompt.tokenizer import VOCABULARY_FILE, TikTokenTokenizer

PATCHES = 90_000  # of a batch
SMOKE_PATCHES = 3_000


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for the checkpoint, its evaluation and what resuming needs")
    add("--seconds", type=float, help="how long this piece trains (default: 500, or 10 with --smoke)")
    add("--total-seconds", type=float, default=1150, help="how long all pieces train (default: %(default)s)")
    add("--resume", type=Path, metavar="FOLDER", help="go on from the piece that ended there")
    add("--evaluate", action="store_true", help="train nothing, examine the checkpoint in --out")
    add("--smoke", action="store_true", help="a minute on a CPU: goes all the way and learns nothing")
    cores = os.cpu_count() or 1
    add("--workers", type=int, default=max(1, cores - 2), help="processes that draw (default: %(default)s)")
    add("--seed", type=int, default=1, help="of the weights and the examples (default: %(default)s)")
    given = parser.parse_args()
    if given.evaluate and not (given.out / "model.safetensors").is_file():
        parser.error(f"--evaluate finds no checkpoint in {given.out}")
    if given.seconds is None:
        given.seconds = 10 if given.smoke else 500
    return given


def main() -> None:
    """Trains a piece of the schedule and examines what came out."""
    given = arguments()
    given.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() and not given.smoke else "cpu")
    fonts, unseen_fonts = Fonts.of_matplotlib()
    vocabulary = given.out / VOCABULARY_FILE
    if not vocabulary.exists():
        write_vocabulary(vocabulary, fonts)
    tokenizer = TikTokenTokenizer(str(vocabulary))
    torch.manual_seed(given.seed)
    model = TinyKimiVL(Sizes(vocabulary=tokenizer.vocab_size)).to(device)
    print(f"{sum(p.numel() for n, p in model.named_parameters() if 'labels' not in n):,} parameters", flush=True)
    if not given.evaluate:
        schedule = Schedule(given.seconds if given.smoke else given.total_seconds)
        chosen = optimisers(model, on_cpu=device.type == "cpu")
        if given.resume:
            load_state(given.resume, model, chosen, schedule)
        difficulty = Value("d", schedule.difficulty)
        seed = given.seed + round(1000 * schedule.progress)  # a piece that goes on draws other examples
        examples = Examples(vocabulary, fonts, difficulty, SMOKE_PATCHES if given.smoke else PATCHES, seed)
        batches = loader(examples, 0 if given.smoke else given.workers, pin=device.type == "cuda")
        train(model, chosen, batches, difficulty, schedule, given.seconds)
        del batches
        save_state(given.out, model, chosen, schedule)
        save_official(model, tokenizer, given.out)
    load_official(model, given.out)  # what is examined is what is shipped, rounding included
    started = time.monotonic()
    size = {"each": 2, "longest": 8} if given.smoke else {"each": 200}
    results = examine(model, tokenizer, fonts, unseen_fonts, **size)
    print(f"examined in {time.monotonic() - started:.0f} s\n{table(results)}", flush=True)
    if not given.evaluate:
        (given.out / "evaluation.md").write_text(table(results))
        mistakes = {name: result.mistakes for name, result in results.items() if result.mistakes}
        (given.out / "mistakes.json").write_text(json.dumps(mistakes, indent=1))


if __name__ == "__main__":
    main()
