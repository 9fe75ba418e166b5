"""Programs as operators of torch, so that torch.compile takes a chain as one node and doesn't look inside.

``torch.ops.decal.transform`` and ``torch.ops.decal.sample`` take a program as plain numbers, see `arguments_of`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from decal.kernels.program import FIELDS, Program


def arguments_of(program: Program) -> tuple[list[int], int, list[int], list[float], list[int]]:
    """A program as the operators take it: instructions one after another, number of registers, which of them hold constants,
    the constants, and which hold parameters."""
    places, values = [r for r, _ in program.constants], [v for _, v in program.constants]
    return [field for one in program.code for field in one], program.registers, places, values, list(program.columns)


def program_of(
    code: Sequence[int], registers: int, places: Sequence[int], values: Sequence[float], columns: Sequence[int]
) -> Program:
    """The program that `arguments_of` took apart."""
    return _program(tuple(code), registers, tuple(places), tuple(values), tuple(columns))


@lru_cache(maxsize=512)
def _program(
    code: tuple[int, ...], registers: int, places: tuple[int, ...], values: tuple[float, ...], columns: tuple[int, ...]
) -> Program:
    instructions = tuple(code[i : i + FIELDS] for i in range(0, len(code), FIELDS))
    return Program(instructions, registers, tuple(zip(places, values, strict=True)), columns)


def _module(device: torch.device) -> ModuleType:
    # The modules import compilers, which a program that never runs on a device shouldn't have to have.
    if device.type == "cpu":
        from decal.kernels import cpu

        return cpu
    from decal.kernels import gpu

    return gpu


@torch.library.custom_op("decal::transform", mutates_args=())
def transform(
    logits: Tensor,
    code: list[int],
    registers: int,
    places: list[int],
    values: list[float],
    columns: list[int],
    parameters: Tensor | None = None,
    mask: bool = False,
) -> Tensor:
    """What a program makes of logits (B, V)."""
    program = program_of(code, registers, places, values, columns)
    found = _module(logits.device).transform(program, logits, parameters, mask=mask)[0]
    # An operator's result is nobody else's memory, and laid out as the fake one.
    return found.contiguous()


@transform.register_fake
def _(logits: Tensor, *_: Any, **__: Any) -> Tensor:
    return logits.new_empty(logits.shape)


@torch.library.custom_op("decal::sample", mutates_args=())
def sample(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    code: list[int],
    registers: int,
    places: list[int],
    values: list[float],
    columns: list[int],
    parameters: Tensor | None = None,
) -> Tensor:
    """Tokens (B,) drawn from what a program makes of logits."""
    program = program_of(code, registers, places, values, columns)
    return _module(logits.device).sample(program, logits, seeds, positions, parameters)[0]


@sample.register_fake
def _(logits: Tensor, *_: Any, **__: Any) -> Tensor:
    return logits.new_empty(logits.shape[:1], dtype=torch.int64)
