"""Chains inside a real vLLM: its engine, its server, and the batch classes of both of its model runners. Run by .ci/vllm."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from replay import REAL_CHAINS, VOCABULARY, law, row

from decal import DecalError
from decal.serving.engine import http as ask
from decal.serving.request import NEUTRAL, Request, as_params
from decal.serving.verify import verify

pytest.importorskip("vllm", reason="needs vLLM")
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("default")]

CHAINS = [*REAL_CHAINS, "guided(0.5) | temperature(2)"]
PROCESSOR = "decal.serving.vllm:Processor"


@pytest.fixture(scope="module")
def model() -> str:
    from decal.eval import models

    return str(models.folder("smollm2", progress=False))


def rows_of(model: str) -> Any:
    """What the model gives behind texts, in transformers."""
    from transformers import AutoModelForCausalLM

    own = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    @torch.no_grad()
    def rows(texts: Any) -> torch.Tensor:
        return torch.cat([own(torch.tensor([text])).logits[:, -1].float() for text in texts])

    return rows


# ---- the engine


@pytest.fixture(scope="module")
def engine(model: str) -> Iterator[Any]:
    from decal.serving.vllm import Live

    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    live = Live.start(model, dtype="float32", max_model_len=512)
    yield live
    live.close()


class TestEngine:
    @pytest.mark.parametrize("chain", CHAINS)
    def test_it_does_what_the_chain_says(self, engine: Any, chain: str):
        report = verify(engine, [chain], generations=50, length=3, draws=20)
        finding = report.findings[0]
        assert finding.ok, str(report)
        assert not finding.differing
        if "xtc" not in chain:
            assert finding.generations == 50
            assert finding.steps > 100
        assert finding.same == finding.seeded > 0

    def test_requests_of_a_batch_don_t_touch_each_other(self, engine: Any):
        prompts = [list(engine.tokenizer(text)["input_ids"]) for text in ("Once upon a time", "The sky is", "One, two,")]
        asked = [as_params(chain, seed, ["red", "green"] if "guided" in chain else None) for seed, chain in enumerate(CHAINS)]
        alone = [[engine.write([prompt], params, 12, False)[0].tokens for prompt in prompts] for params in asked]
        mixed = self.mixed(engine, prompts, asked)
        assert mixed == alone

    @staticmethod
    def mixed(engine: Any, prompts: list[list[int]], asked: list[dict[str, Any]]) -> list[list[list[int]]]:
        from vllm import SamplingParams

        neutral = {name: off[0] for name, off in NEUTRAL.items()}
        wanted = [SamplingParams(**neutral, max_tokens=12, extra_args=params) for params in asked for _ in prompts]
        # Greedy requests, and others without a chain, among them.
        wanted += [SamplingParams(temperature=0, max_tokens=9), SamplingParams(temperature=0.7, top_p=0.8, max_tokens=9)]
        texts = [{"prompt_token_ids": prompt} for prompt in [*prompts * len(asked), prompts[0], prompts[1]]]
        outputs = [list(one.outputs[0].token_ids) for one in engine.llm.generate(texts, wanted, use_tqdm=False)]
        assert len(outputs[-1]) == len(outputs[-2]) == 9
        return [outputs[start : start + len(prompts)] for start in range(0, len(asked) * len(prompts), len(prompts))]

    def test_several_answers_to_a_request_are_several(self, engine: Any):
        from decal.serving.vllm import sampling_params

        found = engine.llm.generate(["A story:"], sampling_params("temperature(1.5) | mirostat(4.0)", n=4, max_tokens=12))[0]
        assert len({tuple(one.token_ids) for one in found.outputs}) == 4

    def test_a_request_with_other_settings_beside_its_chain_is_refused(self, engine: Any):
        from vllm import SamplingParams
        from vllm.exceptions import VLLMValidationError

        with pytest.raises(VLLMValidationError, match=r"temperature=0.7 \(send 1\)"):
            engine.llm.generate(["a"], SamplingParams(temperature=0.7, extra_args={"decal": "min_p(0.1)"}), use_tqdm=False)
        with pytest.raises(VLLMValidationError, match="did you mean min_p"):
            engine.llm.generate(["a"], SamplingParams(extra_args={"decal": "minp(0.1)"}), use_tqdm=False)
        with pytest.raises(DecalError, match="decal_seed without a chain"):
            engine.write([[1]], {"decal_seed": 3}, 1, False)
        assert engine.llm.generate(["a"], SamplingParams(max_tokens=3), use_tqdm=False)[0].outputs[0].token_ids


# ---- the server


class Server:
    """A real ``vllm serve`` on a port of this machine."""

    def __init__(self, folder: Path, *arguments: str, log: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(self.port)]
        settings = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--host", "127.0.0.1"]
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen([*command, *settings, *arguments], stdout=file, stderr=file, env=environment)

    def wait(self) -> None:
        for _ in range(300):
            if self.process.poll() is not None:
                break
            with contextlib.suppress(DecalError):
                ask(f"{self.url}/v1/models", timeout=5)
                return
            time.sleep(1)
        pytest.fail(f"the server didn't start: {self.log.read_text()[-3000:]}")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()


@pytest.fixture(scope="module")
def server(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    # A model that, like many on the Hub, asks for a temperature of its own.
    folder = tmp_path_factory.mktemp("model")
    for file in Path(model).iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").write_text(json.dumps({**config, "temperature": 0.6, "top_p": 0.95, "do_sample": True}))
    server = Server(folder, "--logits-processors", PROCESSOR, log=tmp_path_factory.mktemp("log") / "server.log")
    try:
        server.wait()
        yield server
    finally:
        server.stop()


class TestServer:
    @staticmethod
    def body(server: Server, prompt: str, length: int = 8, **fields: Any) -> dict[str, Any]:
        return {"model": ask(f"{server.url}/v1/models")["data"][0]["id"], "prompt": prompt, "max_tokens": length, **fields}

    def test_it_does_what_the_chain_says(self, server: Server, model: str):
        from decal.serving.vllm import Live

        report = verify(Live.connect(server.url), [CHAINS[5], CHAINS[8], CHAINS[11]], draws=40, rows=rows_of(model))
        assert report.ok, str(report)
        assert all(finding.steps == 0 and finding.seeded > 0 and finding.drawn >= 400 for finding in report.findings)

    def test_200_requests_at_once_get_what_each_gets_alone(self, server: Server):
        from decal.serving.vllm import request_fields

        rng = random.Random(3)
        bodies = []
        for number in range(200):
            chain = rng.choice(CHAINS)
            answers = ["red", "green", "light green"] if "guided" in chain else None
            fields = request_fields(chain, seed=number, answers=answers)
            prompt = rng.choice(["Once upon a time", "The sky is", "A random word:", "import numpy as np\n"])
            bodies.append(self.body(server, prompt, rng.randrange(4, 24), **fields))

        def text(body: dict[str, Any]) -> str:
            return ask(f"{server.url}/v1/completions", body)["choices"][0]["text"]

        with ThreadPoolExecutor(200) as pool:
            together = list(pool.map(text, bodies))
        some = rng.sample(range(200), 40)
        assert [together[i] for i in some] == [text(bodies[i]) for i in some]
        assert len(set(together)) > 100

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"temperature": 1, "top_p": 1, "vllm_xargs": {"decal": "min_p(7)"}}, "p must be in [0, 1] (0 = off), got 7"),
            ({"temperature": 1, "top_p": 1, "vllm_xargs": {"decal": "min_p(0.1"}}, "a chain is written rule(value)"),
            ({"temperature": 1, "top_p": 1, "vllm_xargs": {"decal_seed": 3}}, "decal_seed without a chain"),
            ({"temperature": 1, "top_p": 1, "vllm_xargs": {"decal": "guided(1)"}}, "send decal_answers"),
            # The model's own generation config.
            ({"vllm_xargs": {"decal": "min_p(0.1)"}}, "temperature=0.6 (send 1), top_p=0.95 (send 1)"),
            ({"temperature": 0, "top_p": 1, "vllm_xargs": {"decal": "min_p(0.1)"}}, "temperature=0"),
        ],
    )
    def test_what_can_t_be_done_is_status_400_with_the_reason(self, server: Server, fields: dict[str, Any], words: str):
        with pytest.raises(DecalError, match="answered 400") as refused:
            ask(f"{server.url}/v1/completions", self.body(server, "a", **fields))
        assert words in str(refused.value)

    def test_clients_that_go_away_do_no_harm(self, server: Server):
        from decal.serving.vllm import request_fields

        fields = request_fields("repetition_penalty(1.2) | mirostat(3.0)", seed=4)
        body = self.body(server, "Once upon a time", 24, **fields)
        before = ask(f"{server.url}/v1/completions", body)["choices"][0]["text"]
        for _ in range(20):
            connection = http.client.HTTPConnection("127.0.0.1", server.port)
            long = {**body, "max_tokens": 200, "stream": True}
            connection.request("POST", "/v1/completions", json.dumps(long), {"Content-Type": "application/json"})
            time.sleep(0.1)
            connection.close()
        assert ask(f"{server.url}/v1/completions", body)["choices"][0]["text"] == before


def test_a_server_without_the_processor_is_found_out(model: str, tmp_path: Path):
    from decal.serving.vllm import Live

    server = Server(Path(model), "--generation-config", "vllm", log=tmp_path / "server.log")
    try:
        server.wait()
        live = Live.connect(server.url)

        report = verify(live, ["top_k(3) | temperature(2)"], draws=60, rows=rows_of(model))
        assert not report.ok
        assert "the chain isn't applied" in report.findings[0].interference[0], str(report)
    finally:
        server.stop()


# ---- the batch classes of the first model runner, and the interface of the second


def newcomer(rng: random.Random) -> Any:
    from vllm import SamplingParams

    chain = rng.choice([*CHAINS[:-2], "", "temperature(1.1) | min_p(0.07)"])
    asked = as_params(chain, rng.randrange(9)) if chain else None
    return SamplingParams(extra_args=asked, seed=rng.randrange(100))


def check(out: torch.Tensor, params: Any, prompt: list[int], output: list[int]) -> None:
    request = Request.of(params.extra_args)
    want = row(prompt + output) if request is None else law(request, prompt, output, request.seed)
    torch.testing.assert_close(out, want, rtol=0, atol=0)


@pytest.mark.parametrize("seed", range(6))
def test_the_first_runner_s_own_batch(seed: int):
    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch

    import decal.serving.vllm as adapter

    rng = random.Random(seed)
    config = SimpleNamespace(
        model_config=SimpleNamespace(logits_processors=[PROCESSOR]), scheduler_config=SimpleNamespace(async_scheduling=False)
    )
    processor = adapter.Processor(config, torch.device("cpu"), False)
    batch = InputBatch(8, 128, 256, torch.device("cpu"), VOCABULARY, [16], [8], logitsprocs=LogitsProcessors([processor]))
    requests: dict[str, Any] = {}
    away: list[str] = []
    for number in range(60):
        for name in list(batch.req_id_to_index):
            if rng.random() < 0.15:
                batch.remove_request(name)
                if rng.random() < 0.5:
                    away.append(name)
                else:
                    del requests[name]
        while batch.num_reqs < 8 and (rng.random() < 0.5 or not batch.num_reqs):
            if away and rng.random() < 0.5:
                name = away.pop(0)
            else:
                name = f"{number}-{len(requests)}"
                prompt = [rng.randrange(VOCABULARY) for _ in range(rng.randrange(1, 6))]
                requests[name] = CachedRequestState(
                    req_id=name,
                    prompt_token_ids=prompt,
                    mm_features=[],
                    sampling_params=newcomer(rng),
                    generator=None,
                    block_ids=([0],),
                    num_computed_tokens=0,
                    output_token_ids=[],
                )
            batch.add_request(requests[name])
        batch.condense()
        if batch.num_reqs > 1 and rng.random() < 0.3:
            batch.swap_states(*rng.sample(range(batch.num_reqs), 2))
        batch.refresh_metadata()  # tells the processors
        held = [requests[name] for name in batch.req_ids]
        out = processor.apply(torch.cat([row(one.prompt_token_ids + one.output_token_ids) for one in held]))
        for place, one in enumerate(held):
            check(out[place : place + 1], one.sampling_params, one.prompt_token_ids, one.output_token_ids)
            token = int(torch.multinomial(out[place].softmax(-1), 1))
            index = batch.req_id_to_index[one.req_id]
            batch.token_ids_cpu[index, one.num_tokens] = token
            one.output_token_ids.append(token)


@pytest.mark.parametrize("seed", range(4))
def test_the_second_runner_s_interface(seed: int):
    """Its own loader, state and context, with drafts; its engine needs Triton on a device."""
    from vllm.v1.worker.gpu.sample.logits_processor import (
        LogitsContext,
        LogitsProcessor,
        build_custom_logits_processors,
        build_custom_logits_processors_params_validator,
    )

    rng = random.Random(seed)
    slots = 4
    tokens = torch.full((slots, 100), -1, dtype=torch.int32)
    prompt_len = torch.zeros(slots, dtype=torch.int32)
    states = SimpleNamespace(
        device=torch.device("cpu"),
        max_num_reqs=slots,
        vocab_size=VOCABULARY,
        all_token_ids=SimpleNamespace(gpu=tokens),
        prompt_len=SimpleNamespace(gpu=prompt_len),
        prefill_len=None,
        total_len=None,
    )
    config = SimpleNamespace(model_config=SimpleNamespace(logits_processors=[PROCESSOR]))
    (processor,) = build_custom_logits_processors(config, states, False, [PROCESSOR])
    assert isinstance(processor, LogitsProcessor)
    validate = build_custom_logits_processors_params_validator([PROCESSOR])
    held: dict[int, tuple[Any, list[int], list[int]]] = {}
    for _ in range(30):
        for slot in list(held):
            if rng.random() < 0.15:
                del held[slot]
        for slot in range(slots):
            if slot not in held and rng.random() < 0.6:
                params = newcomer(rng)
                validate(params)
                assert processor.add_request(slot, params) is bool(params.extra_args)
                prompt = [rng.randrange(VOCABULARY) for _ in range(rng.randrange(1, 5))]
                held[slot] = params, prompt, []
                prompt_len[slot] = len(prompt)
                tokens[slot, : len(prompt)] = torch.tensor(prompt)
        if not held:
            continue
        processor.apply_staged_writes()
        order = rng.sample(sorted(held), len(held))
        rows = []
        for slot in order:
            drafts = [rng.randrange(VOCABULARY) for _ in range(rng.randrange(4) if held[slot][2] else 0)]
            rows += [(slot, place, drafts[:place]) for place in range(len(drafts) + 1)]
        texts = [held[slot][1] + held[slot][2] + drafts for slot, _, drafts in rows]
        context = LogitsContext(
            expanded_idx_mapping=torch.tensor([slot for slot, *_ in rows], dtype=torch.int32),
            idx_mapping=torch.tensor(order, dtype=torch.int32),
            idx_mapping_np=np.array(order, dtype=np.int32),
            expanded_local_pos=torch.tensor([place for _, place, _ in rows], dtype=torch.int32),
            input_ids=torch.tensor([text[-1] for text in texts], dtype=torch.int32),
            pos=torch.tensor([len(text) - 1 for text in texts]),
            seq_lens_upper_bound_np=np.array([len(held[slot][1]) + len(held[slot][2]) for slot in order]),
        )
        out = processor.apply(torch.cat([row(text) for text in texts]), context)
        for place, (slot, _, drafts) in enumerate(rows):
            params, prompt, output = held[slot]
            check(out[place : place + 1], params, prompt, output + drafts)
        for slot in order:
            own = [place for place, (of, *_) in enumerate(rows) if of == slot]
            accepted = rng.choice(own)
            params, prompt, output = held[slot]
            output += [*rows[accepted][2], int(torch.multinomial(out[accepted].softmax(-1), 1))]
            tokens[slot, : len(prompt) + len(output)] = torch.tensor(prompt + output)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="vLLM's second model runner needs a GPU")
def test_the_second_runner_does_what_the_chain_says(model: str, monkeypatch: pytest.MonkeyPatch):
    from decal.serving.vllm import Live

    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    live = Live.start(model, dtype="float32", max_model_len=512, gpu_memory_utilization=0.5)
    try:
        report = verify(live, CHAINS)
        assert report.ok, str(report)
    finally:
        live.close()


def test_a_class_of_both_interfaces():
    from vllm.v1.sample.logits_processor import LogitsProcessor as First

    import decal.serving.vllm as adapter

    assert issubclass(adapter.Processor, First)
    assert adapter.Processor is adapter.Processor
    with contextlib.suppress(ImportError):
        from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as Second

        assert issubclass(adapter.Processor, Second)


def test_the_frontend_pays_little_for_the_import():
    """vLLM's frontend has torch already; decal adds nothing heavy to it."""
    code = (
        "import sys, vllm, vllm.entrypoints.openai.api_server\nassert 'torch' in sys.modules\nbefore = set(sys.modules)\n"
        "from decal.serving.vllm import Processor\n"
        "heavy = {'numba', 'triton', 'scipy', 'pandas', 'sklearn', 'matplotlib'}\n"
        "print(sorted(heavy & {name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip().splitlines()[-1:] == ["[]"], done.stderr[-2000:]
