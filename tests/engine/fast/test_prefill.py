"""Which rows of a prompt's pieces go through the experts at once."""

from itertools import pairwise

import pytest
import torch

from kimi_vl.engine.fast import prefill
from kimi_vl.engine.fast.prefill import Piece, span_on

CHUNK = 8
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("ends", "most", "shares"),
    [
        ([3], 8, [3]),
        ([8], 8, [8]),
        ([16], 16, [16]),
        ([16], 8, [8, 8]),
        ([16, 24, 32, 40, 45], 16, [16, 16, 8, 5]),
        ([8, 16, 24], 16, [16, 8]),
        ([8, 16, 24], 8, [8, 8, 8]),
        ([5, 13, 21, 24], 16, [5, 16, 3]),
        ([8, 11, 19, 22, 25], 16, [8, 3, 8, 3, 3]),
    ],
)
def test_whole_chunks_go_through_the_experts_together(
    ends: list[int], most: int, shares: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill, "CHUNK", CHUNK)
    pieces = [
        Piece(slice(start, end), span_on(CPU, 100 + start, end - start), 0) for start, end in pairwise([0, *ends])
    ]
    found = prefill._shares(pieces, most)
    assert [rows.stop - rows.start for rows, _ in found] == shares
    assert [rows.stop for rows, _ in found] == torch.tensor(shares).cumsum(0).tolist()
    assert [int(span[1]) for _, span in found] == shares
