"""What the tests of loading share, here and on a GPU."""

from torch import Tensor

from kimi_vl.engine.fast.matrix import Matrix
from kimi_vl.engine.fast.network import Network


def tensors_of(network: Network) -> dict[str, Tensor]:
    """Every tensor of a network by a name of its own, tables included that no checkpoint holds."""
    tensors = {}
    for number, pair in enumerate([(network.weights,), *network.weights.layers]):
        for part in pair:
            for name, value in vars(part).items():
                whole = f"{number} {type(part).__name__} {name}"
                if isinstance(value, Matrix):
                    tensors[whole] = value.values
                    if value.scales is not None:
                        tensors[f"{whole}, scales"] = value.scales
                elif isinstance(value, Tensor):
                    tensors[whole] = value
    for number, (weight, bias) in enumerate(network.qkv):
        tensors |= {f"{number} qkv weight": weight, f"{number} qkv bias": bias}
    for module in (network.tower, network.projector):
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            tensors[f"{type(module).__name__} {name}"] = tensor
    return tensors


def assert_same(network: Network, expected: Network) -> None:
    """Each tensor has the same type and bits, and each number is the same."""
    got, wanted = tensors_of(network), tensors_of(expected)
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype, name
        assert got[name].equal(tensor), name
    for pair, others in zip(network.weights.layers, expected.weights.layers, strict=True):
        for part, other in zip(pair, others, strict=True):
            assert _numbers(part) == _numbers(other)
    assert _numbers(network.weights) == _numbers(expected.weights)


def _numbers(part: object) -> dict[str, float]:
    return {name: value for name, value in vars(part).items() if isinstance(value, int | float)}
