"""Chains in lm-evaluation-harness itself, on tasks of local files."""

from __future__ import annotations

import json
import logging
import random
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from replay import law
from tiny import byte_level, llama

from decal import DecalError, parse
from decal.serving.request import Request

lm_eval = pytest.importorskip("lm_eval")

from decal.serving import lm_eval as served  # noqa: E402

pytestmark = pytest.mark.lm_eval

COUNTRIES = {
    "France": "Paris",
    "Japan": "Tokyo",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Germany": "Berlin",
    "Russia": "Moscow",
    "Egypt": "Cairo",
    "China": "Beijing",
    "Greece": "Athens",
    "England": "London",
    "Cuba": "Havana",
    "Austria": "Vienna",
    "Portugal": "Lisbon",
    "Ireland": "Dublin",
    "Peru": "Lima",
    "Poland": "Warsaw",
}


def task(folder: Path, name: str = "capitals", repeats: int = 1, **generation: Any) -> None:
    """A task of generated text in a folder, in the form of the harness's own."""
    lines = [json.dumps({"country": country, "capital": capital}) for country, capital in COUNTRIES.items()]
    (folder / "capitals.jsonl").write_text("\n".join(lines))
    settings = {"until": ["\n", "."], "max_gen_toks": 5} | generation
    (folder / f"{name}.yaml").write_text(
        json.dumps(
            {
                "task": name,
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": str(folder / "capitals.jsonl")}},
                "output_type": "generate_until",
                "test_split": "test",
                "doc_to_text": "The capital of Norway is Oslo.\nThe capital of Iran is Tehran.\nThe capital of {{country}} is",
                "doc_to_target": "{{capital}}",
                "repeats": repeats,
                "generation_kwargs": settings,
                "metric_list": [
                    {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": True}
                ],
                "filter_list": [
                    {"name": "stripped", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}
                ],
            }
        )
    )


def choices(folder: Path) -> None:
    """A task of log-likelihoods."""
    (folder / "chosen.yaml").write_text(
        json.dumps(
            {
                "task": "chosen",
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": str(folder / "capitals.jsonl")}},
                "output_type": "multiple_choice",
                "test_split": "test",
                "doc_to_text": "The capital of {{country}} is",
                "doc_to_target": "{{capital}}",
                "doc_to_choice": list(COUNTRIES.values()),
                "metric_list": [{"metric": "acc"}],
            }
        )
    )


@pytest.fixture(autouse=True)
def quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    served.register()
    with warnings.catch_warnings():
        # What the harness and its libraries deprecate in each other is not what these tests are about.
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    """A model and a tokenizer whose padding is also what every text may begin with."""
    tokenizer = byte_level(["The capital of Norway is Oslo. " * 3], merges=40)
    model = llama(len(tokenizer), dtype=torch.float32, spread=0.3)
    model.generation_config.update(do_sample=True, temperature=0.2, top_k=3, repetition_penalty=1.5)
    return model, tokenizer


def evaluated(folder: Path, tasks: Sequence[str], batch_size: int = 4, model: str = "decal", **arguments: Any) -> Any:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return lm_eval.simple_evaluate(
        model, model_args=arguments, tasks=list(tasks), batch_size=batch_size, task_manager=manager, bootstrap_iters=0
    )


def texts(results: Any, name: str = "capitals") -> list[Any]:
    return [sample["resps"] for sample in sorted(results["samples"][name], key=lambda one: one["doc_id"])]


@pytest.mark.parametrize("chain", ["temperature(1.5) | min_p(0.05)", "dry(0.8) | repetition_penalty(1.3) | mirostat(3.0)"])
def test_texts_are_the_chain_s_whatever_the_batch(tmp_path: Path, tiny: tuple[Any, Any], chain: str):
    model, tokenizer = tiny
    task(tmp_path, do_sample=False, temperature=0.0)
    found = [
        evaluated(tmp_path, ["capitals"], size, pretrained=model, tokenizer=tokenizer, chain=chain, seed=17)
        for size in (1, 3, 16)
    ]
    assert texts(found[0]) == texts(found[1]) == texts(found[2])
    assert found[0]["results"] == found[1]["results"] == found[2]["results"]
    other = evaluated(tmp_path, ["capitals"], 3, pretrained=model, tokenizer=tokenizer, chain=chain, seed=18)
    assert texts(other) != texts(found[0])

    def rows(text: Sequence[int]) -> Any:
        with torch.no_grad():
            return model(torch.tensor([list(text)])).logits[:, -1].float()

    lm = served.LM(pretrained=model, tokenizer=tokenizer, chain=chain, seed=17)
    for sample in random.Random(0).sample(found[0]["samples"]["capitals"], 4):
        request = Request(parse(chain), lm._seed("capitals", sample["doc_id"], 0, 0))
        prompt = tokenizer(sample["arguments"][0][0])["input_ids"]
        output: list[int] = []
        while len(output) < 5:
            output.append(int(law(request, prompt, output, request.seed or 0, rows).argmax()))
        written = tokenizer.decode(output, skip_special_tokens=True)
        assert sample["resps"][0][0] == written.split("\n")[0].split(".")[0]


def test_a_request_has_its_own_seed_whatever_else_is_evaluated(tmp_path: Path, tiny: tuple[Any, Any]):
    model, tokenizer = tiny
    task(tmp_path, "first", repeats=3, do_sample=True)
    task(tmp_path, "second", do_sample=False)
    given: dict[str, Any] = {"pretrained": model, "tokenizer": tokenizer, "chain": "temperature(1.5)", "seed": 3}
    alone, both = evaluated(tmp_path, ["first"], **given), evaluated(tmp_path, ["second", "first"], 5, **given)
    assert texts(alone, "first") == texts(both, "first")
    repeats = [one[0] for one in texts(both, "first")]
    assert all(len(one) == 3 for one in repeats)
    assert sum(len(set(one)) == 3 for one in repeats) > len(repeats) // 2
    assert [one[0][0] for one in texts(both, "first")] != [one[0][0] for one in texts(both, "second")]


def test_what_gives_way_is_said_and_noted(tmp_path: Path, tiny: tuple[Any, Any], caplog: pytest.LogCaptureFixture):
    model, tokenizer = tiny
    task(tmp_path, do_sample=False, temperature=0.0, top_p=0.9)
    lm = served.LM(pretrained=model, tokenizer=tokenizer, chain="min_p(0.1)")
    with caplog.at_level(logging.WARNING, logger="decal.serving.lm_eval"):
        results = evaluated(tmp_path, ["capitals"], model=lm)
    said = [record.getMessage() for record in caplog.records if record.name == "decal.serving.lm_eval"]
    assert said == [
        f"capitals: {one} gives way to the chain min_p(0.1)" for one in ("temperature=0.0", "top_p=0.9", "do_sample=False")
    ]
    assert results["samples"]
    assert lm.get_model_info()["decal_chain"] == "min_p(0.1)"
    assert lm.get_model_info()["decal_seed"] == 1234
    assert lm.get_model_info()["decal_overridden"] == {"temperature": [0.0], "top_p": [0.9], "do_sample": [False]}
    named = evaluated(tmp_path, ["capitals"], pretrained=model, tokenizer=tokenizer, chain="min_p(0.1)")
    assert named["config"]["decal_chain"] == "min_p(0.1)"


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ({"do_sample": True, "temperature": 0.7}, r"capitals asks for temperature=0.7 beside the chain min_p\(0.1\)"),
        ({"temperature": 0.7, "top_p": 0.9}, "temperature=0.7, top_p=0.9"),
        ({"do_sample": False, "repetition_penalty": 1.2}, "repetition_penalty=1.2"),
    ],
)
def test_sampling_that_a_task_asks_for_is_refused_or_replaced(
    tmp_path: Path, tiny: tuple[Any, Any], generation: dict[str, Any], message: str
):
    model, tokenizer = tiny
    given: dict[str, Any] = {"pretrained": model, "tokenizer": tokenizer, "chain": "min_p(0.1)", "seed": 5}
    task(tmp_path, **generation)
    with pytest.raises(DecalError, match=message):
        evaluated(tmp_path, ["capitals"], **given)
    replaced = evaluated(tmp_path, ["capitals"], override=True, **given)
    task(tmp_path, do_sample=False)
    assert texts(replaced) == texts(evaluated(tmp_path, ["capitals"], **given))


