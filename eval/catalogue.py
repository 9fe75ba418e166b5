"""The page of all rules, made from their declarations: ``decal rules --page docs``.

Text comes from docstrings and parameters, pictures from three rows of a real model in ``catalogue_rows.safetensors``, the table
of measurements, if there is one, from ``kept_sets.json``; ``benchmarks/kept_sets.py`` makes these two files.
A picture carries a digest of the numbers it shows, so whether it is stale doesn't depend on how it was drawn.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from decal.eval.paths import atomic_write, disk_errors
from decal.samplers.chain import Chain, run_pass
from decal.samplers.context import Context, History
from decal.samplers.errors import DecalError
from decal.samplers.rule import RULES, Rule

if TYPE_CHECKING:
    from decal.eval.models import LoadedModel

PAGE, PICTURES, MEASURED = "rules.md", "rules", "kept_sets.json"

ROWS = Path(__file__).parent / "catalogue_rows.safetensors"
"""Three rows of a real model, for the pictures."""

GROUPS = {
    "truncation": "Cuts: the most probable tokens, down to some level",
    "calibrated": "Cuts at an estimated validity",
    "reshaping": "Reshaping: what is kept gets other probabilities",
    "simplex": "Laws that solve a problem on the simplex",
    "history": "Rules that look back, or toss a coin",
    "embedding": "Rules that read the model's embeddings",
    "guided": "Rules that are told the valid answers",
    "views": "Rules that read other prompts too",
}
"""Headings for decal's own modules, in the order of the page."""

PROMPTS = {
    "confident": "One, two, three, four. One, two, three, four. One, two, three,",
    "middling": "The cat sat on the mat. The dog sat on the",
    "flat": "He put the letter on the table, took off his hat, and looked at the",
}
"""Texts whose next token the pictures are of; some likely ones occur in the text, or would repeat it."""

SHOWN: Mapping[str, Mapping[str, float]] = {"temperature": {"t": 1.5}}
"""Parameters in the picture, for a rule whose defaults do nothing."""

NEEDS = {
    "history": "the tokens so far",
    "state": "what was drawn before (its memory)",
    "chance": "a coin of its own",
    "model": "the model's embeddings",
    "answers": "the valid answers",
    "prompts": "other prompts",
    "ends": "the tokens that end a text, unless they are given",
}
LAYOUT = 1
"""Goes up when the way pictures are drawn changes, so that they count as stale."""

FLOOR = 1e-7  # of the probability axis


def is_own(rule: Rule) -> bool:
    """Whether the rule comes with decal, and not from a plugin."""
    return rule.body.__module__.startswith("decal.samplers.")


def groups(rules: Iterable[Rule]) -> dict[str, list[Rule]]:
    """Rules by heading: decal's by module, then those of other packages under the package's name."""
    rules = list(rules)
    found: dict[str, list[Rule]] = {}
    for module, title in GROUPS.items():
        found[title] = [r for r in rules if r.body.__module__ == f"decal.samplers.{module}"]
    known = {id(r) for some in found.values() for r in some}
    for rule in sorted((r for r in rules if id(r) not in known), key=lambda r: (r.body.__module__, r.name)):
        found.setdefault(f"From the package `{rule.body.__module__.split('.')[0]}`", []).append(rule)
    return {title: some for title, some in found.items() if some}


# ---- text


def signature(rule: Rule) -> str:
    """How the rule is called, with its defaults: ``min_p(p=0.1)``."""
    return f"{rule.name}({', '.join(f'{name}={_text(p.default)}' for name, p in rule.params.items())})"


def formula(rule: Rule) -> list[str]:
    """The paragraphs of the docstring between the first line and the sections."""
    paragraphs = (rule.body.__doc__ or "").split("\n\n")[1:]
    flat = [" ".join(p.split()) for p in paragraphs]
    return [p for p in flat if p and not re.match(r"(Elsewhere|Differs):", p)]


def paper_url(paper: str) -> str:
    """Where ``arXiv:...``, ``doi:...`` or an address without its scheme leads."""
    kind, _, number = paper.partition(":")
    places = {"arXiv": "https://arxiv.org/abs/", "doi": "https://doi.org/"}
    return places[kind] + number if kind in places else paper if "://" in paper else f"https://{paper}"


