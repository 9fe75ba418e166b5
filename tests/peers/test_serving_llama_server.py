"""Chains in a running server of llama.cpp, on the default model's GGUF file: its own samplers, asked what they drew from."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from replay import REAL_CHAINS

from decal import DecalError
from decal.eval import models
from decal.serving.llama_cpp import Live, Server, request_fields
from decal.serving.verify import Finding, verify

pytestmark = [pytest.mark.llama_server, pytest.mark.model]

CHAINS = [
    *REAL_CHAINS[:5],
    "typical(0.9)",
    "top_n_sigma(1.0)",
    "min_p(0.05) | dynamic_temperature(1.0, 0.5)",
    "presence_penalty(0.5, scope='all') | top_k(30)",
    "dry(0.8, 1.75, 1) | min_p(0.05)",
    "temperature(0.3)",
]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The server in xllamacpp, which is llama.cpp's own, with its own defaults: top_k 40, top_p .95, min_p .05; told to
    ignore the end of text."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = os.environ.get("DECAL_GGUF") or str(models.gguf_file("smollm2"))
    params.n_ctx, params.n_parallel, params.cpuparams.n_threads = 1024, 2, 1
    params.sampling.ignore_eos = True
    server = xllamacpp.Server(params)
    yield server.listening_address
    del server


@pytest.fixture(scope="module")
def live(url: str) -> Server:
    return Live.connect(url)


def ask(live: Server, chain: str, **kwargs: int) -> Finding:
    kwargs = {"generations": 6, "length": 3, "draws": 0, **kwargs}
    (finding,) = verify(live, [chain], **kwargs).findings
    return finding


@pytest.mark.parametrize("chain", CHAINS)
def test_it_does_what_the_chain_says(live: Server, chain: str) -> None:
    found = ask(live, chain)
    assert found.ok, found
    assert found.steps >= 12
    assert not found.seeded


def test_its_draws_are_those_of_the_chain(live: Server) -> None:
    prompts = ["Random colour: blue\nRandom colour: red\nRandom colour:"]
    (found,) = verify(live, ["temperature(1.5) | top_k(8)"], prompts, generations=2, draws=200).findings
    assert found.ok, found
    assert found.p is not None


def test_a_sampler_that_isn_t_switched_off_is_named(live: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    from decal.serving import llama_cpp

    def leaky(chain: str, **kwargs: object) -> llama_cpp.Fields:
        fields, report = request_fields(chain, **kwargs)
        fields |= {"samplers": [*fields["samplers"], "top_k"], "top_k": 3}
        return llama_cpp.Fields(fields, report)

    monkeypatch.setattr(llama_cpp, "request_fields", leaky)
    found = ask(live, "temperature(1.5)")
    assert not found.ok
    assert any("top_k(3)" in one for one in found.interference)


def test_what_its_samplers_do_differently_shows_and_is_said(live: Server) -> None:
    """llama.cpp's mirostat takes the surprise of a token after the cut, so its mu goes another way than the paper's."""
    report = verify(live, ["mirostat(2.0, 0.9)"], generations=10, length=6, draws=0)
    assert not report.ok
    assert "llama.cpp takes the surprise of a token after the cut" in report.findings[0].interference[0]


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        ("flatten(0.5)", "llama.cpp has no such sampler"),
        ("guided(1.0)", "llama.cpp has no such sampler"),
        ("repetition_penalty(1.3, form='legacy')", "depends on a constant of the logits"),
    ],
)
def test_it_says_what_can_t_be_asked(live: Server, chain: str, message: str) -> None:
    assert message in ask(live, chain).refused


def test_seeds_of_decal_s_are_refused(live: Server) -> None:
    with pytest.raises(DecalError, match="knows no decal_seed"):
        live.write([[1, 2]], {"decal": "min_p(0.1)", "decal_seed": 3}, 1, False)


def test_its_vocabulary_and_context_are_the_model_s(live: Server) -> None:
    assert live.rows([[1, 2, 3]]).shape == (1, len(live.tokenizer))
    assert live._context == 512  # of each of two slots


def test_the_command_asks_it(url: str, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from decal.eval.commands import cli

    out = tmp_path / "report.json"
    asked = ["verify", "--engine", "llama_cpp", "--url", url, "--chain", "min_p(0.1)", "--generations", "3", "--draws", "0"]
    done = CliRunner().invoke(cli, [*asked, "--length", "2", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "llama.cpp, its server" in out.read_text()
