"""What each signal beyond a token's own probability tells of its validity, one by one, as a table for the page.

python benchmarks/calibration/signals.py --model smollm2 --out results/signals-smollm2.json

At prefixes of valid answers (`PREFIXES` of each task, drawn with seed 0, the empty one among them) the `HEAD` likeliest tokens
that don't end the answer are ranked by a signal. Average precision is that of ranking the valid ones first, averaged over the
prefixes that have both kinds. Weights and fits come from other tasks, without siblings.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from rich.progress import track
from run import affordable, group_of
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from decal.eval import models, task
from decal.eval.forward import prefix_logits
from decal.eval.frontier import Evaluation
from decal.eval.grid import Setting
from decal.eval.paths import atomic_write
from decal.eval.task import Question
from decal.samplers.rule import find
from decal.samplers.trie import TokenTrie

PREFIXES, HEAD, ANSWER = 30, 40, 8
WEIGHTS = (-1.0, -0.5, -0.3, -0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
"""Of a signal that is added to the log-probability."""
ADDED = {
    "log-probability under a prompt without content": "blank",
    "log-probability at half of the layers": "layers 1/2",
    "log-probability at three quarters of the layers": "layers 3/4",
    "look-ahead: entropy of the next row": "next entropy",
    "look-ahead: log-probability of the next row's best": "next best",
    "look-ahead: log-probability of ending next": "next end",
}
ROW = ("own", "gap", "rank", "entropy")
PROMPTS = ("others", "blank")
LAYERS = ("layers 1/2", "layers 3/4")
AHEAD = ("next entropy", "next best", "next end")
FITTED = {
    "the row alone": ROW,
    "the row and look-ahead": (*ROW, *AHEAD),
    "the row, prompts, layers and look-ahead": (*ROW, *PROMPTS, *LAYERS, *AHEAD),
}
LABELS = ("Yes", " Yes", " yes"), ("No", " No", " no")


class Prefix(NamedTuple):
    """Candidates at one prefix: which are valid, and each signal of each."""

    valid: np.ndarray
    signals: dict[str, np.ndarray]

    def ranked(self, score: np.ndarray) -> float:
        """Average precision of a score."""
        return float(average_precision_score(self.valid, score))


def rows_at(model: Any, prompt: Sequence[int], trie: TokenTrie, share: float = 1.0) -> torch.Tensor:
    """(nodes, V) log-probabilities behind a prompt and each node, as the head reads them at a share of the layers."""
    layers, seen, found = model.model.layers, [], {}
    hook = layers[round(len(layers) * share) - 1].register_forward_hook(lambda _, __, out: seen.append(out))

    def sink(nodes: list[int], rows: torch.Tensor) -> None:
        if share < 1:
            rows = model.lm_head(model.model.norm(seen[-1][0, -len(nodes) :]))
        found.update(zip(nodes, rows.float(), strict=True))
        seen.clear()

    prefix_logits(model, prompt, trie, sink, lambda *_: None)
    hook.remove()
    return torch.stack([found[node] for node in range(len(trie))]).log_softmax(-1)


def some_prefixes(trie: TokenTrie) -> tuple[TokenTrie, list[int], list[int]]:
    """A trie that holds some prefixes of a task's: for each of its nodes which one it is there, and which were chosen."""
    inner = [node for node in range(1, len(trie)) if trie.children[node]]
    chosen = np.random.default_rng(0).permutation(inner)[: PREFIXES - 1].tolist() if inner else []
    small, place, of = TokenTrie(trie.size, trie.ends), {0: 0}, [0]
    for node in sorted({n for one in chosen for n in ancestors(trie, one)}):
        place[node] = small.add(place[trie.parent[node]], trie.token[node])
        of.append(node)
    return small, of, sorted({0, *(place[node] for node in chosen)})


def ancestors(trie: TokenTrie, node: int) -> list[int]:
    """A node and those on the way to it, but for the first."""
    found = []
    while node:
        found.append(node)
        node = trie.parent[node]
    return found


def prefixes_of(evaluation: Evaluation, question: Question) -> list[Prefix]:
    """Signals at some prefixes of a task, the first of which is the empty one."""
    model, tokenizer = evaluation.model.model, evaluation.model.tokenizer
    trie, _ = evaluation.builder.build(question.valid, question.policy)
    small, of, chosen = some_prefixes(trie)
    prompt = next(ids for _, ids in question.prompts(tokenizer, evaluation.seed))
    told = question.other_prompts(0, tokenizer, evaluation.seed)
    own = rows_at(model, prompt, small)
    others = torch.stack([own, *(rows_at(model, ids, small) for ids in told["others"])]).mean(0)
    blank = rows_at(model, told["blank"][0], small)
    layers = {name: rows_at(model, prompt, small, share) for name, share in zip(LAYERS, (0.5, 0.75), strict=True)}
    ends = torch.tensor(trie.ends)
    content = own.clone()
    content[:, ends] = -torch.inf
    heads = {node: content[node].topk(HEAD).indices for node in chosen}
    large = TokenTrie(trie.size, trie.ends)
    for node in range(1, len(small)):
        large.add(small.parent[node], small.token[node])
    after = {node: [large.add(node, token) for token in heads[node].tolist()] for node in chosen}
    ahead = rows_at(model, prompt, large)
    found = []
    for node in chosen:
        head, next_ = heads[node], ahead[after[node]]
        rows = {"own": own, "others": others, "blank": blank, **layers}
        signals = {name: row[node, head] for name, row in rows.items()}
        signals["gap"] = own[node].max() - signals["own"]
        signals["rank"] = torch.log1p(torch.arange(HEAD))
        signals["entropy"] = (-(own[node].exp() * own[node]).sum()).expand(HEAD)
        signals["next entropy"] = -(next_.exp() * next_).sum(-1)
        signals["next best"] = next_.max(-1).values
        signals["next end"] = next_[:, ends].logsumexp(-1)
        valid = np.array([token in trie.children[of[node]] for token in head.tolist()])
        found.append(Prefix(valid, {name: value.double().numpy() for name, value in signals.items()}))
    found[0].signals["verified"] = verified(model, tokenizer, prompt, heads[0], question)
    return found


