"""The page of rules: the committed one is fresh, it says what rules declare, and staleness is noticed."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from decal.eval import catalogue, cli
from decal.samplers.errors import DecalError
from decal.samplers.row import Keep, Row
from decal.samplers.rule import RULES, Param, Rule, rule

DOCS = Path(__file__).parent.parent / "docs"
OWN = [r for r in RULES.values() if catalogue.is_own(r)]


@pytest.fixture
def above_mean() -> Iterator[Rule]:
    """A rule of another package than decal."""

    @rule(paper="doi:10.1000/182", side="after")
    def above_mean(row: Row, share: Tensor = Param(1.0, low=0, high=1, off=0.0)) -> Tensor:
        """Keep logits above ``share`` of the way from the least to the mean.

        Kept: z_i >= min_j z_j + share (mean(z) - min_j z_j), for a < b * c.

        Elsewhere: the stack of nobody.

        Differs: from nothing | at all.
        """
        return row.min + share * (row.mean - row.min)

    yield above_mean
    RULES.pop("above_mean", None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the page of decal's own rules."""
    shutil.copy(DOCS / catalogue.MEASURED, tmp_path / catalogue.MEASURED)
    (tmp_path / catalogue.PICTURES).mkdir()
    for file in (DOCS / catalogue.PICTURES).glob("*.png"):
        shutil.copy(file, tmp_path / catalogue.PICTURES / file.name)
    catalogue.write(tmp_path, OWN)
    return tmp_path


