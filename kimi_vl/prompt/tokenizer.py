"""Kimi-VL's tokenizer: tiktoken BPE, in which text never becomes a control token."""

import re
import shutil
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import tiktoken
from transformers import PreTrainedTokenizer

VOCABULARY_FILE = "tiktoken.model"
LONGEST_PIECE = 400_000  # characters encoded at once
LONGEST_RUN = 25_000  # characters of white space, or of anything else, without a change

# Moonshot's split pattern (tokenization_moonshot.py).
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
SPLIT_PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)

# Control tokens follow the ranks: 256 ids, these at their places and <|reserved_token_ID|> at the others.
CONTROL_TOKENS = 256
NAMED_CONTROL_TOKENS = {
    0: "[BOS]",
    1: "[EOS]",
    2: "<|im_end|>",
    3: "<|im_user|>",
    4: "<|im_assistant|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: "[EOT]",
    10: "<|im_system|>",
    17: "<|im_middle|>",
    18: "<|media_start|>",
    19: "<|media_content|>",
    20: "<|media_end|>",
    21: "<|media_pad|>",
    254: "[PAD]",
    255: "[UNK]",
}


class TikTokenTokenizer(PreTrainedTokenizer):
    """Text ↔ ids. Control tokens exist by name in `control`, and never come out of text."""

    vocab_files_names: ClassVar[dict[str, str]] = {"vocab_file": VOCABULARY_FILE}
    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file: str, **kwargs: Any) -> None:
        self.vocab_file = Path(vocab_file)
        self._ranks = _read_ranks(self.vocab_file)
        size = len(self._ranks)
        names = {n: NAMED_CONTROL_TOKENS.get(n, f"<|reserved_token_{size + n}|>") for n in range(CONTROL_TOKENS)}
        self.control = {name: size + n for n, name in names.items()}
        self._token_bytes = list(self._ranks)
        self.encoding = tiktoken.Encoding(
            "kimi-vl", pat_str=SPLIT_PATTERN, mergeable_ranks=self._ranks, special_tokens=self.control
        )
        super().__init__(
            bos_token="[BOS]",
            eos_token="[EOS]",
            pad_token="[PAD]",
            unk_token="[UNK]",
            split_special_tokens=True,
            clean_up_tokenization_spaces=False,
            special_tokens_pattern="none",
            model_max_length=kwargs.get("model_max_length"),
        )

    @property
    def vocab_size(self) -> int:
        """Number of ids, control tokens included."""
        return len(self._ranks) + CONTROL_TOKENS

    @property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end an output. Every turn ends with <|im_end|>, though no shipped config lists it."""
        return frozenset((self.control["[EOS]"], self.control["<|im_end|>"]))

    def encode_text(self, text: str) -> list[int]:
        """Ids of plain text; the name of a control token in it is text like any other."""
        return [token for piece in _pieces(text) for token in self.encoding.encode_ordinary(piece)]

    def token_bytes(self, token: int) -> bytes:
        """UTF-8 bytes of an id, often a part of a character; a control token has none."""
        return self._token_bytes[token] if token < len(self._token_bytes) else b""

    def get_vocab(self) -> dict[str, int]:
        """Token → id; the bytes of an ordinary token stand as Latin-1 characters."""
        return {_as_string(token): rank for token, rank in self._ranks.items()} | self.control

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:
        """Tokens of plain text; the keywords of other tokenizers, which could let control tokens in, do nothing."""
        return [_as_string(self._token_bytes[token]) for token in self.encode_text(text)]

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Copies tiktoken.model into a folder."""
        target = Path(save_directory) / f"{filename_prefix + '-' if filename_prefix else ''}{VOCABULARY_FILE}"
        if target.resolve() != self.vocab_file.resolve():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)

    def _convert_token_to_id(self, token: str) -> int:
        if token in self.control:
            return self.control[token]
        if any(character > "\xff" for character in token):  # no byte, and no "?" either
            return self.control["[UNK]"]
        return self._ranks.get(token.encode("latin-1"), self.control["[UNK]"])

    def _convert_id_to_token(self, index: int) -> str:
        if index < len(self._ranks):
            return _as_string(self._token_bytes[index])
        return next((name for name, token in self.control.items() if token == index), "[UNK]")

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text of tokens; bytes that are no UTF-8 become U+FFFD."""
        pieces = (t.encode() if t in self.control else t.encode("latin-1", "replace") for t in tokens)
        return b"".join(pieces).decode("utf-8", "replace")

    def _decode(self, token_ids: int | list[int], skip_special_tokens: bool = False, **kwargs: Any) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        kept = [int(i) for i in ids if int(i) < len(self._ranks) or not skip_special_tokens]
        return self.convert_tokens_to_string([self._convert_id_to_token(i) for i in kept])


def _pieces(text: str) -> Iterator[str]:
    """Cuts a text where Moonshot's tokenizer does: a longer piece or run is too much for tiktoken's regex engine."""
    for offset in range(0, len(text), LONGEST_PIECE):
        piece = text[offset : offset + LONGEST_PIECE]
        start = 0
        for run in re.finditer(r"\s+|\S+", piece):
            for cut in range(run.start() + LONGEST_RUN, run.end(), LONGEST_RUN):
                yield piece[start:cut]
                start = cut
        yield piece[start:]


def _as_string(token: bytes) -> str:
    return token.decode("latin-1")


def _read_ranks(path: Path) -> dict[bytes, int]:
    """tiktoken.model: a line for each token, its bytes in base64 and its rank."""
    pairs = (line.split() for line in path.read_bytes().splitlines() if line)
    return {b64decode(token): int(rank) for token, rank in pairs}
