"""decal in SGLang itself: an engine, a server with the plug-in, requests that are bad, and traffic. Run by .ci/sglang.

On a machine without a GPU the engine runs on the CPU with torch's attention, see .ci/sglang.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest
import torch
from replay import REAL_CHAINS

from decal import DecalError, History
from decal.serving.engine import http
from decal.serving.request import Request, as_params
from decal.serving.sglang import PROCESSOR, Live, _sampling_params, request_fields
from decal.serving.verify import PROMPTS, verify

pytestmark = [pytest.mark.sglang, pytest.mark.filterwarnings("ignore")]

# The plug-in, if it is installed, is for the tests of the server.
os.environ["SGLANG_PLUGINS"] = "none"

GPU = torch.cuda.is_available()
SETTINGS: dict[str, Any] = {"dtype": "float32", "max_running_requests": 16, "random_seed": 1}
if not GPU:
    SETTINGS |= {"device": "cpu", "attention_backend": "torch_native", "disable_cuda_graph": True}

LONG = " ".join(PROMPTS)
"""Read in parts, where SGLang is told to read few tokens at a time."""
READS_TEXT = ["dry(0.8) | min_p(0.02)", "mirostat(3.0)"]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the built-in model, or the one that DECAL_SGLANG_MODEL names."""
    if "DECAL_SGLANG_MODEL" in os.environ:
        return os.environ["DECAL_SGLANG_MODEL"]
    from decal.eval.models import load

    folder = tmp_path_factory.mktemp("smollm2")
    found = load("smollm2")
    found.model.save_pretrained(folder)
    found.tokenizer.save_pretrained(folder)
    return str(folder)


def check(live: Live, chains: list[str], prompts: list[str]) -> None:
    """Kept sets at every step, and tokens drawn with a seed, are those of the reference."""
    report = verify(live, chains, prompts, generations=len(prompts), length=4, draws=0)
    print(report)
    assert [finding.refused for finding in report.findings] == [""] * len(chains)
    for finding in report.findings:
        assert finding.differing == ()
        assert finding.distance < 1e-4
        assert finding.same == finding.seeded > 0
        assert finding.steps > 0 or "xtc" in finding.chain


def follow(live: Live, request: Request, prompt: list[int], tokens: list[int]) -> list[int]:
    """What the request's chain draws behind the prompt and the first 0, 1, ... tokens."""
    chain = request.given(live.tokenizer).chain
    rows = live.rows([prompt + tokens[:size] for size in range(len(tokens))])
    state = chain.init(1) if "state" in chain.needs else None
    found = []
    for size, row in enumerate(rows):
        history = History.of([prompt + tokens[:size]], prompt=len(prompt), request=[request.seed])
        token, seen = chain.draw(row[None], [request.seed], [len(prompt) + size], state, history=history, check=False)
        found.append(int(token))
        if state is not None:
            state = chain.observe(state, seen, torch.tensor([tokens[size]]))
    return found


