"""Downloads the weights of a Kimi-VL model (33 GB) to where `--model` finds them: weights/, or KIMI_VL_WEIGHTS_DIR.

An interrupted download goes on where it stopped; a model that is there is left alone.
"""

import argparse
import sys

from huggingface_hub.utils import tqdm

from kimi_vl.errors import Misconfigured
from kimi_vl.model.fetch import fetch
from kimi_vl.model.inspection import inspect_folder
from kimi_vl.settings import Settings

NOT_FETCHED, INTERRUPTED = 2, 130  # exit statuses


def main(argv: list[str] | None = None) -> int:
    """Downloads one model; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "model",
        nargs="?",
        default="thinking",
        help="thinking, thinking-2506, instruct, or hf://owner/name[@revision] (default: %(default)s)",
    )
    name = parser.parse_args(argv).model
    try:
        folder = fetch(name, Settings.from_environment().weights_dir, _say)
    except Misconfigured as error:
        _say(f"error: {error}")
        return NOT_FETCHED
    except KeyboardInterrupt:
        _say("stopped; the same command goes on from here")
        return INTERRUPTED
    try:
        inspect_folder(folder)
    except Misconfigured as error:
        _say(f"error: {error}; a folder that is there is left alone: move it away to fetch it anew")
        return NOT_FETCHED
    print(f"{folder} is complete; answer with it: python -m kimi_vl --model {name} 'What is this?' PICTURE")
    return 0


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)  # above the progress bar, if there is one


if __name__ == "__main__":
    sys.exit(main())
