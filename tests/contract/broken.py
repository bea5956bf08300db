"""Predictors that can no longer answer."""

from typing import Any

import torch

import predict


class LostGpu(predict.Predictor):
    """On the CPU, where CUDA is made to look as it does after a sticky error."""

    def setup(self) -> None:
        super().setup()
        self.service._engine._decode = _fail
        torch.cuda.synchronize = _fail
        torch.cuda.is_initialized = lambda: True


class DeadEngine(predict.Predictor):
    """Its engine's thread has ended."""

    def setup(self) -> None:
        super().setup()
        self.service._engine.close()


def _fail(*_: Any) -> None:
    raise torch.AcceleratorError("CUDA error: device-side assert triggered")
