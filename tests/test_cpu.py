"""The compiled CPU path against plain torch: the same tokens, whatever the row, the batch or the number of threads."""

from __future__ import annotations

import copy
import gc
import math
import os
import pickle
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from rows import KINDS, TRACEABLE, Source

import decal
from decal.kernels import cpu, threads
from decal.kernels.dispatch import choose, use
from decal.samplers.errors import DecalError

CUMULATIVE = "top_h(0.7, variant='cumulative')"
WIDTHS = (1, 2, 31, 33, 500, 1025, 2049, 4097)


def reference(chain, x, what="__call__", *args):
    with use("reference"):
        return getattr(chain, what)(x, *args, check=False)


def assert_same(chain, x):
    """Kept tokens are the same, their masked logits too bit by bit, values up to the last digits of their type."""
    masked, wanted = chain.mask(x, check=False), reference(chain, x, "mask")
    assert torch.equal(masked, wanted), str(chain)
    values, wanted = chain(x, check=False), reference(chain, x)
    kept = wanted > -math.inf
    assert torch.equal(values > -math.inf, kept), str(chain)
    digits = 16 * torch.finfo(x.dtype).eps
    torch.testing.assert_close(values[kept], wanted[kept], rtol=digits, atol=digits)
    seeds, place = torch.arange(len(x)), 7
    assert torch.equal(chain.sample(x, seeds, place, check=False), reference(chain, x, "sample", seeds, place)), str(chain)


def test_this_machine_runs_compiled_code():
    assert choose("cpu").name == "cpu"


@pytest.mark.parametrize("kind", KINDS)
def test_chains_on_hard_rows(kind):
    source = Source(KINDS.index(kind))
    for _ in range(60):
        chain, x = source.chain(), source.rows(kind, 1 + source.below(5), 1 + source.below(3000))
        assert_same(chain, x)


@pytest.mark.parametrize("name", TRACEABLE)
def test_rules_at_every_width(name):
    source = Source(0)
    for width in WIDTHS:
        for kind in ("gaussian", "peaked", "tied", "half dropped"):
            assert_same(decal.samplers.chain.Chain((source.step([name]),)), source.rows(kind, 2, width))


@pytest.mark.parametrize(
    "text", ["top_p(0.9)", "typical(0.9)", "top_k(3000)", "temperature(1.3) | top_p(0.999)", "top_h(0.5)", CUMULATIVE]
)
@pytest.mark.parametrize("kind", ["gaussian", "peaked", "rising", "narrow"])
def test_large_vocabularies(text, kind):
    assert_same(decal.parse(text), Source(1).rows(kind, 1, 151_936))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_other_types(dtype, kind):
    source = Source(5)
    for _ in range(5):
        assert_same(source.chain(), source.rows(kind, 3, 1 + source.below(2500)).to(dtype))


@pytest.mark.parametrize("text", ["temperature(0.7) | top_p(0.9) | min_p(0.05)", "typical(0.8)", "flatten(0.5)"])
def test_a_row_is_the_same_in_any_batch_and_on_any_number_of_threads(text, monkeypatch):
    chain, x = decal.parse(text), Source(2).rows("gaussian", 12, 3001)
    seeds, places = torch.arange(12) * 1001, torch.arange(12)
    whole, tokens = chain(x), chain.sample(x, seeds, places)
    for row in range(12):
        assert torch.equal(chain(x[row : row + 1])[0], whole[row])
        assert chain.sample(x[row : row + 1], seeds[row], places[row]) == tokens[row]
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(chain(x[order]), whole[order])
    assert torch.equal(chain.sample(x[order], seeds[order], places[order]), tokens[order])
    monkeypatch.setattr(cpu, "PARALLEL", 1)
    for number in (2, 3, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=number: n)
        assert torch.equal(chain(x), whole)
        assert torch.equal(chain.sample(x, seeds, places), tokens)


def test_python_threads_stand_in_for_openmp(monkeypatch):
    chain, x = decal.parse("temperature(0.7) | top_p(0.9)"), Source(2).rows("gaussian", 12, 3001)
    whole = chain(x)
    monkeypatch.setattr(cpu, "PARALLEL", 1)
    monkeypatch.setattr(threads, "_team", lambda process: None)
    assert torch.equal(chain(x), whole)


