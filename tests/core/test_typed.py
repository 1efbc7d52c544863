"""Fields of configs and cards: what fits becomes plain Python, what does not says where and why not."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tomevit
from tomevit import zoo
from tomevit.cards import Card, card_from_json, card_to_json
from tomevit.config import Config, Preprocess, Preset
from tomevit.errors import printable
from tomevit.schedule import Schedule, format_schedule, parse_schedule, schedule_from_json, schedule_to_json
from tomevit.typed import conform

NUMBERS = st.floats(0, 100, allow_nan=False, width=32)
SCHEDULES: st.SearchStrategy[Schedule] = st.one_of(
    st.integers(0, 100),
    st.floats(0.01, 0.5),
    st.tuples(st.integers(0, 100), st.floats(-1, 1).map(lambda x: round(x, 3))),
    st.lists(st.integers(0, 50), min_size=1, max_size=12),
)


@given(st.integers(1, 10**6), NUMBERS, st.booleans())
def test_numpys_numbers_become_pythons(whole: int, real: float, truth: bool) -> None:
    for kind, value in ((int, np.int64(whole)), (float, np.float32(real)), (float, whole), (bool, np.bool_(truth))):
        found = conform(kind, value, "x")
        assert type(found) in (kind, int)
        assert found == value
    assert conform(tuple[float, ...], [np.float32(real)], "x") == (float(np.float32(real)),)


@pytest.mark.parametrize(
    ("kind", "value", "says"),
    [
        (int, True, "x is True, and must be an int"),
        (int, 1.0, "x is 1.0, and must be an int"),
        (float, math.inf, "x is inf, and must be a finite number"),
        (float, 10**400, "and must be a finite number"),
        (float, "1", "x is '1', and must be a finite number"),
        (bool, 1, "x is 1, and must be True or False"),
        (str, 1, "x is 1, and must be a text"),
        (tuple[int, int], [1], r"x is \[1\], and must have 2 values"),
        (tuple[int, ...], 7, "x is 7, and must be a list"),
        (Config, 7, "x is 7, and must be a Config"),
        (Config, {"colour": 1}, "x has 'colour', and no Config has"),
        (Card, {"name": "a", "config": {"act": "sin"}}, "x.config.act is 'sin', and must be one of gelu, gelu_tanh"),
        (Card, {"name": "a", "preprocess": {"mean": [0, None, 0]}}, r"x.preprocess.mean\[1\] is None"),
        (Preset, {"name": "a", "r": [0, "8 magic"], "num_tokens": 5, "source": ""}, r"r\[1\] is '8 magic'"),
        (Preset, {"name": "a", "r": [0, 1.5], "num_tokens": 5, "source": ""}, r"x.r\[1\] is 1.5"),
        (Card, {"name": "a", "figures": [{"r": "diffrate-1g", "top1": 5, "source": ""}]}, "none of the presets"),
    ],
)
def test_what_does_not_fit_says_so(kind: Any, value: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        conform(kind, value, "x")


@pytest.mark.parametrize("card", [tomevit.card(name) for name in tomevit.list_models(weights=True)][::7], ids=str)
def test_cards_survive_json(card: Card) -> None:
    assert card_from_json(json.loads(json.dumps(card_to_json(card)))) == card


def test_cards_with_presets_survive_json_and_those_without_are_read() -> None:
    card = replace(tomevit.card("mae_h14"), r="diffrate-103.4g")
    written = json.loads(json.dumps(card_to_json(card)))
    assert card_from_json(written) == card
    assert card.presets
    del written["presets"]  # as it was written before there were any
    written["figures"] = [figure for figure in written["figures"] if isinstance(figure["r"], int)]
    earlier = card_from_json(written)
    assert (earlier.presets, earlier.r) == ((), card.r)


@given(SCHEDULES)
def test_r_survives_json_and_text(r: Schedule) -> None:
    again = schedule_from_json(json.loads(json.dumps(schedule_to_json(r))))
    assert again == r
    assert type(again) is type(r)
    typed = parse_schedule(format_schedule(r))
    assert typed == pytest.approx(r)
    assert type(typed) is type(r)


def test_numpys_numbers_make_a_model_that_can_be_saved(tmp_path: Any) -> None:
    labels = np.array([0, 2, 1])
    model = tomevit.create("deit_ti16", num_classes=labels.max() + 1, r=np.int64(8), drop_path=np.float32(0.1))
    tomevit.save(model, tmp_path / "x.safetensors")
    loaded = tomevit.load(tmp_path / "x.safetensors")
    assert (loaded.config.num_classes, loaded.r) == (3, 8)
    assert type(loaded.config.num_classes) is int


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"crop_pct": 1.5}, "crop_pct is 1.5, and must be a share above 0, up to 1"),
        ({"crop_pct": 0}, "crop_pct is 0"),
        ({"std": (0, 1, 1)}, r"std is \(0, 1, 1\), and must be above 0"),
        ({"mean": (0.5,)}, "mean has 1 values and std 3"),
        ({"mean": (0.5, math.nan, 0.5)}, r"mean\[1\] is nan"),
        ({"interpolation": "nearest"}, "interpolation is 'nearest', and must be one of bilinear, bicubic"),
        ({"resize": None}, "resize is None"),
    ],
)
def test_preprocessing_that_cannot_be(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Preprocess(**fields)
    described = json.loads(json.dumps(card_to_json(zoo.card("vit_b16"))))
    described["preprocess"] |= json.loads(json.dumps(fields))
    with pytest.raises(ValueError, match=says.partition(" ")[0]):
        card_from_json(described)


def test_a_card_takes_no_r_of_another_depth() -> None:
    with pytest.raises(ValueError, match="r lists 13 blocks, and the model has 12"):
        replace(zoo.card("vit_b16"), r=[1] * 13)
    assert type(asdict(replace(zoo.card("vit_b16"), r=np.int64(3)))["r"]) is int


@given(st.text())
def test_text_for_a_terminal_has_nothing_that_moves_it(text: str) -> None:
    assert printable(text).isprintable()
    if text.isprintable():
        assert printable(text) == text