def test_loops_that_can_t_follow_a_chain_are_refused(tmp_path: Path, tiny: tuple[Any, Any]):
    model, tokenizer = tiny
    task(tmp_path, num_beams=4)
    with pytest.raises(DecalError, match="beams want the scores of all"):
        evaluated(tmp_path, ["capitals"], pretrained=model, tokenizer=tokenizer, chain="min_p(0.1)")


def test_log_likelihoods_are_the_model_s(tmp_path: Path, tiny: tuple[Any, Any], caplog: pytest.LogCaptureFixture):
    model, tokenizer = tiny
    task(tmp_path)
    choices(tmp_path)
    plain = evaluated(tmp_path, ["chosen"], model="hf", pretrained=model, tokenizer=tokenizer)
    ours = evaluated(tmp_path, ["chosen"], pretrained=model, tokenizer=tokenizer, chain="temperature(0)")
    assert texts(ours, "chosen") == texts(plain, "chosen")
    assert ours["results"]["chosen"]["acc,none"] == plain["results"]["chosen"]["acc,none"]
    assert "the chain temperature(0.0) has no part in them" in caplog.text


def test_the_harness_s_cache_is_refused(tmp_path: Path, tiny: tuple[Any, Any]):
    model, tokenizer = tiny
    task(tmp_path)
    from lm_eval.tasks import TaskManager

    with pytest.raises(DecalError, match="--use_cache finds answers by prompt and task settings alone"):
        lm_eval.simple_evaluate(
            served.LM(pretrained=model, tokenizer=tokenizer, chain="min_p(0.1)"),
            tasks=["capitals"],
            use_cache=str(tmp_path / "known"),
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "needs a chain"),
        ({"chain": "minp(0.1)"}, "did you mean min_p"),
        ({"chain": 3}, "the chain is a text"),
        ({"chain": "min_p([0.1, 0.2])"}, "all requests have one chain"),
        ({"chain": "guided(1)"}, "tasks of the harness don't give"),
        ({"chain": "xtc(0.1", "0.5)": ""}, r"'0.5\)' is no argument; pass model_args as a dict"),
        ({"chain": "min_p(0.1)", "seed": -1}, "seed must be a whole number"),
        ({"chain": "min_p(0.1)", "seed": True}, "seed must be a whole number"),
        ({"chain": "min_p(0.1)", "override": "yes"}, "override must be True or False"),
    ],
)
def test_arguments_that_can_t_be_right_are_refused_before_a_model_is_loaded(given: dict[str, Any], message: str):
    with pytest.raises(DecalError, match=message):
        served.LM(pretrained="no/such/model", **given)


