"""The tiny model's vocabulary: BPE trained on its own questions and outputs, in tiktoken's file format."""

from base64 import b64encode
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from random import Random

import regex

from kimi_vl.output.thinking import CLOSING, OPENING
from kimi_vl.prompt.tokenizer import SPLIT_PATTERN
from tiny.pictures import Fonts
from tiny.questions import FAMILIES, make

MOST_RANKS = 768


def write_vocabulary(path: Path, fonts: Fonts) -> None:
    """Writes tiktoken.model: a line for each token, its bytes in base64 and its rank."""
    random = Random(0)
    texts = ["You are a helpful assistant", "system", "user", "assistant", "image"] * 50
    for family in FAMILIES:
        examples = [make(random, fonts, family, hard=random.random() < 0.5) for _ in range(150)]
        texts += [example.question for example in examples]
        texts += [output_text(example.thinking, example.answer) for example in examples]
    lines = (f"{b64encode(token).decode()} {rank}\n" for rank, token in enumerate(train_bpe(texts, MOST_RANKS)))
    path.write_text("".join(lines))


def output_text(thinking: str, answer: str) -> str:
    """What the model writes, without the token that ends it."""
    return f"{OPENING}{thinking}{CLOSING}{answer}"


def train_bpe(texts: Iterable[str], most: int) -> list[bytes]:
    """Tokens by rank: all bytes, then the pair that is most frequent, again and again, within the pattern's words."""
    counts = Counter(word for text in texts for word in regex.findall("(?V1)" + SPLIT_PATTERN, text))
    words = [([bytes([byte]) for byte in word.encode()], count) for word, count in counts.items()]
    ranks = [bytes([byte]) for byte in range(256)]
    while len(ranks) < most:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for tokens, count in words:
            for pair in pairwise(tokens):
                if _may_merge(b"".join(pair)):
                    pairs[pair] += count
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks.append(b"".join(best))
        for tokens, _ in words:
            place = 0
            while place < len(tokens) - 1:
                if (tokens[place], tokens[place + 1]) == best:
                    tokens[place : place + 2] = [ranks[-1]]
                place += 1
    return ranks


def _may_merge(token: bytes) -> bool:
    """Digits stay single, and each triangle of the markers is two tokens, as in the real vocabulary."""
    return token == OPENING.encode()[:2] or (token.isascii() and not any(chr(byte).isdigit() for byte in token))