def test_many_callers_at_once(monkeypatch):
    chain, x = decal.parse("temperature(0.7) | top_p(0.9) | min_p(0.01)"), Source(2).rows("gaussian", 64, 3001)
    parts = x.split(4)
    wanted = [chain(part) for part in parts]
    monkeypatch.setattr(cpu, "PARALLEL", 1)
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            assert all(map(torch.equal, pool.map(chain, parts), wanted))


FORKED = """
import os, sys, torch, decal
from decal.kernels import cpu, threads
chain, x = decal.parse("top_p(0.9)"), torch.arange(24000.0).reshape(8, 3000) / 3000
cpu.PARALLEL = 1
torch.set_num_threads(2)
wanted = chain(x)
child = os.fork()
if child == 0:
    os._exit(not torch.equal(chain(x), wanted))
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_does_not_wait_for_the_threads_of_its_parent():
    assert subprocess.run([sys.executable, "-c", FORKED], timeout=300).returncode == 0


def test_rows_any_distance_apart():
    chain = decal.parse("temperature(0.7) | top_p(0.8)")
    x = Source(3).rows("gaussian", 6, 4000)
    for view in (x[:, 100:1100], x[::2], x.T[:2000:7], x[:1].expand(4, -1), x[1:2, 3:4]):
        before = view.clone()
        assert torch.equal(chain(view), chain(view.clone()))
        assert torch.equal(view, before)
        assert_same(chain, view)


def test_parameters_of_each_row():
    x = Source(4).rows("gaussian", 4, 2500)
    p, t = torch.tensor([[0.1], [0.5], [1.0], [0.9]]), torch.tensor([[1.0], [0.0], [2.0], [0.7]])
    chain = decal.temperature(t) | decal.top_p(p)
    assert_same(chain, x)
    alone = torch.cat([(decal.temperature(float(t[i])) | decal.top_p(float(p[i])))(x[i : i + 1]) for i in range(4)])
    assert torch.equal(chain(x), alone.masked_fill(alone.isneginf(), -math.inf))


@pytest.mark.parametrize("copied", [lambda c: pickle.loads(pickle.dumps(c)), copy.deepcopy])
def test_a_chain_that_has_run_can_be_copied(copied):
    x = Source(6).rows("gaussian", 3, 2100)
    for text in ("temperature(2) | top_p(0.9)", "sparsemax | top_k(3)"):
        chain = decal.parse(text)
        whole = chain(x)
        other = copied(chain)
        del chain
        gc.collect()
        assert str(other) == text or decal.parse(text) == other
        assert torch.equal(other(x), whole)
    program = decal.parse("top_p(0.9)").segments[0].program
    cpu.transform(program, x)
    assert copied(program).addresses != program.addresses


def test_few_widths_hold_their_memory():
    chain = decal.parse("top_p(0.9)")
    for width in range(3000, 3040):
        chain(torch.randn(1, width))
    assert len(cpu._local.memory) <= 4
    assert len({id(plan.memory) for plan in cpu._local.plans.values()}) <= 4


def test_in_place():
    x = Source(6).rows("peaked", 3, 2100)
    for text in ("top_p(0.9)", "temperature(2)", "top_k(5) | flatten(1)", "typical(0.5)"):
        chain = decal.parse(text)
        y = x.clone()
        program = chain.segments[0].program
        out, _ = cpu.transform(program, y, out=y)
        assert out is y
        assert torch.equal(y, chain(x))


def test_bad_rows_are_told():
    chain, x = decal.parse("top_p(0.9)"), torch.zeros(3, 50)
    for value, wanted in ((math.nan, "got nan in row 1 at token 4"), (math.inf, "got inf in row 1 at token 4")):
        bad = x.clone()
        bad[1, 4] = value
        with pytest.raises(DecalError, match=wanted):
            chain(bad)
        with pytest.raises(DecalError, match=wanted):
            chain.sample(bad, 0, 0)
    bad = x.clone()
    bad[2] = -math.inf
    with pytest.raises(DecalError, match="row 2 has none"):
        chain(bad)
    assert chain(bad, check=False)[2].isneginf().all()


def test_gradients_go_through_plain_torch():
    x = torch.randn(2, 20, requires_grad=True)
    decal.parse("temperature(2)")(x).sum().backward()
    assert torch.allclose(x.grad, torch.full_like(x, 0.5))


def test_memory_of_an_output_is_not_used_again_while_anybody_holds_it(monkeypatch):
    monkeypatch.setattr(cpu, "REUSED", 1)
    cpu._kept.clear()
    chain, x = decal.parse("min_p(0.1)"), Source(7).rows("gaussian", 2, 900)
    first = chain(x)
    row, kept = first[1], first.clone()
    del first
    others = [chain(x + 1 + i) for i in range(4)]
    assert torch.equal(row, kept[1])
    place = others[-1].data_ptr()
    assert place not in {y.data_ptr() for y in others[:-1]}
    del others[-1]
    gc.collect()
    assert chain(x).data_ptr() == place


def test_little_memory_is_kept_whatever_sizes_come(monkeypatch):
    monkeypatch.setattr(cpu, "REUSED", 1)
    chain, x = decal.parse("min_p(0.1)"), torch.zeros(40, 100)
    for rows in range(1, 40):
        chain(x[:rows])
    gc.collect()
    assert len(cpu._kept) <= cpu.KEPT


def test_dropped_tokens_stay_so_behind_any_maps():
    x = torch.full((1, 3000), -math.inf)
    x[0, :10] = torch.linspace(0, 2, 10)
    for text in ("top_p(0.9)", "typical(0.5)", "top_h(0.5)"):
        assert_same(decal.parse(f"temperature(2) | temperature(1e308) | {text}"), x)


def test_without_numba_chains_run_in_torch_and_say_so_once():
    code = """