def test_a_chain_gets_through_both_of_the_harness_s_parsers(tmp_path: Path, tiny: tuple[Any, Any]):
    from lm_eval._cli.utils import key_val_to_dict

    model, tokenizer = tiny
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts_ = [
        "temperature(1.3) | min_p(0.1)",
        "xtc(0.1, 0.5) | min_p(0.02)",
        'repetition_penalty(1.2, form="legacy") | top_k(5)',
    ]
    for text in [*texts_, *(parse(one).to_json() for one in texts_)]:
        wanted = parse(text) if "{" not in text else served._chain(text)
        line = f"pretrained={tmp_path},chain={text},seed=17,dtype=float32"
        lm = served.LM.create_from_arg_string(line, {"batch_size": 3, "device": "cpu"})
        assert (lm.chain, lm.seed, lm.batch_size) == (wanted, 17, 3)
        if '"legacy"' in text and "{" not in text:
            continue  # the command's own parser takes quotes away, and says so
        given = key_val_to_dict(line)
        assert served._chain(given["chain"]) == wanted
        assert given["seed"] == 17
    assert served.LM(pretrained=model, tokenizer=tokenizer, chain=parse("top_w(1.0)")).chain.weights is not None


@pytest.mark.model
def test_the_command_on_a_real_model_and_task_scores_the_same_in_every_batch(tmp_path: Path):
    from decal.eval import models

    loaded = models.load("smollm2")
    loaded.model.save_pretrained(tmp_path / "model")
    loaded.tokenizer.save_pretrained(tmp_path / "model")
    task(tmp_path, do_sample=False, temperature=0.0)
    scores, answers = [], []
    for size in (1, 5, 16):
        out = tmp_path / f"out{size}"
        command = [sys.executable, "-m", "decal.serving.lm_eval", "--model", "decal", "--tasks", "capitals", "--device", "cpu"]
        command += ["--model_args", f"pretrained={tmp_path / 'model'}", "chain=temperature(1.2) | xtc(0.1, 0.5) | min_p(0.05)"]
        command += ["seed=17", "--batch_size", str(size), "--include_path", str(tmp_path), "--log_samples"]
        done = subprocess.run([*command, "--output_path", str(out)], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "do_sample=False gives way to the chain" in done.stderr + done.stdout
        results = json.loads(next(out.rglob("results_*.json")).read_text())
        lines = next(out.rglob("samples_*.jsonl")).read_text().splitlines()
        scores.append(results["results"]["capitals"]["exact_match,stripped"])
        answers.append({one["doc_id"]: one["resps"] for one in map(json.loads, lines)})
        assert results["config"]["decal_seed"] == 17
    print(scores, answers[0])
    assert scores[0] == scores[1] == scores[2]
    assert answers[0] == answers[1] == answers[2]
    assert 0 < scores[0] <= 1
