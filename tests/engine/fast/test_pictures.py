"""Pictures of the fast engine with the tiny model: transformers' features, and which of them are kept."""

from collections.abc import Iterator
from concurrent.futures import Future

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_vl.engine.base import Patches, Picture
from kimi_vl.engine.fast.network import Network
from kimi_vl.engine.fast.pictures import Pictures, resample
from kimi_vl.model.modeling import KimiVLForConditionalGeneration

GRID = (2, 4)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


class Watched(Pictures):
    """Notes the names of the pictures that it encodes."""

    def __init__(self, network: Network) -> None:
        super().__init__(network)
        self.encoded: list[str] = []

    def encode(self, patches: Patches, grid: tuple[int, int]) -> Tensor:
        self.encoded.append(patches.digest.decode())
        return super().encode(patches, grid)


@pytest.fixture
def pictures(network: Network) -> Watched:
    return Watched(network)


def patches(name: str) -> Patches:
    levels = torch.full((GRID[0] * GRID[1], 3, 14, 14), ord(name), dtype=torch.uint8)
    return Patches(levels, torch.arange(256.0).expand(3, -1), name.encode())


def features_of(pictures: Pictures, names: str) -> list[Tensor]:
    features = []
    for name in names:
        picture = Picture(GRID, Future())
        picture.patches.set_result(patches(name))
        features.append(pictures.features(picture))
    return features


@pytest.mark.parametrize("grid", [(2, 2), (2, 6), (14, 4), (32, 32), (6, 46), (40, 34)])
def test_features_are_transformers(
    grid: tuple[int, int], network: Network, model: KimiVLForConditionalGeneration
) -> None:
    levels = torch.randint(0, 256, (grid[0] * grid[1], 3, 14, 14), dtype=torch.uint8)
    made = Patches(levels, torch.randn(3, 256), b"noise")
    (expected,) = model.model.get_image_features(made.pixels(), torch.tensor([[1, *grid]])).pooler_output
    torch.testing.assert_close(Pictures(network).encode(made, grid), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grid", [(2, 2), (64, 64), (56, 74), (130, 6), (2, 510)])
def test_positions_are_interpolated_bicubically(grid: tuple[int, int]) -> None:
    table = torch.randn(64, 64, 5)
    expected = F.interpolate(table.permute(2, 0, 1)[None], size=grid, mode="bicubic")[0].flatten(1).T
    out = torch.empty_like(expected)
    resample(table, grid, out)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


def test_a_picture_is_encoded_once_and_alone(pictures: Watched, network: Network) -> None:
    features = features_of(pictures, "abba")
    assert pictures.encoded == ["a", "b"]
    assert features[0] is features[3] and features[1] is features[2]
    assert features[1].equal(*features_of(Pictures(network), "b"))
    assert features_of(pictures, "bca")[2] is features[0]
    assert pictures.encoded == ["a", "b", "c"]


def test_features_of_recent_pictures_are_kept_within_the_bound(
    pictures: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = features_of(pictures, "a")[0].nbytes
    monkeypatch.setattr("kimi_vl.engine.fast.pictures.KEPT_BYTES", 2 * size)
    features_of(pictures, "bcdcec")
    assert pictures.encoded == ["a", "b", "c", "d", "e"]
    features_of(pictures, "d")
    assert pictures.encoded == ["a", "b", "c", "d", "e", "d"], "it was the one not seen for longest"


def test_one_picture_is_given_out_though_it_is_more_than_is_kept(
    pictures: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kimi_vl.engine.fast.pictures.KEPT_BYTES", 0)
    first, second = features_of(pictures, "aa")
    assert first.equal(second)
    assert pictures.encoded == ["a", "a"]


def test_after_a_failure_what_was_encoded_is_still_right(
    pictures: Watched, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Picture(GRID, Future())
    broken.patches.set_exception(OSError("a truncated picture"))
    features_of(pictures, "a")
    with pytest.raises(OSError, match="truncated"):
        pictures.features(broken)
    with monkeypatch.context() as patch:
        patch.setattr("kimi_vl.engine.fast.picture_blocks.attend_picture", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            features_of(pictures, "ab")
    features = features_of(pictures, "ab")
    assert pictures.encoded == ["a", "b", "b"]
    for one, wanted in zip(features, features_of(Pictures(network), "ab"), strict=True):
        assert one.equal(wanted)