import sys, warnings
sys.modules["numba"] = None
import importlib.util as u
find = u.find_spec
import torch, decal
from decal.kernels import dispatch
dispatch.find_spec = lambda name: None if name == "numba" else find(name)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for _ in range(3):
        kept = decal.parse("top_p(0.5)")(torch.arange(5.0)[None])
print(len(seen), seen[0].message, int(kept.isfinite().sum()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(
        "1 decal: chains run in plain torch, which is many times slower, because numba is not installed"
    )
    assert done.stdout.rstrip().endswith(" 1")


def test_chains_with_steps_that_only_torch_can_do():
    source = Source(8)
    for text in ("temperature(1.5) | top_p(0.9) | quadratic(0.3)", "min_p(0.05) | target_entropy(0.8) | top_k(7)", "sparsemax"):
        for kind in ("gaussian", "peaked", "half dropped"):
            assert_same(decal.parse(text), source.rows(kind, 3, 700))


def test_explain_says_what_runs_where(capsys):
    decal.parse("temperature(1.5) | min_p(0.1) | quadratic(0.3)").explain()
    shown = capsys.readouterr().out
    assert "backend: cpu (compiled by numba" in shown
    assert "but plain torch for quadratic: quadratic looks at single tokens" in shown
    with use("reference"):
        decal.parse("min_p(0.1)").explain()
    assert "backend: reference (plain torch, as asked for)" in capsys.readouterr().out
    with pytest.raises(ValueError, match="is auto or reference, got 'gpu'"), use("gpu"):
        pass


def test_maps_that_turn_a_row_around_are_left_to_torch(monkeypatch):
    monkeypatch.setattr("decal.samplers.rule.RULES", dict(decal.RULES))

    @decal.rule()
    def mirrored(row, by=decal.Param(1.0, low=-9, high=9)):
        """Multiply logits."""
        return decal.Affine(by, torch.zeros_like(by))

    x = Source(9).rows("gaussian", 3, 800)
    rows = torch.tensor([[-1.0], [2.0], [-0.5]])
    for chain in (mirrored(-1.0) | decal.top_p(0.5), mirrored(rows), mirrored(-2.0) | decal.quadratic(0.3)):
        assert_same(chain, x)


def test_compiling_that_takes_long_is_told(monkeypatch, caplog):
    class Compiled:
        address = 0

    def entry(seconds):
        time.sleep(seconds)
        return Compiled

    monkeypatch.setattr(cpu, "SOON", 0.5)
    cpu._compiled(entry, 0.0)
    time.sleep(0.7)
    assert not caplog.records
    cpu._compiled(entry, 1.0)
    assert [record.message for record in caplog.records] == [
        "decal compiles its CPU code for this machine; that takes a while, but only once"
    ]
