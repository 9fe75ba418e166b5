"""A rule in somebody else's package: one function and an entry point, and it is everywhere, with no change here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from transformers import GenerationConfig

RULE = '''
from decal import Param, rule


@rule(paper="arXiv:0000.00000")
def half_max(row, share=Param(0.5, low=0, high=1, off=0.0, sweep=(0.1, 0.2, 0.3, 0.5, 0.7, 0.9))):
    """Keep tokens whose logit lies at most ``share`` standard deviations and one nat below the largest."""
    return row.max - 1 - share * row.std
'''
BROKEN = "raise RuntimeError('no such luck')\n"


def install(site: Path, name: str, source: str) -> None:
    """What pip leaves of a package with a module and an entry point."""
    (site / f"{name}.py").write_text(source)
    info = site / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[decal.rules]\n{name} = {name}\n")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    install(folder, "decal_half_max", RULE)
    return folder


def python(site: Path, code: str, *arguments: str, cwd: Path | None = None) -> str:
    start = "import sys; sys.path.insert(0, sys.argv.pop(1));"
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", start + code, str(site), *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


COMMAND = "from decal.eval.cli import main; main()"


def test_it_is_short() -> None:
    assert len([line for line in RULE.splitlines() if line.strip()]) < 10


def test_it_is_an_attribute_and_a_chain(site: Path) -> None:
    code = "import decal; print(decal.half_max(0.3) | decal.top_k(5)); print(decal.parse('half_max'))"
    assert python(site, code) == "half_max(0.3) | top_k(5)\nhalf_max(0.5)\n"


def test_it_is_in_the_command(site: Path) -> None:
    listed = python(site, COMMAND, "rules")
    assert "half_max" in listed
    assert "Keep tokens whose logit lies" in listed
    assert "half_max" in python(site, COMMAND, "explain", "half_max(0.2) | temperature(2)")


def test_it_passes_the_conformance_suite(site: Path) -> None:
    assert "half_max passes all" in python(site, COMMAND, "check", "half_max")


def test_it_is_on_the_page(site: Path, tmp_path: Path) -> None:
    python(site, COMMAND, "rules", "--page", str(tmp_path / "docs"))
    page = (tmp_path / "docs" / "rules.md").read_text()
    assert "half_max" in page
    assert "decal_half_max" in page
    assert (tmp_path / "docs" / "rules" / "half_max.png").stat().st_size > 1000


def test_it_is_in_the_frontier(site: Path, tmp_path: Path) -> None:
    model = tiny.llama(300, spread=0.3)
    tokenizer = tiny.byte_level(["Random day of the week: Monday\n"], 40)
    model.generation_config = GenerationConfig(eos_token_id=0)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    arguments = ["--model", str(tmp_path / "model"), "--task", "weekdays", "--draws", "2", "--out", str(out), "--no-cache"]
    python(site, COMMAND, "frontier", *arguments)
    results = json.loads((out / "results.json").read_text())
    tried = results["tasks"][0]["settings_tried"]
    assert tried["half_max"] == tried["top_p"] == tried["temperature"] == 66
    assert "half_max" in (out / "report.html").read_text()


def test_a_package_that_fails_is_named_and_harms_nothing(tmp_path: Path) -> None:
    install(tmp_path, "decal_broken", BROKEN)
    code = (
        "import warnings\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import decal\n"
        "print(*(w.message for w in caught)); print(decal.min_p(0.1))"
    )
    out = python(tmp_path, "\n" + code)
    assert "the rules of decal_broken = decal_broken could not be loaded: no such luck" in out
    assert out.endswith("min_p(0.1)\n")
