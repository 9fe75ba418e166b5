"""The harness's model without the harness: seeds, what gives way to a chain, and arguments."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from decal import DecalError, parse
from decal.serving import lm_eval as served


class Base:
    def __init__(self, **kwargs: Any):
        self.given = kwargs


class LM(served._LM, Base):
    pass


def test_without_the_harness_the_module_loads_and_says_what_it_needs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for name in [name for name in sys.modules if name.startswith("lm_eval.")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(vars(served), "LM", raising=False)
    with pytest.raises(DecalError, match="needs lm-evaluation-harness"):
        served.register()
    with pytest.raises(DecalError, match=r"decal.serving.lm_eval.LM needs lm-evaluation-harness"):
        _ = served.LM
    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        _ = served.Other


def test_seeds_tell_requests_apart():
    lm = LM(chain="min_p(0.1)", seed=3)
    places = [(task, doc, idx, n) for task in ("a", "b") for doc in range(50) for idx in (0, 1) for n in range(3)]
    seeds = [lm._seed(*place) for place in places]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seeds == [LM(chain="top_k(3)", seed=3)._seed(*place) for place in places]
    assert not set(seeds) & {LM(chain="min_p(0.1)", seed=4)._seed(*place) for place in places}


@pytest.mark.parametrize(
    ("settings", "kept", "said"),
    [
        ({"until": ["x"], "do_sample": False, "temperature": 0.0}, {"until": ["x"]}, {"temperature": 0.0, "do_sample": False}),
        ({"max_gen_toks": 5}, {"max_gen_toks": 5}, {}),
        ({"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}, {}, {}),
        ({"do_sample": False, "temperature": 0.7, "top_k": 5}, {}, {"temperature": 0.7, "top_k": 5, "do_sample": False}),
        ({"temperature": 0, "top_p": 0.5}, {}, {"temperature": 0, "top_p": 0.5}),
        ({"do_sample": True, "temperature": None, "num_beams": 2}, {"num_beams": 2}, {}),
    ],
)
def test_greedy_decoding_and_idle_settings_give_way(settings: dict[str, Any], kept: dict[str, Any], said: dict[str, Any]):
    assert LM(chain="min_p(0.1)")._without_sampling(settings, "task") == (kept, said)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"do_sample": True, "temperature": 0.7}, "temperature=0.7"),
        ({"temperature": 0.7}, "temperature=0.7"),
        ({"do_sample": True, "top_p": 0.9, "top_k": 40}, "top_p=0.9, top_k=40"),
        ({"do_sample": False, "repetition_penalty": 1.2}, "repetition_penalty=1.2"),
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size=3"),
    ],
)
def test_what_would_act_beside_the_chain_does_not_give_way_unasked(settings: dict[str, Any], named: str):
    with pytest.raises(DecalError, match=f"task asks for {named} beside the chain"):
        LM(chain="min_p(0.1)")._without_sampling(settings, "task")
    assert LM(chain="min_p(0.1)", override=True)._without_sampling(settings, "task")[0] == {}


def test_commas_in_brackets_belong_to_a_chain():
    json = parse("xtc(0.1, 0.5)").to_json()
    assert served._split(f"a=1,chain=xtc(0.1, 0.5) | top_k(3), b=2,,other={json}") == [
        "a=1",
        "chain=xtc(0.1, 0.5) | top_k(3)",
        "b=2",
        f"other={json}",
    ]


def test_own_arguments_stay_and_others_go_to_the_harness_s_model():
    lm = LM(chain=parse("min_p(0.1)"), seed=5, override=True, pretrained="some/model", batch_size=3)
    assert (lm.chain, lm.seed, lm.override) == (parse("min_p(0.1)"), 5, True)
    assert lm.given == {"pretrained": "some/model", "batch_size": 3}