def traffic(rng: random.Random, tokenizer: Any, chains: list[str], count: int, longest: int) -> list[Any]:
    """Requests: tokens of a prompt, what is asked of decal, always with a seed, and how many tokens."""
    made = []
    for _ in range(count):
        chain = rng.choice(chains)
        answers = ["red", "green", "light green", "blue"] if "guided" in chain else None
        asked = as_params(chain, rng.randrange(1000), answers)
        made.append((tokenizer(rng.choice(PROMPTS))["input_ids"], asked, rng.randrange(longest // 3, longest)))
    return made


def check_traffic(live: Live, sent: list[Any], answers: list[Any]) -> None:
    same = total = 0
    for (prompt, asked, length), answer in zip(sent, answers, strict=True):
        tokens = answer["output_ids"]
        ended = answer["meta_info"]["finish_reason"]["type"]
        assert len(tokens) == length or ended == "stop", (asked, answer)
        wanted = follow(live, Request.of(asked), prompt, tokens)
        # Rows of a text that is read at once differ by rounding from those of one read token by token, which rarely decides.
        same += sum(a == b for a, b in zip(tokens, wanted, strict=True))
        total += len(tokens)
    print(f"{same} of {total} tokens in {len(sent)} requests")
    assert total > len(sent)
    assert same >= total - max(1, total // 500)


# ---- offline, with the processor


class Offline:
    """SGLang's engine in this process."""

    def __init__(self, model: str, **settings: Any):
        self.live = Live.start(model, **{**SETTINGS, **settings})
        self.engine = self.live._close.__self__

    def all(self, bodies: list[dict[str, Any]]) -> list[Any]:
        """Answers to requests that are sent at once, or errors in their place."""

        async def ask() -> list[Any]:
            return await asyncio.gather(*(self.engine.async_generate(**body) for body in bodies), return_exceptions=True)

        return self.engine.loop.run_until_complete(ask())


@pytest.fixture(scope="class")
def offline(model: str) -> Iterator[Offline]:
    """Without overlap; long prompts are read in parts, and every few steps SGLang acts as if its memory were full."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLANG_TEST_RETRACT", "1")
        patch.setenv("SGLANG_TEST_RETRACT_INTERVAL", "5")
        made = Offline(model, chunked_prefill_size=32, max_total_tokens=4096)
    yield made
    made.live.close()


class TestOffline:
    """One engine, which is stopped before the next is started: stopping one kills all children of the process."""

    def test_the_string_is_the_class(self, offline: Offline):
        import dill
        from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor

        from decal.serving import sglang as adapter

        assert dill.loads(bytes.fromhex(json.loads(PROCESSOR)["callable"])) is adapter.Processor
        assert isinstance(CustomLogitProcessor.from_str(PROCESSOR), adapter.Processor)
        # What SGLang makes of a class that is found by its name says the same.
        sent = json.loads(super(adapter.Processor, adapter.Processor).to_str())
        assert dill.loads(bytes.fromhex(sent["callable"])) is adapter.Processor
        assert adapter.Processor.to_str() == PROCESSOR

    @pytest.mark.parametrize("start", range(0, len(REAL_CHAINS), 4))
    def test_the_processor_does_what_chains_say(self, offline: Offline, start: int):
        check(offline.live, REAL_CHAINS[start : start + 4], [PROMPTS[0], PROMPTS[5], PROMPTS[6], LONG])

    def test_coins_go_by_the_request_s_name(self, offline: Offline):
        prompt = offline.live.tokenizer(PROMPTS[0])["input_ids"]
        request = Request.of({"decal": "xtc(0.02, 0.5)"})
        names = [f"name-{number}" for number in range(6)]
        body = {
            "input_ids": [prompt] * len(names),
            "rid": names,
            "sampling_params": {**_sampling_params({"decal": "xtc(0.02, 0.5)"}), "max_new_tokens": 3},
            "custom_logit_processor": PROCESSOR,
            "return_logprob": True,
            "top_logprobs_num": offline.live._vocabulary,
        }
        sizes = set()
        for name, answer in zip(names, offline.live._ask(body), strict=True):
            tokens, laws = answer["output_ids"], offline.live._laws(answer["meta_info"])
            number = int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little") >> 1
            rows = offline.live.rows([prompt + tokens[:size] for size in range(3)])
            histories = [History.of([prompt + tokens[:size]], prompt=len(prompt), request=[number]) for size in range(3)]
            wanted = torch.cat([request.chain(row[None], history=one) for row, one in zip(rows, histories, strict=True)])
            assert torch.equal(laws.isfinite(), wanted.isfinite())
            sizes.add(int(laws[0].isfinite().sum()))
        assert len(sizes) > 1  # some coins fell on one side, some on the other

    def test_bad_requests_end_alone(self, offline: Offline):
        ids = offline.live.tokenizer(PROMPTS[0])["input_ids"]
        good = {"input_ids": ids, **request_fields("min_p(0.1) | mirostat(3.0)", seed=5)}
        good["sampling_params"]["max_new_tokens"] = 12

        def bad(custom: dict[str, Any], **sampling: Any) -> dict[str, Any]:
            params = {**_sampling_params(custom), "max_new_tokens": 12, **sampling}
            return {"input_ids": ids, "sampling_params": params, "custom_logit_processor": PROCESSOR}

        cases = {
            "p must be in": bad({"decal": "min_p(7)"}),
            "did you mean decal_seed": bad({"decal": "min_p(0.1)", "decal_sed": 1}),
            "temperature=0.7 (send 1)": bad({"decal": "min_p(0.1)"}, temperature=0.7),
            "A temperature of 0 is a top_k of 1": bad({"decal": "min_p(0.1)"}, temperature=0),
            "top_k=20 (send -1)": bad({"decal": "min_p(0.1)"}, top_k=20),
            "top_p=0.9 (send 1)": bad({"decal": "min_p(0.1)"}, top_p=0.9),
            "min_p=0.2 (send 0)": bad({"decal": "min_p(0.1)"}, min_p=0.2),
            "frequency_penalty=0.5 (send 0)": bad({"decal": "min_p(0.1)"}, frequency_penalty=0.5),
            "repetition_penalty=1.2 (send 1)": bad({"decal": "min_p(0.1)"}, repetition_penalty=1.2),
            "n=2 texts with one seed": bad({"decal": "min_p(0.1)", "decal_seed": 1}, n=2),
            "given twice": bad({"decal": "guided(1)", "decal_answers": ["green", "green"]}),
        }
        answers = offline.all([good, *cases.values(), good])
        assert answers[0]["output_ids"] == answers[-1]["output_ids"]
        assert len(answers[0]["output_ids"]) == 12
        for words, answer in zip(cases, answers[1:-1], strict=True):
            print(words, "|", answer)
            assert isinstance(answer, ValueError)
            assert words in str(answer)
        # Found out while its prompt is still being read in parts.
        late = {**cases["top_k=20 (send -1)"], "input_ids": offline.live.tokenizer(LONG)["input_ids"]}
        assert "top_k=20 (send -1)" in str(offline.all([late, good])[0])
        # And the engine still runs.
        assert offline.all([good])[0]["output_ids"] == answers[0]["output_ids"]
        with pytest.raises(DecalError, match="p must be in"):
            offline.live.write([ids], {"decal": "min_p(7)"}, 3, False)

    def test_a_stream_ends_with_the_words(self, offline: Offline):
        ids = offline.live.tokenizer(PROMPTS[0])["input_ids"]
        params = {**_sampling_params({"decal": "min_p(0.1)"}), "max_new_tokens": 4, "top_k": 20}
        body = {"input_ids": ids, "sampling_params": params, "custom_logit_processor": PROCESSOR, "stream": True}
        *_, last = offline.engine.generate(**body)
        ended = last["meta_info"]["finish_reason"]
        assert (ended["type"], ended["status_code"]) == ("abort", 400)
        assert "top_k=20 (send -1)" in ended["message"]
        body["sampling_params"] = {**params, "top_k": -1}
        *_, last = offline.engine.generate(**body)
        assert last["meta_info"]["finish_reason"]["type"] == "length"

    def test_traffic_that_has_to_wait_for_memory(self, offline: Offline):
        sent = traffic(random.Random(1), offline.live.tokenizer, REAL_CHAINS[:11], 10, 24)
        bodies = [
            {
                "input_ids": prompt,
                "sampling_params": {**_sampling_params(asked), "max_new_tokens": length, "ignore_eos": True},
                "custom_logit_processor": PROCESSOR,
            }
            for prompt, asked, length in sent
        ]
        answers = offline.all(bodies)
        assert sum(answer["meta_info"]["num_retractions"] for answer in answers) > 0
        check_traffic(offline.live, sent, answers)


# ---- offline, while SGLang overlaps scheduling with the model


@pytest.mark.parametrize("delayed", [False, True])
def test_overlap_is_detected_or_made_up_for(model: str, delayed: bool):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLANG_ENABLE_DELAY_SAMPLE", str(int(delayed)))
        live = Live.start(model, **SETTINGS, max_total_tokens=4096, disable_overlap_schedule=False)
    try:
        assert any("--disable-overlap-schedule" in note for note in live.notes())
        check(live, ["temperature(1.5) | min_p(0.1)"], list(PROMPTS[:2]))
        if delayed:
            check(live, READS_TEXT, list(PROMPTS[:2]))
        else:
            for chain in READS_TEXT:
                with pytest.raises(DecalError, match="SGLANG_ENABLE_DELAY_SAMPLE=1"):
                    live.write([[1, 2, 3]], {"decal": chain}, 4, False)
                assert len(live.write([[1, 2, 3]], {"decal": chain}, 1, False)[0].tokens) == 1
    finally:
        live.close()


@pytest.mark.skipif(not GPU, reason="SGLang drafts with kernels that its CPU build alone has")
def test_drafts_by_ngrams_are_refused(model: str):
    live = Live.start(model, **SETTINGS, max_total_tokens=4096, speculative_algorithm="NGRAM", speculative_num_draft_tokens=4)
    try:
        with pytest.raises(DecalError, match="under speculative decoding by NGRAM"):
            live.write([[1, 2, 3]], {"decal": "min_p(0.1)"}, 4, False)
    finally:
        live.close()


# ---- a server with the plug-in, which overlaps: decal draws


@pytest.fixture(scope="module")
def server(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("plugin")
    # What examples/sglang_plugin is, under the name that SGLang's CPU backend asks for.
    backend = "decal" if GPU else "pytorch"
    (folder / "decal_for_tests.py").write_text(f"import decal.serving.sglang as s\ndef plugin(): s.register({backend!r})\n")
    about = folder / "decal_for_tests-0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: decal-for-tests\nVersion: 0\n")
    (about / "entry_points.txt").write_text("[sglang.srt.plugins]\ndecal_for_tests = decal_for_tests:plugin\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = [f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}") for name, value in SETTINGS.items()]
    url = f"http://127.0.0.1:{port}"
    log = folder / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "sglang.launch_server", "--model-path", model, "--port", str(port)),
                *("--enable-custom-logit-processor", "--max-total-tokens", "4096", "--sampling-backend", backend, *flags),
            ],
            env={**os.environ, "PYTHONPATH": str(folder), "SGLANG_PLUGINS": "decal_for_tests"},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        for _ in range(300):
            try:
                http(f"{url}/model_info", timeout=5)
            except DecalError as error:
                if process.poll() is not None:
                    raise AssertionError(log.read_text()[-3000:]) from error
                time.sleep(1)
            else:
                break
        yield url
    finally:
        process.terminate()
        process.wait(60)
        print(log.read_text()[-2000:])


@pytest.fixture(scope="module")
def connected(server: str, model: str) -> Live:
    return Live.connect(server, model)


@pytest.mark.parametrize("start", range(0, len(REAL_CHAINS), 4))
def test_the_sampler_does_what_chains_say(connected: Live, start: int):
    check(connected, REAL_CHAINS[start : start + 4], [PROMPTS[0], PROMPTS[5], LONG])


def test_the_plug_in_refuses_at_the_door(connected: Live, server: str):
    def post(custom: dict[str, Any] | None, string: str | None = None, **sampling: Any) -> Any:
        params = {"max_new_tokens": 3, "temperature": 1, **sampling, **({"custom_params": custom} if custom else {})}
        return http(f"{server}/generate", {"text": PROMPTS[0], "sampling_params": params, "custom_logit_processor": string})

    with pytest.raises(DecalError, match=r"answered 400: .*p must be in"):
        post({"decal": "min_p(7)"})
    with pytest.raises(DecalError, match=r"answered 400: .*temperature=0.7 \(send 1\)"):
        post({"decal": "min_p(0.1)"}, temperature=0.7)
    with pytest.raises(DecalError, match=r"answered 400: .*beam_width=2 \(send 1\)"):
        post({"decal": "min_p(0.1)"}, beam_width=2)
    with pytest.raises(DecalError, match=r"answered 400: .*runs no custom logit processor but decal's"):
        post(None, json.dumps({"callable": b"cos\nabort\n.".hex()}))
    # No string is needed.
    first = post({"decal": "top_k(1)"})["output_ids"]
    assert first == post({"decal": "top_k(1)"}, PROCESSOR)["output_ids"]
    assert first == post(None, top_k=1)["output_ids"]


def test_openai_s_endpoint_takes_chains(connected: Live, server: str):
    body: dict[str, Any] = {"model": "any", "prompt": PROMPTS[0], "max_tokens": 5, "custom_params": {"decal": "top_k(1)"}}
    body |= {"temperature": 1, "top_p": 1, "top_k": -1}
    text = http(f"{server}/v1/completions", body)["choices"][0]["text"]
    wanted = http(f"{server}/generate", {"text": PROMPTS[0], "sampling_params": {"top_k": 1, "max_new_tokens": 5}})["text"]
    assert text == wanted
    with pytest.raises(DecalError, match=r"answered 400: .*temperature=0.5"):
        http(f"{server}/v1/completions", {**body, "temperature": 0.5})


def test_traffic_of_requests_with_and_without_chains(connected: Live, server: str):
    rng = random.Random(2)
    sent = traffic(rng, connected.tokenizer, REAL_CHAINS, 15, 21)
    plain = [
        {"input_ids": connected.tokenizer(rng.choice(PROMPTS))["input_ids"], "sampling_params": params}
        for params in [
            {"temperature": 0.8, "top_p": 0.9, "max_new_tokens": 20},
            {"temperature": 1.0, "top_k": 5, "min_p": 0.1, "max_new_tokens": 20},
            {"temperature": 0, "max_new_tokens": 20},
        ]
        * 3
    ]
    bodies = [
        {"input_ids": prompt, "sampling_params": {**_sampling_params(asked), "max_new_tokens": length}}
        for prompt, asked, length in sent
    ]
    mixed = [(body, True) for body in bodies] + [(body, False) for body in plain]
    order = rng.sample(range(len(mixed)), len(mixed))

    def post(place: int) -> Any:
        time.sleep(rng.random() * 3)
        return http(f"{server}/generate", {**mixed[place][0], "return_logprob": place % 3 == 0})

    with ThreadPoolExecutor(12) as pool:
        answers = dict(zip(order, pool.map(post, order), strict=True))
    check_traffic(connected, sent, [answers[place] for place in range(len(sent))])
    greedy = [answers[place] for place in range(len(mixed)) if mixed[place][0]["sampling_params"].get("temperature") == 0]
    for answer, body in zip(greedy, [body for body in plain if body["sampling_params"]["temperature"] == 0], strict=True):
        assert answer["output_ids"] == http(f"{server}/generate", body)["output_ids"]


def test_the_plug_in_of_the_examples_is_found_and_registers_its_backend():
    code = (
        "from sglang.srt.plugins import load_plugins\nload_plugins()\n"
        "from sglang.srt.server_args import SAMPLING_BACKEND_CHOICES\nprint('decal' in SAMPLING_BACKEND_CHOICES)\n"
        "from sglang.srt.managers.tokenizer_manager import TokenizerManager\n"
        "print(hasattr(TokenizerManager._validate_one_request, '__wrapped__'))"
    )
    env = {**os.environ, "SGLANG_PLUGINS": "decal"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert out.stdout.split()[-2:] == ["True", "True"], out


def test_the_example_runs(server: str):
    example = Path(__file__).parents[2] / "examples" / "sglang_server.py"
    out = subprocess.run([sys.executable, str(example), server], capture_output=True, text=True, check=True)
    assert out.stdout.count("\n") >= 4, out