def invariance(rule: Rule) -> str:
    """What may change before the rule without changing what it keeps."""
    form = "" if isinstance(rule.shift, bool) else ", in its default form"
    found = [f"adding a constant to the logits{form}"] if rule.step().ignores_shift else []
    if rule.scale:
        found.append("temperature: before or after it, the same tokens are kept")
    text = "; ".join(found) or "nothing"
    if rule.moved:
        values = {name: p.default for name, p in rule.params.items()}
        rounded = {name: float(f"{v:.6g}") for name, v in rule.moved(2.0, **values).items()}
        moved = rule.step(**{**values, **rounded})
        text += f". Not to temperature, but `temperature(2.0) | {rule.step()}` keeps what `{moved}` keeps"
    return text


def entry(rule: Rule, picture: bool) -> str:
    """One rule in Markdown."""
    facts = {
        "Side": f"{rule.side} temperature" if rule.side != "either" else "before or after temperature",
        "Invariant to": invariance(rule),
        "Reads": ", ".join(["logits", *(text for name, text in NEEDS.items() if name in rule.needs)]),
        "Paper": f"[{rule.paper}]({paper_url(rule.paper)})" if rule.paper else "none",
        "Elsewhere": rule.section("Elsewhere") or "no other stack on record",
        "Differs": rule.section("Differs") or "none on record",
    }
    if rule.slow:
        facts["Slow"] = rule.slow
    if rule.wants_cut:
        facts["Side"] += ", behind a cut"
    lines = [f"### {rule.name}", "", f"`{signature(rule)}` ({rule.kind})", "", _escape(rule.summary), ""]
    for paragraph in formula(rule):
        lines += [_escape(paragraph), ""]
    if picture:
        lines += [f"![What {rule.name} does to three rows]({PICTURES}/{rule.name}.png)", ""]
    if rule.params:
        lines += ["| parameter | default | allowed |", "|---|---|---|"]
        for name, p in rule.params.items():
            allowed = re.sub(r" \((?:or )?\S+ = off\)", "", p.allowed)
            lines.append(f"| `{name}` | {_text(p.default)} | {allowed} |")
        lines.append("")
        switches = [f"`{name}` = {p.off:g}" for name, p in rule.params.items() if p.off is not None]
        if switches:
            facts = {"Off where": " and ".join(switches)} | facts
    lines += [f"- {name}: {_escape(text).removesuffix('.')}." for name, text in facts.items()]
    return "\n".join(lines) + "\n"


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) else repr(value)


def _escape(text: str) -> str:
    """``text`` so that Markdown shows ``*`` and ``<`` outside backticks as they are."""
    text = text.replace("``", "`")
    parts = text.split("`")
    return "`".join(part if i % 2 else re.sub(r"([*<])", r"\\\1", part) for i, part in enumerate(parts))


def page(rules: Iterable[Rule], rows: Sequence[PlotRow] = (), measured: Mapping[str, Any] | None = None) -> str:
    """The whole page in Markdown."""
    by_title = groups(rules)
    count = sum(map(len, by_title.values()))
    intro = (
        f"The {count} decoding rules this version knows, generated from their declarations by `decal rules --page docs`; do "
        "not edit. `help(decal.min_p)` says the same of one rule. Tokens of the same logit are kept or dropped together, so no "
        "rule depends on the order of the vocabulary; only rules that read tokens so far, embeddings or ends tell them apart."
    )
    lines = ["# Rules", "", intro, ""]
    for title, some in by_title.items():
        lines.append(f"- [{_plain(title)}](#{_anchor(title)}): " + ", ".join(f"[{r.name}](#{r.name})" for r in some))
    if measured:
        lines.append(f"- [{MEASURED_TITLE}](#{_anchor(MEASURED_TITLE)})")
    lines.append("")
    if rows:
        lines += _legend(rows)
    for title, some in by_title.items():
        lines += [f"## {title}", ""]
        lines += [entry(rule, _drawable(rule, rows)) for rule in some]
    if measured:
        lines += measured_section(measured)
    return "\n".join(lines).rstrip() + "\n"


