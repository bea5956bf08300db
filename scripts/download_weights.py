"""Downloads the weights of a published Kimi-VL model (33 GB) into weights/, at the revision this project knows."""

import argparse

from huggingface_hub import snapshot_download

from kimi_vl.model.variants import VARIANTS, WEIGHTS

FILES = ["*.json", "*.safetensors", "tiktoken.model"]  # no code


def main() -> None:
    """Downloads one model; an interrupted download goes on where it stopped."""
    published = [name for name, variant in VARIANTS.items() if variant.repository]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=published, nargs="?", default=published[0], help="default: %(default)s")
    name = parser.parse_args().model
    variant = VARIANTS[name]
    snapshot_download(
        variant.repository, revision=variant.revision, allow_patterns=FILES, local_dir=WEIGHTS / name, max_workers=8
    )
    print(f"weights/{name} is complete; answer with it: python -m kimi_vl --model {name} 'What is this?' PICTURE")


if __name__ == "__main__":
    main()
