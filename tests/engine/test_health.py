"""When an engine can no longer answer."""

from collections.abc import Callable, Iterator

import pytest
import torch

from kimi_vl.engine.base import Engine, Generation, ModelInputs, SamplingParams
from kimi_vl.errors import InvalidRequest

PROMPT = ModelInputs(torch.tensor([[1, 2, 3]]))
PARAMS = SamplingParams(max_new_tokens=1, stop_ids=frozenset())
STICKY = torch.AcceleratorError("CUDA error: device-side assert triggered")


class FailingEngine(Engine):
    """Raises what it is given."""

    def __init__(self) -> None:
        super().__init__(context_length=100)
        self.error: BaseException | None = None

    def _decode(self, inputs: ModelInputs, generation: Generation) -> None:
        if self.error:
            raise self.error
        generation.emit(7)

    def fail(self, error: BaseException) -> None:
        """One request that ends with an error."""
        self.error = error
        with pytest.raises(type(error)):
            list(self.generate(PROMPT, PARAMS))
        self.error = None


@pytest.fixture
def engine() -> Iterator[FailingEngine]:
    engine = FailingEngine()
    yield engine
    engine.close()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A GPU whose next calls end with the given errors; the last of them stays for ever if told so."""

    def answers(*errors: Exception, for_ever: bool = False) -> None:
        waiting = list(errors)

        def synchronize() -> None:
            if waiting:
                raise waiting[0] if for_ever else waiting.pop(0)

        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "synchronize", synchronize)

    return answers


def test_an_engine_without_failures_is_healthy(engine: FailingEngine) -> None:
    assert list(engine.generate(PROMPT, PARAMS)) == [7]
    assert engine.healthy


@pytest.mark.parametrize(
    "error", [STICKY, RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), KeyError("x")]
)
def test_whatever_failed_a_gpu_that_no_longer_answers_is_lost(
    engine: FailingEngine, gpu: Callable[..., None], error: Exception
) -> None:
    gpu(STICKY, for_ever=True)
    engine.fail(error)
    assert not engine.healthy


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.AcceleratorError("CUDA error: invalid configuration argument"),
        InvalidRequest("The first picture is damaged."),
    ],
)
@pytest.mark.parametrize("told", [(), (RuntimeError("CUDA error: out of memory"),)])
def test_a_gpu_that_answers_again_is_not(
    engine: FailingEngine, gpu: Callable[..., None], error: Exception, told: tuple[Exception, ...]
) -> None:
    gpu(*told)
    engine.fail(error)
    assert engine.healthy
    assert list(engine.generate(PROMPT, PARAMS)) == [7]


def test_without_a_gpu_none_is_lost(engine: FailingEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    engine.fail(RuntimeError("CUDA error"))
    assert engine.healthy


def test_an_engine_whose_thread_has_ended_is_not_healthy(engine: FailingEngine) -> None:
    engine.close()
    assert not engine.healthy
