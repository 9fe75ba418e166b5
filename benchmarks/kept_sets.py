"""What every rule keeps at its defaults, measured on real next-token rows: docs/kept_sets.json and docs/kept_sets.png.

    python benchmarks/kept_sets.py rows       # eval/catalogue_rows.safetensors: three rows of smollm2, for pictures
    python benchmarks/kept_sets.py measure    # docs/kept_sets.json; an hour for basis_aware; gemma3-270m needs accelerate
    python benchmarks/kept_sets.py add        # the same for rules that the file lacks, beside what it has
    python benchmarks/kept_sets.py draw       # docs/kept_sets.png and the sentences, from the numbers measured
    decal rules --page docs                   # the page with both

Rows are at every fourth token of texts.txt, or every eighth for the larger model. The numbers of a row: how many tokens are
kept, their mass under the law before the rule, and the entropy of the law after it.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

import decal
from decal.eval import catalogue, models
from decal.samplers.chain import Chain, run_pass
from decal.samplers.context import Context, History, Weights
from decal.samplers.rule import Rule

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
MODELS = {"smollm2": 4, "gemma3-270m": 8}
"""The models, and at every how many tokens of the texts their rows are taken."""
CHUNK, HOT = 8, 1.5
SUBSET = {"top_w": 30, "basis_aware": 10}
"""How many rows slow rules are measured on, spread over all of them."""
ONLY = {"basis_aware": ("smollm2",)}
"""Models on which a rule is measured, where it isn't all of them: a linear program over 262,144 tokens takes minutes."""
TOLD = {"answers", "prompts"}
"""What passages have none of."""
COLD, WARM, BEFORE = "T = 1", f"T = {HOT}", f"rule, then T = {HOT}"


def passages() -> list[tuple[str, str]]:
    """Kinds and texts of texts.txt."""
    lines = [line for line in (HERE / "texts.txt").read_text().splitlines() if not line.startswith("#")]
    blocks = [block.strip() for block in "\n".join(lines).split("\n\n") if block.strip()]
    return [(kind, text) for kind, _, text in (block.partition(": ") for block in blocks)]


@torch.no_grad()
def read(loaded: models.LoadedModel, every: int) -> tuple[Tensor, list[list[int]]]:
    """Logits (N, V) and the token ids before each row."""
    rows, before = [], []
    for _, text in passages():
        ids = loaded.tokenizer(text, return_tensors="pt").input_ids
        logits = loaded.model(ids).logits[0].float()
        places = range(every - 1, ids.shape[1] - 1, every)
        rows += [logits[i] for i in places]
        before += [ids[0, : i + 1].tolist() for i in places]
    return torch.stack(rows), before


def outcomes(rule: Rule) -> Iterator[tuple[float, bool]]:
    """Probabilities of what its coin may show; one outcome for a rule without a coin."""
    p = float(rule.params["probability"].default) if "chance" in rule.needs else 1.0  # type: ignore[arg-type]
    yield p, True
    if p < 1:
        yield 1 - p, False


def apply(chain: Chain, z: Tensor, context: Context) -> Tensor:
    """Logits after the chain, with its memory at the start."""
    states = {id(s): state for s, state in zip(chain.steps, chain.init(len(z)), strict=True)}
    for one in chain.plan:
        z = run_pass(one, z, context, states)
    return z


def measure(
    rule: Rule | None,
    case: str,
    logits: Tensor,
    before: Sequence[list[int]],
    known: Context,
    shows: Sequence[tuple[float, bool]] = ((1.0, True),),
) -> np.ndarray:
    """Kept sizes, kept masses and entropies, (3, N), of the mixture over what the coin ``shows``."""
    found = []
    for start in range(0, len(logits), CHUNK):
        cold = logits[start : start + CHUNK].double()
        here = replace(known, history=History.of(before[start : start + CHUNK], prompt=0))
        hot = cold if case == COLD else cold / HOT
        given = cold if case == BEFORE else hot
        mixed, kept = torch.zeros_like(cold), torch.zeros_like(cold)
        for share, coin in shows:
            after = apply(rule(), given, replace(here, coin=coin)) if rule else given
            kept += share * ~after.isneginf()
            mixed += share * (after / HOT if case == BEFORE else after).softmax(-1)
        size, mass = (kept > 0).sum(-1).double(), (hot.softmax(-1) * kept).sum(-1)
        found.append(torch.stack([size, mass, torch.special.entr(mixed).sum(-1)]))
    return torch.cat(found, 1).numpy()