def decal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, output and error of the command."""
    monkeypatch.setattr(sys, "argv", ["decal", *map(str, arguments)])
    capsys.readouterr()
    code: Any = 0
    try:
        cli.main()
    except SystemExit as end:
        code = end.code
    return code or 0, *capsys.readouterr()


def test_the_committed_page_is_fresh() -> None:
    assert catalogue.stale(DOCS, OWN) == [], "run: decal rules --page docs"


def test_every_rule_has_a_heading_and_a_picture() -> None:
    text = (DOCS / catalogue.PAGE).read_text(encoding="utf-8")
    headings = re.findall(r"^### (\w+)$", text, re.M)
    assert sorted(h for h in headings if h in RULES) == sorted(r.name for r in OWN)
    assert {f.stem for f in (DOCS / catalogue.PICTURES).glob("*.png")} == {
        r.name for r in OWN if not r.needs & {"answers", "prompts", "ends"}
    }


def test_links_within_the_page_lead_somewhere() -> None:
    text = (DOCS / catalogue.PAGE).read_text(encoding="utf-8")
    anchors = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.+)$", text, re.M)}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= anchors
    for target in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        assert (DOCS / target).is_file(), target


def test_measured_rules_exist_and_numbers_are_possible() -> None:
    data = json.loads((DOCS / catalogue.MEASURED).read_text(encoding="utf-8"))
    assert data["lessons"]
    for model in data["models"]:
        assert {name.split(",")[0] for name in model["rules"]} <= {"no rule", *RULES}
        for by_case in model["rules"].values():
            for numbers in by_case.values():
                assert 1 <= numbers["p10"] <= numbers["median"] <= numbers["p90"] <= model["vocabulary"]
                assert 0 <= numbers["mass"] <= 1
                assert 0 <= numbers["single"] <= 1
                assert 0 <= numbers["entropy"] <= torch.tensor(float(model["vocabulary"])).log() + 1e-4


def test_the_rows_are_small_and_differ_in_entropy() -> None:
    assert (catalogue.ROWS).stat().st_size < 700_000
    entropies = [float(torch.special.entr(row.logits.softmax(-1)).sum()) for row in catalogue.load_rows(catalogue.ROWS)]
    assert entropies == sorted(entropies)
    assert entropies[0] < 1.5 < entropies[1] < 5 < entropies[2]


def test_a_declared_rule_shows_up_under_its_package(above_mean: Rule) -> None:
    text = catalogue.page([*OWN, above_mean])
    assert f"From the package `{__name__.split('.')[0]}`" in text
    entry = text[text.index("### above_mean") :]
    for part in (
        "`above_mean(share=1)` (truncation)",
        "Keep logits above `share` of the way",
        r"for a \< b \* c.",
        "| `share` | 1 | in [0, 1] |",
        "- Off where: `share` = 0.",
        "- Side: after temperature.",
        "- Invariant to: adding a constant to the logits.",
        "- Reads: logits.",
        "- Paper: [doi:10.1000/182](https://doi.org/10.1000/182).",
        "- Elsewhere: the stack of nobody.",
        "- Differs: from nothing | at all.",
    ):
        assert part in entry


@pytest.mark.parametrize(
    ("paper", "url"),
    [
        ("arXiv:2407.01082", "https://arxiv.org/abs/2407.01082"),
        ("doi:10.1/x", "https://doi.org/10.1/x"),
        ("github.com/a/b", "https://github.com/a/b"),
        ("https://a.org/b", "https://a.org/b"),
    ],
)
def test_papers_are_links(paper: str, url: str) -> None:
    assert catalogue.paper_url(paper) == url


def test_needs_and_invariances_are_said() -> None:
    text = catalogue.page(OWN)
    dry, min_p, top_k = (text[text.index(f"### {name}\n") :].split("\n### ")[0] for name in ("dry", "min_p", "top_k"))
    assert "- Reads: logits, the tokens so far." in dry
    assert "`temperature(2.0) | min_p(0.1)` keeps what `min_p(0.01)` keeps" in min_p
    assert "the same tokens are kept" in top_k


def test_staleness_is_noticed_and_mended(folder: Path, above_mean: Rule) -> None:
    assert catalogue.stale(folder, OWN) == []
    more = [*OWN, above_mean]
    assert catalogue.stale(folder, more) == ["rules.md", "rules/above_mean.png"]
    catalogue.write(folder, more)
    assert catalogue.stale(folder, more) == []
    # A rule that is gone leaves a picture behind, which goes at the next writing; pictures of others stay.
    assert catalogue.stale(folder, OWN) == ["rules.md", "rules/above_mean.png"]
    (folder / "rules" / "other.png").write_bytes(b"mine")
    catalogue.write(folder, OWN)
    assert catalogue.stale(folder, OWN) == []
    assert (folder / "rules" / "other.png").read_bytes() == b"mine"
    # A picture that shows other numbers, and one that isn't a picture.
    shutil.copy(folder / "rules" / "top_p.png", folder / "rules" / "min_p.png")
    (folder / "rules" / "top_k.png").write_bytes(b"nothing")
    assert catalogue.stale(folder, OWN) == ["rules/top_k.png", "rules/min_p.png"]
    page = folder / catalogue.PAGE
    page.write_bytes(page.read_bytes() + b"\n")
    assert catalogue.stale(folder, OWN)[0] == "rules.md"


def test_a_picture_depends_on_what_the_rule_does(above_mean: Rule) -> None:
    row = catalogue.load_rows(catalogue.ROWS)[0]
    one, again = (catalogue.panel(RULES["min_p"], row) for _ in range(2))
    assert catalogue.digest([one]) == catalogue.digest([again])
    assert catalogue.digest([one]) != catalogue.digest([catalogue.panel(above_mean, row)])
    assert one.before[0] == pytest.approx(row.top[0][1], abs=1e-3)


def test_a_rule_that_reads_the_model_has_a_picture_only_where_it_was_computed() -> None:
    rows = catalogue.load_rows(catalogue.ROWS)

    @rule(paper="arXiv:1")
    def near(row: Row) -> Keep:
        """Keep what is near."""
        row.weights  # noqa: B018
        return Keep(lambda z: z == row.max)

    try:
        assert "![" not in catalogue.page([near], rows)
    finally:
        del RULES["near"]
    kept = int((catalogue.law(RULES["top_w"], rows[2]) > 0).sum())
    assert kept == len(rows[2].kept[str(RULES["top_w"]())])


def test_broken_files_are_one_line(tmp_path: Path) -> None:
    (tmp_path / catalogue.MEASURED).write_text("no")
    with pytest.raises(DecalError, match="is not JSON"):
        catalogue.write(tmp_path, OWN)
    (tmp_path / "rows").write_text("no")
    with pytest.raises(DecalError, match="holds no rows"):
        catalogue.load_rows(tmp_path / "rows")


def test_the_command_lists_writes_and_checks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, above_mean: Rule
) -> None:
    code, out, _ = decal(monkeypatch, capsys, "rules")
    assert code == 0
    assert all(re.search(rf"^ *{name}\(", out, re.M) for name in RULES)
    code, out, _ = decal(monkeypatch, capsys, "rules", "--page", tmp_path)
    assert (code, out.count("\n")) == (0, 1)
    assert decal(monkeypatch, capsys, "rules", "--check", tmp_path)[0] == 0
    del RULES["above_mean"]
    code, out, err = decal(monkeypatch, capsys, "rules", "--check", tmp_path)
    assert (code, out) == (2, "")
    assert re.fullmatch(r"decal: stale in .+: rules\.md, rules/above_mean\.png; run decal rules --page .+\n", err)
    code, _, err = decal(monkeypatch, capsys, "rules", "--check", tmp_path, "--page", tmp_path)
    assert code == 2
    assert err.count("\n") == 1
    (tmp_path / "file").touch()
    code, _, err = decal(monkeypatch, capsys, "rules", "--page", tmp_path / "file")
    assert (code, err.count("\n")) == (2, 1)


def test_the_command_checks_a_rule(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], above_mean: Rule
) -> None:
    from decal.samplers import testing

    monkeypatch.setattr(testing, "LAWS", {"is declared well": lambda rule: None, "another": lambda rule: None})
    code, out, _ = decal(monkeypatch, capsys, "check", "above_mean")
    assert code == 0
    assert out == "passed  is declared well\npassed  another\nabove_mean passes all 2 checks\n"

    def broken(rule: Rule) -> None:
        raise testing.ConformanceError("it\nfails")

    monkeypatch.setattr(testing, "LAWS", {"a law": broken})
    code, out, err = decal(monkeypatch, capsys, "check", "above_mean")
    assert (code, out) == (2, "")
    assert err == "decal: above_mean breaks the law 'a law': it fails\n"
    assert decal(monkeypatch, capsys, "check", "abov_mean")[0] == 2
