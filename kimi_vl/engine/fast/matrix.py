"""A weight matrix, or a stack of them, as the kernels read it: of 16, 8 or 4 bits."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kimi_vl.engine.fast.kernels.quantise import WORDS, dequantise, group_size, quantise_groups, quantise_rows


@dataclass(frozen=True)
class Matrix:
    """Stands for values * scales. 16 bits mean a floating type, as the model has it, whatever its size."""

    values: Tensor  # [..., rows, columns] of a floating type, or of 8 or 4 bits [..., rows, groups * WORDS] int32
    columns: int
    bits: int = 16
    scales: Tensor | None = None  # of 8 bits [..., rows] float32, of 4 bits [..., rows, groups] bfloat16

    @classmethod
    def of(cls, values: Tensor) -> "Matrix":
        """Of 16 bits: [..., rows, columns] of a floating type, not copied."""
        return cls(values.detach(), values.shape[-1])

    @classmethod
    def empty(cls, shape: tuple[int, ...], bits: int, device: torch.device, dtype: torch.dtype) -> "Matrix":
        """Room for [..., rows, columns], to be filled by `store`; the type is that of 16 bits."""
        if bits == 16:
            return cls.of(torch.empty(shape, dtype=dtype, device=device))
        *rows, columns = shape
        groups = -(-columns // group_size(bits))
        words = torch.empty(*rows, groups * WORDS, dtype=torch.int32, device=device)
        if bits == 8:
            return cls(words, columns, bits, torch.empty(rows, dtype=torch.float32, device=device))
        return cls(words, columns, bits, torch.empty(*rows, groups, dtype=torch.bfloat16, device=device))

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., rows, columns]"""
        return *self.values.shape[:-1], self.columns

    @property
    def units(self) -> int:
        """Elements of `values` in a row: numbers, or words."""
        return self.values.shape[-1]

    @property
    def planes(self) -> int:
        """Numbers of such an element."""
        return 1 if self.bits == 16 else 32 // self.bits

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def __getitem__(self, index: Any) -> "Matrix":
        """One of a stack, or some of them, or some rows of a matrix."""
        scales = None if self.scales is None else self.scales[index]
        return Matrix(self.values[index], self.columns, self.bits, scales)

    def float(self) -> Tensor:
        """[..., rows, columns] float32."""
        return self.values.float() if self.bits == 16 else self.dequantised(torch.float32)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """[..., rows, columns] of a floating type, of a matrix of 8 or 4 bits."""
        assert self.scales is not None
        out = torch.empty(self.shape, dtype=dtype, device=self.values.device)
        dequantise(self.values, self.scales, self.bits, out)
        return out

    def store(self, first_row: int, piece: Tensor) -> None:
        """Writes some whole rows, in the matrix's 8 or 4 bits; nobody waits for a GPU that fetches them.

        Args:
            first_row: where they go.
            piece: [rows, columns] of a floating type, on any device.
        """
        assert self.scales is not None
        rows = slice(first_row, first_row + len(piece))
        quantise = quantise_rows if self.bits == 8 else quantise_groups
        piece = piece.to(self.values.device, non_blocking=True).contiguous()
        quantise(piece, self.values[rows], self.scales[rows])

    def quantised(self, bits: int) -> "Matrix":
        """A copy of so many bits; the matrix itself if it has them."""
        if bits == self.bits:
            return self
        result = Matrix.empty(self.shape, bits, self.values.device, self.values.dtype)
        if not self.values.is_meta:  # there it is about the bytes
            result._rows().store(0, self.values.view(-1, self.columns))
        return result

    def _rows(self) -> "Matrix":
        """A stack as one matrix, of all rows."""
        stacked = len(self.shape) - 2
        scales = None if self.scales is None else self.scales.flatten(0, stacked)
        return Matrix(self.values.flatten(0, stacked), self.columns, self.bits, scales)
