"""The Triton kernels, in the interpreter, against plain torch: the same sets always, the same bits wherever no function such as
log stands between logits and answer."""

from __future__ import annotations

import math

import executor
import pytest
import rows_for_gpu as rows
import torch

import decal
from decal.kernels import gpu
from decal.kernels.dispatch import use
from decal.kernels.program import Builder, Number, Op, Program
from decal.samplers.rule import RULES
from decal.samplers.trace import Untraceable, trace

SMALL = gpu.Config(block=256, warps=4, splits=2, bins=256, room=256, piece=64)

CHAINS = [
    "temperature(1.5) | top_k(50) | top_p(0.9) | min_p(0.05)",
    "top_k(5)",
    "top_p(0.5) | top_p(0.999999)",
    "top_p(0.9) | typical(0.5) | top_k(3)",
    "typical(0.3)",
    "typical(0.95) | temperature(0.7) | top_p(0.9)",
    "eta(0.001)",
    "top_n_sigma(1) | flatten(0.5)",
    "top_h(0.4)",
    "top_h(0.6, variant='cumulative')",
    "ees | top_p(0.9)",
    "tail_free(0.9)",
    "min_k",
    "top_p(0.9) | flatten(0.7)",
    "min_p(0.1) | flatten(1) | top_k(2)",
    "temperature(0) | top_k(3)",
    "temperature(0.001) | top_p(0.9)",
    "edt | dynamic_temperature",
]


HARD = [CHAINS[i] for i in (0, 2, 5, 6, 7, 8, 9, 11, 15)]


def program_of(text: str) -> Program:
    return trace(decal.parse(text).steps).program


def traceable() -> list[str]:
    """Every rule that can be a program, at its defaults."""
    found = []
    for name, one in RULES.items():
        if one.needs:
            continue
        try:
            program = trace([one.step()]).program
        except (Untraceable, decal.DecalError):
            continue
        if len(program.code) > 1:
            found.append(name)
    return found


def agree(got, want, program: Program) -> None:
    """The same tokens; the same values up to rounding of functions."""
    assert got.dtype == want.dtype
    assert torch.equal(got > -math.inf, want > -math.inf)
    if not program.affines:
        assert torch.equal(got, want)
    else:
        tolerance = {torch.float32: 3e-7, torch.float16: 2e-3, torch.bfloat16: 2e-2}[got.dtype]
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", traceable())
def test_every_rule(name):
    program = trace([RULES[name].step()]).program
    hard = rows.adversarial(600)
    logits = torch.cat([rows.ordinary(2, 600), *(hard[kind] for kind in ("ties", "dropped", "nan", "one hot"))])
    agree(gpu.transform(program, logits, config=SMALL)[0], executor.transform(program, logits), program)


@pytest.mark.parametrize("text", CHAINS)
def test_chains_agree_with_chains(text):
    chain, logits = decal.parse(text), rows.ordinary(3, 700, 5)
    traced = trace(chain.steps)
    with use("reference"):
        want = chain(logits, check=False)
    agree(gpu.transform(traced.program, logits, config=SMALL)[0], want, traced.program)


@pytest.mark.parametrize("kind", rows.adversarial())
@pytest.mark.parametrize("text", HARD)
def test_adversarial(kind, text):
    program, logits = program_of(text), rows.adversarial(200)[kind]
    got = gpu.transform(program, logits, config=SMALL)[0]
    agree(got, executor.transform(program, logits), program)
    if kind in ("nothing", "only nan"):
        assert got.isneginf().all()


@pytest.mark.parametrize("width", [1, 2, 3, 17, 127, 256, 257, 1025, 2999])
@pytest.mark.parametrize("text", [CHAINS[0], "typical(0.9)", "tail_free(0.9)"])
def test_widths(width, text):
    program, logits = program_of(text), rows.ordinary(2, width, width)
    agree(gpu.transform(program, logits, config=SMALL)[0], executor.transform(program, logits), program)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("text", [CHAINS[0], "top_p(0.9)", "typical(0.9)", "temperature(0.01) | top_k(9)", "top_h(0.4)"])
def test_short_floats(dtype, text):
    program, logits = program_of(text), rows.ordinary(3, 500).to(dtype)
    logits[0, 3], logits[1, 4], logits[2, 5] = math.inf, math.nan, -0.0
    agree(gpu.transform(program, logits, config=SMALL)[0], executor.transform(program, logits), program)
    wide = gpu.transform(program, logits, config=SMALL, dtype=torch.float32)[0]
    agree(wide, executor.transform(program, logits, dtype=torch.float32), program)


