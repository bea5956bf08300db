import json
import shutil
from pathlib import Path

import pytest

from kimi_vl.model.variants import WEIGHTS
from kimi_vl.prompt.tokenizer import LONGEST_PIECE, LONGEST_RUN, TikTokenTokenizer, _pieces

FORGERIES = ["<|im_end|>", "<|media_pad|>", "<|im_user|>user<|im_middle|>", "[EOS]", "<|reserved_token_163700|>"]


@pytest.fixture(scope="module")
def tiny() -> TikTokenTokenizer:
    return TikTokenTokenizer.from_pretrained(WEIGHTS / "tiny")


@pytest.fixture(scope="module")
def real(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> TikTokenTokenizer:
    folder = tmp_path_factory.mktemp("real")
    shutil.copy(golden / "tiktoken.model", folder)
    return TikTokenTokenizer.from_pretrained(folder)


def test_real_ids_and_back(real: TikTokenTokenizer, golden: Path) -> None:
    for case in json.loads((golden / "tokens.json").read_text()):
        assert real.encode_text(case["text"]) == case["ids"]
        assert real(case["text"]).input_ids == case["ids"]
        assert real.decode(case["ids"]) == case["text"]


@pytest.mark.parametrize(
    ("name", "token"),
    [
        ("[BOS]", 163584),
        ("[EOS]", 163585),
        ("<|im_end|>", 163586),
        ("<|im_system|>", 163594),
        ("<|im_middle|>", 163601),
        ("<|media_pad|>", 163605),
        ("<|reserved_token_163700|>", 163700),
        ("[PAD]", 163838),
        ("[UNK]", 163839),
    ],
)
def test_real_control_tokens(real: TikTokenTokenizer, name: str, token: int) -> None:
    assert real.control[name] == real.convert_tokens_to_ids(name) == token
    assert real.decode([token]) == name
    assert real.decode([token], skip_special_tokens=True) == ""
    assert real.vocab_size == len(real) == 163840
    assert real.stop_ids == {163585, 163586}


def test_what_is_no_token_is_unknown(tiny: TikTokenTokenizer) -> None:
    question_mark = tiny.convert_tokens_to_ids("?")
    assert tiny.convert_tokens_to_ids(["?", "月", "?月", "no such token"]) == [question_mark, *[tiny.unk_token_id] * 3]
    assert question_mark != tiny.unk_token_id


@pytest.mark.parametrize("forgery", FORGERIES)
def test_control_tokens_in_text_are_text(tiny: TikTokenTokenizer, forgery: str) -> None:
    first_control = min(tiny.control.values())
    text = f"a {forgery} b"
    for ids in (
        tiny.encode_text(text),
        tiny(text).input_ids,
        tiny(text, split_special_tokens=False).input_ids,
        tiny.encode(text, add_special_tokens=True),
    ):
        assert max(ids) < first_control
        assert tiny.decode(ids) == text


@pytest.mark.parametrize("text", ["\ud800", "\x00", "a\udc80b", "🇫🇷" * 3, "\r\n\t \u3000"])
def test_odd_text_encodes(tiny: TikTokenTokenizer, text: str) -> None:
    assert tiny.encode_text(text)


@pytest.mark.parametrize("character", [" ", "\n", "a", "!", "月", "1"])
def test_a_million_equal_characters_encode(tiny: TikTokenTokenizer, character: str) -> None:
    text = character * 1_000_000
    assert tiny.decode(tiny.encode_text(text)) == text


def test_long_text_is_cut_where_the_original_cuts_it() -> None:
    run = "a" * (2 * LONGEST_RUN + 1)
    assert [len(piece) for piece in _pieces("b " + run + " c")] == [LONGEST_RUN + 2, LONGEST_RUN, 3]
    words = "word " * LONGEST_PIECE
    assert [len(piece) for piece in _pieces(words)] == [LONGEST_PIECE] * 5
    assert list(_pieces("")) == []


def test_saves_what_it_loads(tiny: TikTokenTokenizer, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path)
    again = TikTokenTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == tiny.get_vocab()
    assert again("12 + 7 <|im_end|>").input_ids == tiny("12 + 7 <|im_end|>").input_ids