@torch.inference_mode()
def verified(model: Any, tokenizer: Any, prompt: Sequence[int], head: torch.Tensor, question: Question) -> np.ndarray:
    """Log-odds of yes that the model gives, asked whether what it would write from each token on is an answer."""
    ids = torch.cat([torch.tensor([list(prompt)]).expand(len(head), -1), head[:, None]], 1)
    pad = tokenizer.pad_token_id or tokenizer.eos_token_id
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=ANSWER, do_sample=False, pad_token_id=pad)
    label = (question.task.label or question.task.prompt or "").rstrip()
    odds = []
    for text in tokenizer.batch_decode(written[:, len(prompt) :], skip_special_tokens=True):
        answer = text.split("\n")[0].strip()
        asked = f'Question: A list says "{label} {answer}". Is "{answer}" a correct answer here, yes or no?\nAnswer:'
        row = model(**tokenizer(asked, return_tensors="pt")).logits[0, -1].double().log_softmax(-1)
        yes, no = ([tokenizer.encode(word, add_special_tokens=False)[-1] for word in words] for words in LABELS)
        odds.append(float(row[yes].logsumexp(0) - row[no].logsumexp(0)))
    return np.array(odds)


Score = Callable[[Prefix], np.ndarray]


def judged(prefixes: Sequence[Prefix], score: Score) -> float:
    """Mean average precision over prefixes where there is something to tell."""
    return float(np.mean([one.ranked(score(one)) for one in prefixes if 0 < one.valid.sum() < len(one.valid)]))


def added(signal: str, weight: float) -> Score:
    """The log-probability and a signal."""
    return lambda one: one.signals["own"] + weight * one.signals[signal]


def with_weight(data: dict[str, list[Prefix]], signal: str) -> dict[str, float]:
    """By task, a signal added with the weight that is best on other tasks."""
    table = {name: [judged(data[name], added(signal, weight)) for weight in WEIGHTS] for name in data}
    return {name: table[name][int(np.argmax(np.mean([table[other] for other in strangers(data, name)], 0)))] for name in data}


def strangers(data: dict[str, list[Prefix]], name: str) -> list[str]:
    """Tasks that are no siblings of a task."""
    return [other for other in data if group_of(other) != group_of(name)]


def fitted(data: dict[str, list[Prefix]], names: Sequence[str], make: Callable[[], Any]) -> dict[str, float]:
    """By task, a classifier on several signals fitted to other tasks."""
    columns = {task: [np.stack([one.signals[name] for name in names], 1) for one in data[task]] for task in data}
    valid = {task: np.concatenate([one.valid for one in data[task]]) for task in data}
    found = {}
    for held in data:
        rest = strangers(data, held)
        model = make().fit(np.concatenate([x for t in rest for x in columns[t]]), np.concatenate([valid[t] for t in rest]))
        scores = iter([model.predict_proba(x)[:, 1] for x in columns[held]])
        found[held] = judged(data[held], lambda _, scores=scores: next(scores))
    return found


def linear() -> Any:
    """A logistic regression."""
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, C=0.1))


def trees() -> Any:
    """Boosted trees."""
    return HistGradientBoostingClassifier(max_depth=4, max_iter=150, learning_rate=0.05, min_samples_leaf=100, random_state=0)


@click.command()
@click.option("--model", default="smollm2", show_default=True)
@click.option("--most-prefixes", default=3000, show_default=True)
@click.option("--accept-licence", is_flag=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(model: str, most_prefixes: int, accept_licence: bool, out: Path) -> None:
    """Write average precisions by signal and task."""
    evaluation = Evaluation(
        models.load(model, accept_licence=accept_licence), [Setting("temperature", find("temperature")(1.0))], cache=False
    )
    data: dict[str, list[Prefix]] = {}
    for name in track(task.builtin_names(), "reading signals"):
        question = task.load(name, draws=3)
        if affordable(evaluation, question, most_prefixes):
            prefixes = prefixes_of(evaluation, question)
            if any(0 < one.valid.sum() < len(one.valid) for one in prefixes):
                data[name] = prefixes
    plain = {name: judged(data[name], lambda one: one.signals["own"]) for name in data}
    found = {"log-probability": plain}
    found["its mean over three prompts"] = {name: judged(data[name], lambda one: one.signals["others"]) for name in data}
    found |= {f"plus w × {said}": with_weight(data, signal) for said, signal in ADDED.items()}
    for said, names in FITTED.items():
        found[f"logistic regression on {said}"] = fitted(data, names, linear)
        found[f"boosted trees on {said}"] = fitted(data, names, trees)
    first = {name: data[name][:1] for name in data if 0 < data[name][0].valid.sum() < HEAD}
    firsts = {"log-probability": {name: judged(first[name], lambda one: one.signals["own"]) for name in first}}
    firsts["the model's own verdict on the answer"] = {
        name: judged(first[name], lambda one: one.signals["verified"]) for name in first
    }
    firsts["plus w × the model's own verdict"] = with_weight(first, "verified")
    atomic_write(out, json.dumps({"model": model, "prefixes": found, "first tokens": firsts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