def _plain(title: str) -> str:
    return title.replace("`", "")


def _anchor(title: str) -> str:
    """The anchor GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", _plain(title).lower()).replace(" ", "-")


def _legend(rows: Sequence[PlotRow]) -> list[str]:
    vocabulary = len(rows[0].logits)
    text = (
        f"The pictures show three next-token distributions of {rows[0].model}, ranked over its {vocabulary:,} tokens, on two "
        "logarithmic axes. Grey is the model's law at temperature 1, hatched where tokens are dropped; blue is the law that "
        "the rule makes of it at its defaults. Entropies are in nats. Rules that look back see the text below, taken as "
        "generated; a coin falls so that the rule acts; memories are at their start; `temperature` is shown at 1.5, `top_w` "
        "and `basis_aware` as computed once with the model."
    )
    lines = [text, "", "| row | text | most probable next tokens |", "|---|---|---|"]
    for row in rows:
        top = ", ".join(f"`{token}` {p:.3f}" for token, p in row.top)
        lines.append(f"| {row.name} | {row.prompt} | {top} |")
    return [*lines, ""]


# ---- the measured table

MEASURED_TITLE = "How much each rule keeps"


def measured_section(measured: Mapping[str, Any]) -> list[str]:
    """The table of kept sets and what it teaches, in Markdown."""
    lines = [f"## {MEASURED_TITLE}", "", measured["about"], "", f"![Kept sets]({MEASURED.replace('.json', '.png')})", ""]
    lines += [f"- {lesson}" for lesson in measured["lessons"]]
    for model in measured["models"]:
        lines += ["", f"### {model['name']}", "", model["about"], ""]
        cases = [case["name"] for case in model["cases"]]
        lines.append("| rule | " + " | ".join(cases) + " |")
        lines.append("|---|" + "---|" * len(cases))
        for rule, by_case in model["rules"].items():
            lines.append(f"| {rule} | " + " | ".join(_cell(by_case.get(case)) for case in cases) + " |")
    return [*lines, ""]


def _cell(numbers: Mapping[str, Any] | None) -> str:
    if numbers is None:
        return ""
    size = f"{numbers['median']:,.0f} / {numbers['p90']:,.0f}" if numbers["cuts"] else "all"
    single = f"{numbers['single']:.0%}" if numbers["cuts"] else "0%"
    return f"{size}; {single}; {numbers['mass']:.2f}; {numbers['entropy']:.2f}"


# ---- rows and pictures


@dataclass(frozen=True, eq=False)
class PlotRow:
    """A next-token row of a model to draw rules on.

    Attributes:
        name: what it stands for.
        model: whose it is.
        prompt: the text before it.
        tokens: its token ids.
        logits: (V,) float64.
        top: texts and probabilities of the most probable tokens.
        kept: token ids kept by the rules that read the model, by the rule's text form.
    """

    name: str
    model: str
    prompt: str
    tokens: list[int]
    logits: Tensor
    top: list[tuple[str, float]]
    kept: Mapping[str, Tensor]


def load_rows(file: Path) -> list[PlotRow]:
    """The rows that `save_rows` wrote. Raises DecalError if the file can't be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as data:
            about = {key: json.loads(value) for key, value in (data.metadata() or {}).items()}
            tensors = {key: data.get_tensor(key) for key in data.keys()}  # noqa: SIM118 (not a dict)
        return [
            PlotRow(
                name=row["name"],
                model=about["model"],
                prompt=row["prompt"],
                tokens=row["tokens"],
                logits=tensors[row["name"]].double(),
                top=[(text, float(p)) for text, p in row["top"]],
                kept={text: tensors[f"{row['name']}/{text}"].long() for text in about["read the model"]},
            )
            for row in about["rows"]
        ]
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise DecalError(f"{file} holds no rows to draw: {str(error).splitlines()[0]}") from error


