"""The page of a diagnosis in a browser: ribbons are drawn, and the slider redraws them from what is in the page alone."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from test_diagnosis import planted, result_of

from decal.eval import diagnosis_report as pages
from decal.eval import order, ribbon
from decal.eval.diagnosis import diagnose
from decal.samplers.vocabulary import Vocabulary

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WORDS = Vocabulary({token: f"<w{token}>".encode() for token in range(1, 64)})


@pytest.fixture(scope="module")
def run() -> tuple[pages.DiagnosisRun, torch.Tensor]:
    trie, logits = planted("shuffled", 2, 0)
    found = order.prefixes(trie, tiny.blocks(logits))
    task = pages.TaskDiagnosis(
        result_of(trie, logits), [diagnose(trie, found)], ribbon.ribbons(trie, tiny.blocks(logits), found, WORDS)
    )
    about = {"decal": "0", "created": "now", "grid": "g", "seed": 0, "model": {"name": "<planted>", "note": ""}}
    return pages.DiagnosisRun(about, [task]), logits


def test_ribbons_say_what_the_rows_say(run) -> None:
    whole, logits = run
    one = whole.tasks[0].ribbons[0]
    for index, t in enumerate(ribbon.TEMPERATURES):
        p = torch.softmax(logits[0].double() / t, -1)
        shown = np.exp(np.asarray(one.logits) / t - one.log_total[index])
        np.testing.assert_allclose(shown, p.sort(descending=True).values[: len(shown)], atol=1e-4)
        assert sum(one.mass[index]) == pytest.approx(1, abs=1e-5)
    kinds = dict(zip(one.tokens, one.kinds, strict=True))
    assert kinds["<w30>"] == "invalid"
    valid = [one.tokens.index(f"<w{t}>") for t in range(1, 9)]
    assert {one.kinds[i] for i in valid} == {"frequent", "rare"}
    at_one = ribbon.TEMPERATURES.index(1.0)
    p = torch.softmax(logits[0].double(), -1)
    assert one.mass[at_one][0] + one.mass[at_one][1] == pytest.approx(float(p[1:9].sum()), abs=1e-5)


@pytest.mark.skipif(BROWSER is None, reason="there is no chromium here")
def test_the_slider_redraws_the_ribbons(run, tmp_path: Path) -> None:
    whole, _ = run
    page = pages._page(whole)
    moved = """<script>
    const box = document.querySelector(".ribbon"), slider = document.querySelector(".temperature");
    const heights = () => [...box.querySelectorAll("i")].map(i => i.style.height).join();
    const before = heights();
    slider.value = slider.max; slider.dispatchEvent(new Event("input"));
    const told = document.createElement("pre"); told.id = "told";
    const bars = box.querySelectorAll("i").length, said = document.querySelector("output").textContent;
    told.textContent = [bars, before !== heights(), said].join(" ");
    document.body.append(told);
    </script></body>"""
    (tmp_path / "page.html").write_text(page.replace("</body>", moved))
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run([*command, (tmp_path / "page.html").as_uri()], capture_output=True, text=True, timeout=120)
    told = re.search(r'<pre id="told">(.*?)</pre>', done.stdout)
    assert told, done.stderr[-2000:]
    one = whole.tasks[0].ribbons[0]
    assert told[1] == f"{len(one.tokens)} true 5.00"
    most = one.mass[-1]
    said = f"Probability of valid tokens {most[0] + most[1]:.3f}"
    assert said in html.unescape(done.stdout)
    assert "&lt;planted&gt;" in done.stdout