def summary(numbers: np.ndarray, vocabulary: int) -> dict[str, Any]:
    size, mass, entropy = numbers
    return {
        "rows": len(size),
        "cuts": bool((size < vocabulary).any()),
        "median": float(np.median(size)),
        "p10": float(np.percentile(size, 10)),
        "p90": float(np.percentile(size, 90)),
        "single": round(float((size == 1).mean()), 4),
        "mass": round(float(mass.mean()), 4),
        "entropy": round(abs(float(entropy.mean())), 4),
    }


def measure_model(name: str, known_rules: Collection[str] = ()) -> dict[str, Any]:
    """All rules on one model, but for known ones."""
    torch.set_num_threads(1)
    loaded = models.load(name, accept_licence=True)
    logits, before = read(loaded, MODELS[name])
    ends = [loaded.tokenizer.eos_token_id, *decal.tokens_with(loaded.tokenizer, "\n")]
    known = Context(weights=Weights.of(loaded.model), ends=tuple(ends))
    results: dict[str, dict[str, Any]] = {}
    notes = []

    def add(key: str, case: str, *args: Any) -> None:
        started = time.monotonic()
        results.setdefault(key, {})[case] = summary(measure(*args), logits.shape[1])
        print(f"{name}: {key}, {case}: {time.monotonic() - started:.1f} s", file=sys.stderr)

    for case in (COLD, WARM) if "no rule" not in known_rules else ():
        add("no rule", case, None, case, logits, before, known)
    for rule in (r for some in catalogue.groups(decal.RULES.values()).values() for r in some):
        if not catalogue.is_own(rule) or rule.name in ("temperature", *known_rules) or rule.needs & TOLD:
            continue
        if name not in ONLY.get(rule.name, tuple(MODELS)):
            notes.append(f"`{rule.name}` was not measured here")
            continue
        count = SUBSET.get(rule.name, len(logits))
        some = np.linspace(0, len(logits) - 1, min(count, len(logits))).round().astype(int).tolist()
        if len(some) < len(logits):
            notes.append(f"`{rule.name}` on {len(some)} of the rows")
        for case in (COLD, WARM, *([BEFORE] if rule.side == "before" else [])):
            rows = case, logits[some], [before[i] for i in some], known
            if "chance" in rule.needs:
                add(f"{rule.name}, its coin fallen", case, rule, *rows)
            add(rule.name, case, rule, *rows, list(outcomes(rule)))
    likely = logits.double().softmax(-1).amax(-1).median()
    about = f"{len(logits)} rows over {logits.shape[1]:,} tokens; "
    about += f"the most probable token has a probability of {likely:.2f} in the median row."
    if notes:
        about += f" {'; '.join(notes)}."
    cases = [{"name": case} for case in (COLD, WARM, BEFORE)]
    found = {"name": name, "fingerprint": loaded.fingerprint, "vocabulary": logits.shape[1], "rows": len(logits)}
    return {**found, "about": about, "cases": cases, "rules": results}


ABOUT = (
    "Every rule by itself, at its defaults, at every fourth (gemma3-270m: eighth) token of {passages} short passages of "
    "prose, code, facts, lists and dialogue (`benchmarks/texts.txt`), at temperature 1, behind temperature 1.5, and, if "
    "it is meant to stand before temperature, also before it. A cell is: median / 90th percentile of the number of tokens "
    "kept; share of rows with one token; mean mass of the kept tokens under the law at that temperature without the rule; "
    "mean entropy in nats of the law with it. Rules that look back see the passage so far, taken as generated; memories "
    "are at their start; `xtc` is the mixture over its coin. Reshaping rules drop nothing, so only their entropy says "
    "something; `power_law`, `adaptive_p` and `best_of_k` are made to stand behind a cut, which they don't here. Measured "
    "{date} by `benchmarks/kept_sets.py` with decal {decal}, torch {torch} and transformers {transformers}; the weights "
    "are 4-bit."
)