@pytest.mark.parametrize("text", HARD)
def test_cutting_a_row_up_changes_no_bit(text):
    program, logits = program_of(text), rows.ordinary(2, 1300, 3)
    want = gpu.transform(program, logits, config=SMALL._replace(splits=1))[0]
    for config in (
        SMALL._replace(splits=2),
        SMALL._replace(splits=5),
        SMALL._replace(block=512, splits=2, bins=512),
        SMALL._replace(room=16),
        SMALL._replace(piece=128),
    ):
        assert torch.equal(gpu.transform(program, logits, config=config)[0], want)
    turned = gpu.transform(program, logits.flip(0), config=SMALL)[0]
    assert torch.equal(turned.flip(0), want)


def test_a_list_too_short_is_no_error():
    # Many tokens with costs so near that they fall into one bin.
    logits = 1e-6 * rows.ordinary(2, 900)
    for text in ("top_k(50)", "top_p(0.37)", "typical(0.4)"):
        program = program_of(text)
        got = gpu.transform(program, logits, config=SMALL._replace(room=32))[0]
        assert torch.equal(got, executor.transform(program, logits))


@pytest.mark.parametrize("text", ["top_h(0.9)", "ees(0.3)", "min_k", "tail_free(0.97)", "top_h(0.95, variant='cumulative')"])
def test_rankings_longer_than_their_lists(text):
    program = program_of(text)
    logits = torch.cat([0.3 * rows.ordinary(1, 500), (rows.ordinary(1, 500, 5) * 2).round() / 2, torch.zeros(1, 500)])
    want = executor.transform(program, logits)
    for room, piece in ((8, 32), (32, 8), (128, 16), (256, 256)):
        config = SMALL._replace(room=room, piece=piece)
        assert torch.equal(gpu.transform(program, logits, config=config)[0], want)
    turned = Builder()  # the largest logit comes last
    turned.affine(turned.number(-0.7), turned.number(0.0))
    answer = turned.search(lambda base: (Number(turned, base + 3), []), turned.number(40), -1)
    turned.band(turned.count_upper(answer), turned.number(math.inf))
    config = SMALL._replace(room=32, piece=16)
    agree(
        gpu.transform(turned.program(), logits, config=config)[0],
        executor.transform(turned.program(), logits),
        turned.program(),
    )


def test_strides():
    program, wide = program_of(CHAINS[0]), rows.ordinary(4, 1000)
    for logits in (wide[:, 100:400], wide[::2, :300], wide[:1].expand(3, 1000), wide[:, ::2], wide.t()[:500].t()):
        agree(gpu.transform(program, logits, config=SMALL)[0], executor.transform(program, logits), program)


def test_rows_that_overlap():
    program, logits = (
        program_of("tail_free(0.6)"),
        torch.randn(40, generator=torch.Generator().manual_seed(0)).unfold(0, 30, 1)[:3],
    )
    agree(gpu.transform(program, logits, config=SMALL)[0], executor.transform(program, logits), program)


def test_in_place():
    program, logits = program_of("temperature(2) | top_k(9)"), rows.ordinary(3, 500)
    want, before = executor.transform(program, logits), logits.clone()
    padded = torch.zeros(3, 600)
    padded[:, 50:550] = before
    view = padded[:, 50:550]
    got, _ = gpu.transform(program, view, out=view, config=SMALL)
    assert got is view
    agree(view, want, program)
    assert not padded[:, :50].any()
    assert not padded[:, 550:].any()
    turned = torch.zeros(500, 3).t()
    gpu.transform(program, logits, out=turned, config=SMALL)
    agree(turned, want, program)
    with pytest.raises(ValueError, match="memory of its own"):
        gpu.transform(program, logits, out=logits[:1].expand(3, 500), config=SMALL)


def test_kept_logits_come_back_as_they_were():
    logits = rows.ordinary(1, 300)
    logits[0, 5], logits[0, 6] = math.inf, -0.0
    got = gpu.transform(program_of("top_p(0.9999999)"), logits, config=SMALL)[0]
    assert got[0, 5] == math.inf
    got = gpu.transform(program_of("temperature(2)"), logits, mask=True, config=SMALL)[0]
    assert torch.equal(got.view(torch.int32), logits.view(torch.int32))


def test_parameters_of_rows():
    chain = decal.temperature(torch.tensor([[0.0], [1.0], [1.7]])) | decal.top_k(torch.tensor([[0], [3], [40]]))
    chain |= decal.top_p(torch.tensor([[1.0], [0.9], [0.5]]))
    traced, logits = trace(chain.steps), rows.ordinary(3, 500)
    parameters = traced.parameters()
    assert parameters.shape[1] == 3
    want = executor.transform(traced.program, logits, parameters)
    agree(gpu.transform(traced.program, logits, parameters, config=SMALL)[0], want, traced.program)
    one = gpu.transform(traced.program, logits[1:2], parameters[1:2], config=SMALL)[0]
    assert torch.equal(one[0], gpu.transform(traced.program, logits, parameters, config=SMALL)[0][1])