@torch.no_grad()
def save_rows(file: Path, loaded: LoadedModel) -> None:
    """Write the model's rows after `PROMPTS`, with what rules that read its embeddings keep of them at their defaults.

    That is all such rules need for a picture; the embeddings themselves would take a hundred times the space.
    """
    from safetensors.torch import save

    own = [rule for rule in RULES.values() if is_own(rule) and "model" in rule.needs]
    rows, tensors = [], {}
    for name, prompt in PROMPTS.items():
        ids = loaded.tokenizer(prompt, return_tensors="pt").input_ids
        logits = loaded.model(ids).logits[0, -1].float()
        p, index = logits.double().softmax(-1).topk(5)
        top = [[loaded.tokenizer.decode([i]), round(v, 3)] for i, v in zip(index.tolist(), p.tolist(), strict=True)]
        rows.append({"name": name, "prompt": prompt, "tokens": ids[0].tolist(), "top": top})
        tensors[name] = logits
        for rule in own:
            kept = rule().for_model(loaded.model).mask(logits[None].double())[0].isfinite()
            tensors[f"{name}/{rule()}"] = kept.nonzero()[:, 0].int()
    about = {"model": loaded.name, "rows": rows, "read the model": [str(rule()) for rule in own]}
    atomic_write(file, save(tensors, {key: json.dumps(value) for key, value in about.items()}))


@dataclass(frozen=True, eq=False)
class Panel:
    """What a picture shows of one row: mean probabilities, before and after, of the ranks between ``edges``."""

    title: str
    edges: np.ndarray
    before: np.ndarray
    after: np.ndarray


def shown(rule: Rule) -> Chain:
    """The rule with the parameters of its picture."""
    return rule(**SHOWN.get(rule.name, {}))


def _drawable(rule: Rule, rows: Sequence[PlotRow]) -> bool:
    if rule.needs & {"answers", "prompts", "ends"}:  # there are none for a row on its own
        return False
    return bool(rows) and ("model" not in rule.needs or all(str(shown(rule)) in row.kept for row in rows))


def law(rule: Rule, row: PlotRow) -> Tensor:
    """(V,) probabilities after the rule, as it is shown."""
    z = row.logits[None]
    chain = shown(rule)
    if "model" in rule.needs:
        kept = torch.zeros_like(z, dtype=torch.bool).index_fill_(1, row.kept[str(chain)], True)
        return z.masked_fill(~kept, -torch.inf).softmax(-1)[0]
    context = Context(History.of([row.tokens], prompt=0), coin=True)
    state_of = {id(step): state for step, state in zip(chain.steps, chain.init(1), strict=True)}
    for one in chain.plan:
        z = run_pass(one, z, context, state_of)
    return z.softmax(-1)[0]


def panel(rule: Rule, row: PlotRow) -> Panel:
    """What the picture shows of ``row``."""
    order = row.logits.argsort(descending=True, stable=True)
    before, after = row.logits.softmax(-1)[order], law(rule, row)[order]
    kept = int((after > 0).sum())
    size = "all" if kept == len(after) else f"{kept:,}"
    # Not -0.00 either.
    entropies = [f"{abs(float(torch.special.entr(p).sum())):.2f}" for p in (before, after)]
    edges = np.unique(np.geomspace(1, len(order) + 1, 220).round().astype(np.int64))
    sums = [np.add.reduceat(p.numpy(), edges[:-1] - 1) / np.diff(edges) for p in (before, after)]
    return Panel(f"{row.name}: keeps {size}, entropy {entropies[0]} → {entropies[1]}", edges, sums[0], sums[1])