def main(command: str) -> None:
    torch.set_num_threads(1)
    file = DOCS / "kept_sets.json"
    if command == "rows":
        catalogue.save_rows(catalogue.ROWS, models.load("smollm2"))
    elif command == "measure":
        versions = {"decal": decal.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
        about = ABOUT.format(passages=len(passages()), date=date.today(), **versions)
        data = {"about": about, "date": str(date.today()), "python": platform.python_version(), **versions}
        with ProcessPoolExecutor(len(MODELS), get_context("spawn")) as pool:
            data |= {"lessons": [], "models": list(pool.map(measure_model, MODELS))}
        file.write_text(json.dumps(data, indent=1) + "\n")
    elif command == "add":
        data = json.loads(file.read_text())
        for model in data["models"]:
            new = measure_model(model["name"], model["rules"])
            if new["fingerprint"] != model["fingerprint"]:
                sys.exit(f"{model['name']} has changed since: measure everything")
            model["rules"] |= new["rules"]
        data["about"] += f" {listed(list(new['rules']))} were added on {date.today()}." if new["rules"] else ""
        file.write_text(json.dumps(data, indent=1) + "\n")
    if command in ("measure", "add", "draw"):
        data = json.loads(file.read_text())
        data["lessons"] = lessons(data)
        file.write_text(json.dumps(data, indent=1) + "\n")
        (DOCS / "kept_sets.png").write_bytes(draw(data))
    elif command != "rows":
        sys.exit(__doc__)


def lessons(data: Mapping[str, Any]) -> list[str]:
    """What the numbers say, in sentences whose lists and numbers come from them; read them again after measuring."""
    every = [model["rules"] for model in data["models"]]
    first = every[0]
    names = [
        n for n in first if n not in ("no rule", "xtc, its coin fallen") and first[n][COLD]["median"] < first_size(data) / 2
    ]
    both = [n for n in names if all(n in rules for rules in every)]

    def numbers(name: str, key: str, case: str = COLD) -> str:
        form = {"single": ".0%", "entropy": ".2f", "mass": ".2f", "median": ",.0f"}[key]
        return " and ".join(f"{rules[name][case][key]:{form}}" for rules in every if name in rules)

    greedy = [n for n in both if all(rules[n][COLD]["single"] > 0.5 for rules in every)]
    greedy.sort(key=lambda n: -first[n][COLD]["single"])
    growing = [n for n in names if all(r[n][WARM]["median"] > 10 * r[n][COLD]["median"] for r in every if n in r)]
    growing.sort(key=lambda n: -first[n][WARM]["median"] / first[n][COLD]["median"])
    fixed = [n for n in both if all(rules[n][WARM]["median"] == rules[n][COLD]["median"] for rules in every)]
    early = [n for n in names if BEFORE in first[n]]
    uniform = " and ".join(f"{np.log(model['vocabulary']):.2f}" for model in data["models"])
    loose = [n for n in first if n not in names and first[n][COLD]["entropy"] > first["no rule"][COLD]["entropy"] + 2]
    same = " `p_less_norm` has the numbers of `p_less`." if all(r["p_less"] == r["p_less_norm"] for r in every) else ""
    late, soon = (first["eta"][case]["entropy"] for case in (WARM, BEFORE))
    return [
        f"Near-greedy at their defaults: {listed(greedy)} keep a single token in most rows at temperature 1 ("
        + "; ".join(f"`{n}` in {numbers(n, 'single')}" for n in greedy)
        + "; two numbers are of the two models)."
        + same,
        f"Behind temperature {HOT} some sets blow up: "
        + "; ".join(f"the median of `{n}` goes from {numbers(n, 'median')} to {numbers(n, 'median', WARM)}" for n in growing)
        + f". {listed(fixed)} keep their median, but the mass they keep falls, so they cut harder than at temperature 1.",
        "Where a cut stands matters; before temperature, as they are meant to, "
        + "; ".join(f"`{n}` keeps {numbers(n, 'median', BEFORE)} instead of {numbers(n, 'median', WARM)}" for n in early)
        + f". With `eta` the entropy is then {soon:.2f} instead of {late:.2f} nats.",
        f"{listed(loose)} need a cut before them: alone they bring the mean entropy of {numbers('no rule', 'entropy')} nats to "
        + "; ".join(f"{numbers(n, 'entropy')} (`{n}`)" for n in loose)
        + f", where uniform is {uniform}. `best_of_k` goes the other way, to {numbers('best_of_k', 'entropy')}.",
        "Penalties are gentle at their defaults: "
        + "; ".join(
            f"`{n}` {numbers(n, 'entropy')}" for n in ("repetition_penalty", "presence_penalty", "frequency_penalty", "dry")
        )
        + " nats. They act on a few tokens of the text, which short passages seldom repeat.",
    ]


def first_size(data: Mapping[str, Any]) -> int:
    """The vocabulary of the first model."""
    size: int = data["models"][0]["vocabulary"]
    return size


def listed(names: Sequence[str]) -> str:
    """``a``, ``b`` and ``c``."""
    quoted = [f"`{name}`" for name in names]
    return f"{', '.join(quoted[:-1])} and {quoted[-1]}" if len(quoted) > 1 else "".join(quoted)


def draw(data: Mapping[str, Any]) -> bytes:
    """The picture: kept sizes and single-token shares of rules that cut, entropies of those that reshape."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    first = data["models"][0]
    # Bans of a few tokens keep nearly everything; what they do shows in the entropy.
    cutting = [name for name, by_case in first["rules"].items() if by_case[COLD]["median"] < first["vocabulary"] / 2]
    cutting.sort(key=lambda name: (-first["rules"][name][COLD]["median"], first["rules"][name][COLD]["single"]))
    rest = [name for name in first["rules"] if name not in cutting]
    rest.sort(key=lambda name: first["rules"][name][COLD]["entropy"])
    figure = Figure(figsize=(11, 0.23 * (len(cutting) + len(rest)) + 2.1), dpi=110)
    FigureCanvasAgg(figure)
    columns = len(data["models"]) + 1
    widths, heights = [1.0] * (columns - 1) + [0.6], [len(cutting) + 1, len(rest) + 1]
    axes = figure.subplots(2, columns, sharey="row", width_ratios=widths, height_ratios=heights)
    high = figure.get_figheight()
    figure.subplots_adjust(0.17, 0.35 / high, 0.985, 1 - 0.75 / high, wspace=0.06, hspace=4.6 / (len(cutting) + len(rest)))
    styles = {COLD: ("#1f77b4", -0.14), WARM: ("#ff7f0e", 0.14)}
    handles: dict[str, Any] = {}
    for column, model in enumerate(data["models"]):
        sizes, entropies = axes[0, column], axes[1, column]
        for case, (colour, shift) in styles.items():
            for y, name in enumerate(cutting):
                if found := model["rules"].get(name, {}).get(case):
                    sizes.plot([found["p10"], found["p90"]], [y + shift] * 2, color=colour, linewidth=2, alpha=0.45)
                    (handles[case],) = sizes.plot(found["median"], y + shift, "o", color=colour, markersize=4.5)
            given = model["rules"]["no rule"][case]["entropy"]
            entropies.axvline(given, color=colour, linewidth=1, linestyle=":")
            for y, name in enumerate(rest):
                if found := model["rules"].get(name, {}).get(case):
                    entropies.plot(found["entropy"], y, "o", color=colour, markersize=4.5)
        sizes.set(xscale="log", xlim=(0.8, 1.4 * model["vocabulary"]), title=f"{model['name']}: tokens kept")
        sizes.set_xticks([10**k for k in range(6)], ["1", "10", "100", "1k", "10k", "100k"])
        sizes.minorticks_off()
        entropies.set(xlim=(-0.2, np.log(model["vocabulary"]) + 0.5), title=f"{model['name']}: mean entropy, nats")
    share = axes[0, -1]
    for number, model in enumerate(data["models"]):
        for y, name in enumerate(cutting):
            if found := model["rules"].get(name, {}).get(COLD):
                mark = {"marker": "o", "mfc": "#1f77b4"} if number == 0 else {"marker": "D", "mfc": "white"}
                label = f"{model['name']} (at the right)"
                (handles[label],) = share.plot(100 * found["single"], y, linestyle="", color="#1f77b4", markersize=4.5, **mark)
    share.set(xlim=(-4, 104), title="rows with one token, %, T = 1")
    axes[1, -1].axis("off")
    for line, names in ((axes[0], cutting), (axes[1], rest)):
        line[0].set(yticks=range(len(names)), yticklabels=names, ylim=(-0.7, len(names) - 0.3))
        for axis in line:
            axis.grid(alpha=0.3)
            axis.tick_params(labelsize=8, length=0)
            axis.title.set_size(9)
            axis.spines[["top", "right"]].set_visible(False)
    note = (
        "Every rule at its defaults.",
        "Above: dots are medians, lines the",
        "10th to 90th percentile of rows.",
        "Below: dotted, without a rule.",
    )
    axes[1, -1].text(0.0, 0.95, "\n".join(note), transform=axes[1, -1].transAxes, fontsize=8, va="top")
    figure.legend(list(handles.values()), list(handles), loc="upper center", ncols=4, fontsize=8.5, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer)
    return buffer.getvalue()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) == 2 else "")
