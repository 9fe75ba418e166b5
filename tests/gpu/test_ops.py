"""Programs as operators of torch; on a CPU they run what the CPU runs."""

from __future__ import annotations

import executor
import pytest
import rows_for_gpu as rows
import torch

import decal
from decal.kernels import ops
from decal.samplers.trace import trace

TEXTS = ["temperature(1.5) | top_k(50) | top_p(0.9) | min_p(0.05)", "top_p(0.9)"]
PROGRAMS = [trace(decal.parse(text).steps).program for text in TEXTS]


@pytest.mark.parametrize("program", PROGRAMS, ids=TEXTS)
def test_a_program_survives(program):
    assert ops.program_of(*ops.arguments_of(program)) == program


@pytest.mark.parametrize("program", PROGRAMS, ids=TEXTS)
def test_operators_are_sound(program):
    logits, arguments = rows.ordinary(3, 500), ops.arguments_of(program)
    torch.library.opcheck(torch.ops.decal.transform.default, (logits, *arguments))
    seeds, positions = torch.arange(3), torch.zeros(3, dtype=torch.int64)
    torch.library.opcheck(torch.ops.decal.sample.default, (logits, seeds, positions, *arguments))
    torch.testing.assert_close(torch.ops.decal.transform(logits, *arguments), executor.transform(program, logits))
    drawn = torch.ops.decal.sample(logits, seeds, positions, *arguments)
    assert torch.equal(drawn, executor.sample(program, logits, seeds, positions))


def test_parameters():
    traced = trace(decal.top_k(torch.tensor([[2], [3]])).steps)
    logits = rows.ordinary(2, 100)
    got = torch.ops.decal.transform(logits, *ops.arguments_of(traced.program), traced.parameters())
    assert got.isfinite().sum(-1).tolist() == [2, 3]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_compile_takes_them_whole():
    program = PROGRAMS[0]
    arguments = ops.arguments_of(program)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(logits):
        return torch.ops.decal.transform(2 * logits, *arguments).softmax(-1)

    logits = rows.ordinary(2, 300)
    torch.testing.assert_close(step(logits), executor.transform(program, 2 * logits).softmax(-1))
