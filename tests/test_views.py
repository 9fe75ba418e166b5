"""Prompts read beside the one at hand: the formulas, the reader against plain forward passes, and generate."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import tiny
import torch

import decal
from decal import DecalError, Prompts, contrast, ensemble, temperature
from decal.eval import estimate
from decal.eval.frontier import Evaluation
from decal.eval.grid import Setting
from decal.eval.models import LoadedModel
from decal.eval.task import Answers, Question, Task
from decal.samplers.chain import notes
from decal.samplers.valid_set import ValidSet
from decal.samplers.views import Reader, kinds

TOKENIZER = tiny.byte_level(["red green blue", "Random colour:", "Any colour at all:", "Answer:"], merges=20)
PROMPTS = {
    "Random colour:": ["Any colour at all:", "Colour:"],
    "A number from 1 to 20, please:": ["Number:", "Some number between 1 and 20 chosen by chance:"],
}


def model() -> torch.nn.Module:
    made = tiny.llama(len(TOKENIZER), dtype=torch.float32)
    made.generation_config.eos_token_id = None
    return made


def behind(made: torch.nn.Module, text: list[int]) -> np.ndarray:
    """Log-probabilities of the next token, by a plain forward pass."""
    z = made(torch.tensor([text])).logits[0, -1].double().numpy()
    return z - z.max() - np.log(np.exp(z - z.max()).sum())


def test_the_reader_reads_what_plain_passes_read():
    """Texts that grow, are shuffled, doubled, dropped, and begun anew."""
    made, rng = model(), np.random.default_rng(0)
    reader = Reader(made)
    texts = [tuple(rng.integers(0, len(TOKENIZER), n).tolist()) for n in (3, 9, 1, 5)]
    for step in range(9):
        got = reader(texts)
        for text, row in zip(texts, got, strict=True):
            wanted = made(torch.tensor([text])).logits[0, -1]
            torch.testing.assert_close(row, wanted, rtol=0, atol=2e-4)
        kept = rng.integers(0, len(texts), 4)
        texts = [(*texts[i], int(rng.integers(0, len(TOKENIZER)))) for i in kept]
        if step == 5:
            texts[0] = (1, 2, 3)


def test_the_reader_reads_once_what_is_asked_twice():
    made = model()
    calls = []
    made.register_forward_hook(lambda *_: calls.append(1))
    reader = Reader(made)
    for _ in range(3):
        reader([(1, 2), (3,)])
    assert len(calls) == 1


def steps_of(made: torch.nn.Module, chain: decal.Chain) -> Iterator[tuple[str, list[str], list[int], np.ndarray]]:
    """Of a batch padded on the left: each prompt, its other ways, what was generated so far, and the scores there."""
    inputs = TOKENIZER(list(PROMPTS), return_tensors="pt", padding=True, padding_side="left")
    torch.manual_seed(1)
    out = made.generate(
        **inputs, max_new_tokens=5, return_dict_in_generate=True, output_scores=True,
        **chain.generate_kwargs(pad_token_id=TOKENIZER.pad_token_id),
    )  # fmt: skip
    width = inputs["input_ids"].shape[1]
    for row, (prompt, ways) in enumerate(PROMPTS.items()):
        for step, scores in enumerate(out.scores):
            generated = out.sequences[row, width : width + step].tolist()
            yield prompt, ways, generated, scores[row].double().numpy()


def test_contrast_against_a_smaller_model_in_generate():
    """Scores of every step, against forward passes of both models; several models' caches don't mix."""
    made, small = model(), tiny.llama(len(TOKENIZER), seed=3, dtype=torch.float32)
    views = Prompts(made, TOKENIZER, PROMPTS, smaller=small)
    chain = (ensemble(0.4) | contrast(0.7, against="smaller")).for_prompts(views)
    assert "a row of the smaller model" in "".join(notes(chain))
    assert kinds(chain) == {"others", "smaller"}
    assert kinds(contrast(0.7, against="smaller") | temperature(2)) == {"smaller"}
    for prompt, ways, generated, got in steps_of(made, chain):
        own, *others = (behind(made, TOKENIZER.encode(text) + generated) for text in (prompt, *ways))
        wanted = 0.6 * own + 0.4 * np.mean(others, 0) - 0.7 * behind(small, TOKENIZER.encode(prompt) + generated)
        np.testing.assert_allclose(got - got.max(), wanted - wanted.max(), atol=5e-4)


@pytest.mark.parametrize("form", ["mean", "least"])
def test_formulas_in_generate(form):
    """Scores of every step of a batch padded on the left, against forward passes of each prompt by itself."""
    made = model()
    views = Prompts(made, TOKENIZER, PROMPTS, blank=["Answer:"])
    chain = (ensemble(0.4, form=form) | contrast(0.3) | temperature(1.2)).for_prompts(views)
    asked, asked_nothing = "a row of the model for each other way to ask", "a row of the model for each blank prompt"
    assert f": {asked} (at most 2), {asked_nothing} (at most 1)" in "".join(notes(chain))
    assert f": {asked} (at most 2)" == "".join(notes(ensemble(0.4, form=form).for_prompts(views)))[-len(asked) - 14 :]
    assert notes(ensemble(0)) == []
    for text, said in (
        ("ensemble(0.5)", asked),
        ("contrast(0.5) | ensemble(0.5)", f"{asked}, {asked_nothing}"),
        ('contrast(0.5, against="smaller")', "a row of the smaller model"),
        ('contrast(0, against="smaller") | ensemble(0.5)', asked),
    ):
        assert "".join(notes(decal.parse(text))).endswith(f"reads more than its own row: {said}")
    for prompt, ways, generated, got in steps_of(made, chain):
        own, *others, blank = (behind(made, TOKENIZER.encode(text) + generated) for text in (prompt, *ways, "Answer:"))
        other = np.mean(others, 0) if form == "mean" else np.min(others, 0)
        wanted = (0.6 * own + 0.4 * other - 0.3 * blank) / 1.2
        np.testing.assert_allclose(got - got.max(), wanted - wanted.max(), atol=5e-4)


def test_beams_and_seeds():
    made = model()
    views = Prompts(made, TOKENIZER, PROMPTS)
    chain = ensemble(0.5).for_prompts(views)
    inputs = TOKENIZER(list(PROMPTS), return_tensors="pt", padding=True, padding_side="left")
    pad = TOKENIZER.pad_token_id

    def score(prompt: str, generated: list[int]) -> float:
        """Log-probability of a text under the chain, by plain forward passes."""
        total = 0.0
        for step, token in enumerate(generated):
            own, *others = (behind(made, TOKENIZER.encode(text) + generated[:step]) for text in (prompt, *PROMPTS[prompt]))
            z = 0.5 * own + 0.5 * np.mean(others, 0)
            total += z[token] - np.logaddexp.reduce(z)
        return total

    greedy, beams = (
        made.generate(**inputs, max_new_tokens=6, **chain.generate_kwargs(num_beams=n, do_sample=False, pad_token_id=pad))
        for n in (1, 4)
    )
    for row, prompt in enumerate(PROMPTS):
        best, first = (score(prompt, found[row, -6:].tolist()) for found in (beams, greedy))
        assert best >= first - 1e-3
    together = made.generate(**inputs, max_new_tokens=6, **chain.generate_kwargs(seeds=[3, 4], pad_token_id=pad))
    for row, prompt in enumerate(PROMPTS):
        alone = made.generate(
            **TOKENIZER(prompt, return_tensors="pt"),
            max_new_tokens=6,
            **chain.generate_kwargs(seeds=[3 + row], pad_token_id=pad),
        )
        assert together[row, -6:].tolist() == alone[0, -6:].tolist()


def test_a_token_that_one_prompt_rules_out_is_unlikely_and_not_lost():
    class Views:
        def logits(self, kind, history):
            return torch.tensor([[[0.0, 0.0, -torch.inf]]])

    history = decal.History.of([[1]])
    for chain in (ensemble(0.5), contrast(0.5)):
        assert chain.for_prompts(Views())(torch.zeros(1, 3), history=history).isfinite().all()


def test_what_goes_wrong_is_said():
    made = model()
    with pytest.raises(DecalError, match="for_prompts"):
        ensemble().generate_kwargs()
    with pytest.raises(DecalError, match="same number"):
        Prompts(made, TOKENIZER, {"a": ["b"], "c": ["d", "e"]})
    with pytest.raises(DecalError, match="lists of texts"):
        Prompts(made, TOKENIZER, {"a": "b"})
    with pytest.raises(DecalError, match="at least 1, got"):
        Prompts(made, TOKENIZER, {"a": []})
    with pytest.raises(DecalError, match="lists of texts"):
        Prompts(made, TOKENIZER, {"a": [7]})
    for nothing in (None, {}, ["a"]):
        with pytest.raises(DecalError, match="others or blank are needed"):
            Prompts(made, TOKENIZER, nothing)
    for others, blank in (({"a": None}, ()), ({1: ["b"]}, ()), ({"a": ["b"]}, None), ({"a": ["b"]}, "c")):
        with pytest.raises(DecalError, match="lists of texts"):
            Prompts(made, TOKENIZER, others, blank)
    for pair in ((None, TOKENIZER), (made, None)):
        with pytest.raises(DecalError, match="takes a model and its tokenizer"):
            Prompts(*pair, {"a": ["b"]})
    with pytest.raises(DecalError, match=r"takes decal\.Prompts"):
        ensemble().for_prompts(3)
    with pytest.raises(DecalError, match="no step of min_p"):
        decal.min_p(0.1).for_prompts(Prompts(made, TOKENIZER, {"a": ["b"]}))
    wide = ensemble().for_prompts(Prompts(made, TOKENIZER, {"a": ["b"]}))
    with pytest.raises(DecalError, match="behind other prompts are logits of"):
        wide(torch.zeros(1, len(TOKENIZER) + 9), history=decal.History.of([TOKENIZER.encode("a")]))
    with pytest.raises(DecalError, match="other prompts, which an estimate can't give"):
        estimate.check([ensemble(0.5) | temperature(2)])
    with pytest.raises(DecalError, match="at least one token"):
        Prompts(made, TOKENIZER, {"a": [""]})
    views = Prompts(made, TOKENIZER, {"a": ["b"]})
    with pytest.raises(DecalError, match="none for a prompt"):
        ensemble().for_prompts(views)(torch.zeros(1, len(TOKENIZER)), history=decal.History.of([[5, 6]], prompt=2))
    with pytest.raises(DecalError, match="nothing in particular"):
        contrast().for_prompts(views)(torch.zeros(1, len(TOKENIZER)), history=decal.History.of([[5, 6]], prompt=2))
    against = contrast(against="smaller")
    with pytest.raises(DecalError, match="reads a smaller model, and has none"):
        against.for_prompts(views)(torch.zeros(1, len(TOKENIZER)), history=decal.History.of([[5, 6]], prompt=2))
    with pytest.raises(DecalError, match="smaller is a model, got str"):
        Prompts(made, TOKENIZER, smaller="gpt2")
    few = against.for_prompts(Prompts(made, TOKENIZER, smaller=tiny.llama(30)))
    with pytest.raises(DecalError, match="of the smaller model are logits of 30 tokens"):
        few(torch.zeros(1, len(TOKENIZER)), history=decal.History.of([[5, 6]], prompt=2))
    with pytest.raises(DecalError, match="knows 30 tokens, and not the token 200"):
        few(torch.zeros(1, 30), history=decal.History.of([[5, 200]], prompt=2))
    small = against.for_prompts(Prompts(made, TOKENIZER, smaller=model()))
    with pytest.raises(DecalError, match="begins with padding"):
        small(torch.zeros(1, len(TOKENIZER)), history=decal.History.of([[TOKENIZER.pad_token_id, 6]], prompt=2))
    others = [ensemble().for_prompts(Prompts(made, TOKENIZER, {"a": ["b"]})) for _ in range(2)]
    with pytest.raises(DecalError, match="different prompts; use for_prompts once"):
        others[0] | others[1]


def mass(trie, law):
    """Probability of all answers, by the law at every node."""
    total = 0.0
    for node, answer in enumerate(trie.answer):
        if answer >= 0:
            here, p = node, law[node][list(trie.ends)].sum()
            while here:
                p *= law[trie.parent[here]][trie.token[here]]
                here = trie.parent[here]
            total += p
    return total


def test_the_evaluator_reads_the_other_prompts_of_a_task(tmp_path, monkeypatch):
    """Probability of every answer under a chain with both rules, against plain forward passes of every prompt by itself."""
    monkeypatch.setenv("DECAL_CACHE", str(tmp_path))
    names = ["ab", "abc", "b", "cab"]
    ways = [{"label": "y:"}, {"label": "any of them:"}]
    task = Task(name="t", label="x:", phrasings=ways, answers=Answers(list=names), shots=2, draws=3)
    question = Question(task, ValidSet.from_list(names))
    tokenizer = tiny.byte_level()
    made = tiny.llama(len(tokenizer))
    evaluation = Evaluation(
        LoadedModel(made, tokenizer, "tiny", "f"),
        [Setting("f", decal.parse("ensemble(0.4) | contrast(0.3) | temperature(1.3)"))],
    )
    evaluation.check(question)
    result = evaluation.run(question)
    for number, (_, prompt) in enumerate(question.prompts(tokenizer, 0)):
        told = question.other_prompts(number, tokenizer, 0)
        assert [len(told[kind]) for kind in ("others", "blank")] == [2, 1]
        assert not {tuple(prompt)} & {tuple(other) for other in told["others"]}
        trie, _ = evaluation.builder.build(question.valid, question.policy)
        law = {}
        for node in range(len(trie)):
            own, *others, blank = (
                behind(made, text + trie.path(node)) for text in (list(prompt), *told["others"], *told["blank"])
            )
            law[node] = tiny.softmax((0.6 * own + 0.4 * np.mean(others, 0) - 0.3 * blank) / 1.3)
        assert result.validity[0, number] == pytest.approx(mass(trie, law), rel=1e-6)
    again = evaluation.run(question)
    np.testing.assert_array_equal(again.validity, result.validity)
    alone = Question(task.model_copy(update={"draws": 1}), question.valid)
    with pytest.raises(DecalError, match="one prompt only"):
        evaluation.check(alone)


def test_the_evaluator_reads_a_smaller_model(tmp_path, monkeypatch):
    """Probability of every answer, against plain forward passes of both models, with one prompt and no other."""
    monkeypatch.setenv("DECAL_CACHE", str(tmp_path))
    names = ["ab", "abc", "b"]
    question = Question(Task(name="t", label="x:", answers=Answers(list=names), shots=2, draws=1), ValidSet.from_list(names))
    tokenizer = tiny.byte_level()
    made, small = tiny.llama(len(tokenizer)), tiny.llama(len(tokenizer), seed=5)
    settings = [Setting("f", decal.parse('contrast(0.6, against="smaller")'))]
    loaded, smaller = (LoadedModel(m, tokenizer, name, name) for m, name in ((made, "tiny"), (small, "tinier")))
    evaluation = Evaluation(loaded, settings, smaller=smaller)
    evaluation.check(question)
    result = evaluation.run(question)
    ((_, prompt),) = question.prompts(tokenizer, 0)
    trie, _ = evaluation.builder.build(question.valid, question.policy)
    law = {}
    for node in range(len(trie)):
        text = list(prompt) + trie.path(node)
        law[node] = tiny.softmax(behind(made, text) - 0.6 * behind(small, text))
    assert result.validity[0, 0] == pytest.approx(mass(trie, law), rel=1e-6)
    np.testing.assert_array_equal(evaluation.run(question).validity, result.validity)
    with pytest.raises(DecalError, match="some setting reads a smaller model"):
        Evaluation(loaded, settings)
    with pytest.raises(DecalError, match="tinier has other tokens than tiny"):
        Evaluation(loaded, settings, smaller=LoadedModel(small, TOKENIZER, "tinier", "g"))