def digest(panels: Sequence[Panel]) -> str:
    """Of everything the panels show, to four digits; the same on every machine."""
    numbers = [[f"{v:.3e}" for v in np.concatenate([p.before, p.after])] for p in panels]
    text = json.dumps([LAYOUT, [p.title for p in panels], [p.edges.tolist() for p in panels], numbers])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def draw(panels: Sequence[Panel]) -> bytes:
    """The picture, as a PNG that carries the digest of its numbers."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image, PngImagePlugin

    figure = Figure(figsize=(9, 2.2), dpi=100)
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    figure.subplots_adjust(0.075, 0.2, 0.99, 0.88, wspace=0.06)
    for axis, one in zip(axes, panels, strict=True):
        x = one.edges - 0.5
        grey, blue = (np.maximum(v, FLOOR) for v in (one.before, one.after))
        axis.stairs(grey, x, baseline=FLOOR, fill=True, color="#d4d4d4")
        dropped = np.where(one.after > 0, FLOOR, grey)
        axis.stairs(dropped, x, baseline=FLOOR, fill=True, facecolor="#e6e6e6", edgecolor="#b0b0b0", hatch="/////", linewidth=0)
        axis.stairs(blue, x, baseline=FLOOR, fill=True, color="#a9cbe8")
        axis.stairs(np.where(one.after > 0, blue, np.nan), x, baseline=None, color="#1f77b4", linewidth=1.3)
        axis.stairs(grey, x, baseline=None, color="#555555", linewidth=0.9)
        axis.set(xscale="log", yscale="log", xlim=(0.5, x[-1]), ylim=(FLOOR, 1.6))
        axis.set_title(one.title, fontsize=8)
        axis.set_xlabel("rank", fontsize=8, labelpad=1)
        axis.set_xticks([1, 10, 100, 1000, 10000], ["1", "10", "100", "1,000", "10,000"])
        axis.set_yticks([1, 1e-2, 1e-4, 1e-6])
        axis.minorticks_off()
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("probability", fontsize=8)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(64)
    info = PngImagePlugin.PngInfo()
    info.add_text("decal", digest(panels))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True, pnginfo=info)
    return buffer.getvalue()


def digest_in(file: Path) -> str | None:
    """The digest a picture carries, or None if it isn't one of ours."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as image:
            return image.info.get("decal")
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError):
        return None


# ---- the folder


def _read(folder: Path) -> tuple[list[PlotRow], dict[str, Any] | None]:
    rows = load_rows(ROWS)
    if not (folder / MEASURED).is_file():
        return rows, None
    try:
        return rows, json.loads((folder / MEASURED).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DecalError(f"{folder / MEASURED} is not JSON: {error}") from error


def write(folder: Path, rules: Iterable[Rule] | None = None) -> list[Path]:
    """Write the page and its pictures, and remove pictures of rules that are gone. Raises DecalError.

    Args:
        folder: where ``kept_sets.json`` is, if there is one.
        rules: all declared ones, if not given.
    """
    some = list(RULES.values() if rules is None else rules)
    rows, measured = _read(folder)
    pictures = {rule.name: [panel(rule, row) for row in rows] for rule in some if _drawable(rule, rows)}
    with disk_errors(folder):
        (folder / PICTURES if pictures else folder).mkdir(parents=True, exist_ok=True)
    written = [folder / PAGE]
    atomic_write(folder / PAGE, page(some, rows, measured))
    for name, panels in pictures.items():
        file = folder / PICTURES / f"{name}.png"
        if digest_in(file) != digest(panels):
            atomic_write(file, draw(panels))
        written.append(file)
    for file in (folder / PICTURES).glob("*.png"):
        # Only what carries our mark is ours to remove.
        if file.stem not in pictures and digest_in(file):
            file.unlink()
    return written


def stale(folder: Path, rules: Iterable[Rule] | None = None) -> list[str]:
    """Which files of the folder aren't what `write` would write now: outdated, missing, or left over."""
    some = list(RULES.values() if rules is None else rules)
    rows, measured = _read(folder)
    found = []
    file = folder / PAGE
    if not file.is_file() or file.read_bytes() != page(some, rows, measured).encode():
        found.append(PAGE)
    drawable = {rule.name: rule for rule in some if _drawable(rule, rows)}
    for name, rule in drawable.items():
        if digest_in(folder / PICTURES / f"{name}.png") != digest([panel(rule, row) for row in rows]):
            found.append(f"{PICTURES}/{name}.png")
    extra = [f.name for f in sorted((folder / PICTURES).glob("*.png")) if f.stem not in drawable and digest_in(f)]
    return found + [f"{PICTURES}/{name}" for name in extra]