@pytest.mark.parametrize("scale", [-1.5, -math.inf, math.inf, 0.0])
def test_scales_that_no_rule_has(scale):
    builder = Builder()
    builder.affine(builder.number(scale), builder.number(0.25))
    builder.band(builder.count_upper(7), builder.number(math.inf))
    builder.affine(builder.number(-0.5), builder.number(0.0))
    builder.band(builder.mass_upper(0.6), builder.number(math.inf))
    program, logits = builder.program(), rows.ordinary(2, 400)
    agree(gpu.transform(program, logits, config=SMALL)[0], executor.transform(program, logits), program)


@pytest.mark.parametrize(
    ("low", "high"),
    [(0.0, 1.0), (1e9, math.inf), (3.0, 2.0), (math.nan, 0.5), (-math.inf, -1.0), (0.5, math.nan)],
)
def test_any_band(low, high):
    builder = Builder()
    builder.band(builder.number(low), builder.number(high))
    builder.band(builder.count_upper(20), builder.number(math.inf))
    program, logits = builder.program(), rows.ordinary(2, 400)
    agree(gpu.transform(program, logits, config=SMALL)[0], executor.transform(program, logits), program)


def test_arithmetic():
    operands = (-math.inf, -700.5, -2.5, -1e-9, -0.0, 0.5, 1.0, 2.5, 1e17, math.inf, math.nan)
    for first in operands:
        builder = Builder()
        x = builder.parameter()
        y = builder.parameter()
        outputs = [x + y, x - y, x * y, x / y, x.minimum(y), x.maximum(y), x < y, x <= y, x == y, x != y, x & y, x | y]
        outputs += [-x, x.log(), x.exp(), x.sqrt(), x.log1p(), x.expm1(), x.floor(), x.round(), abs(x), ~x]
        outputs.append(builder.emit(Op.POW, x, y))
        program = builder.program()
        parameters = torch.tensor([[first, second] for second in operands], dtype=torch.float64)
        work = gpu.prepare(program, torch.zeros(len(operands), 5), parameters, SMALL)
        gpu.read(work)
        for i, pair in enumerate(parameters):
            want = executor.registers_of(program, pair)
            got = work.registers[i]
            for out in outputs:
                torch.testing.assert_close(got[out.register], want[out.register], rtol=1e-13, atol=0, equal_nan=True)


@pytest.mark.parametrize("text", [CHAINS[0], "temperature(3)", "typical(0.6)", "min_k", "temperature(0)"])
def test_draws(text):
    program, logits = program_of(text), rows.ordinary(12, 700, 9)
    logits[3], logits[4] = -math.inf, 1.5
    seeds, positions = torch.arange(12) * 7919 - 5, torch.arange(12) % 4
    want = executor.sample(program, logits, seeds, positions)
    for config in (SMALL, SMALL._replace(splits=1), SMALL._replace(splits=3, block=512)):
        assert torch.equal(gpu.sample(program, logits, seeds, positions, config=config)[0], want)


def test_launches_are_those_that_are_promised(monkeypatch):
    for text, number in (("min_p(0.1)", 2), (CHAINS[0], 6), ("typical(0.9)", 6), ("top_h(0.4)", 9), ("tail_free(0.9)", 8)):
        program, counted = program_of(text), []
        assert gpu.launches(program) == number
        for name in ("extremes", "runner_up", "moments", "count_bins", "choose", "list_top", "ranking", "curvature", "write"):
            kernel = getattr(gpu, name)
            monkeypatch.setattr(gpu, name, Counting(kernel, counted))
        gpu.transform(program, rows.ordinary(2, 200), config=SMALL)
        monkeypatch.undo()
        assert len(counted) == number


class Counting:
    """A kernel that says when it is launched."""

    def __init__(self, kernel, counted):
        self._kernel, self._counted = kernel, counted

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self._counted.append(grid)
            return self._kernel[grid](*args, **kwargs)

        return launch


def test_the_table():
    for count, width in ((1, 1), (1, 128256), (8, 32000), (300, 256000), (2, 2**21 - 1)):
        config = gpu.config_of(count, width)
        assert config.splits * count <= max(gpu.PROGRAMS, count)
    program = program_of(CHAINS[0])
    logits = rows.ordinary(2, 5000)
    agree(gpu.transform(program, logits)[0], executor.transform(program, logits), program)
    with pytest.raises(TypeError, match="float64"):
        gpu.transform(program, logits.double())


def test_the_check_that_a_device_has_to_pass(monkeypatch):
    gpu.check("cpu")
    monkeypatch.setattr(gpu.reference, "draw", lambda *_: torch.tensor([0, 0, 0]))
    with pytest.raises(RuntimeError, match="the kernels give other results on cpu"):
        gpu.check("cpu")
