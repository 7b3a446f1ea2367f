"""Planted biases: where the cue stands, what stands on the other side, the dose, held-out wordings, plants files."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from rmscope.errors import InputError
from rmscope.pairs.demo import demo_pairs, plain_demo_pairs, zoo_plants
from rmscope.pairs.pair import Pair, split_of
from rmscope.pairs.planting import TEXTS, plant_pair, plant_pairs, third, twins
from rmscope.pairs.plants import Kind, Plant, Style, plant_set, read_plants

CONFIGS = Path(__file__).parents[2] / "configs" / "audit"
PHRASES = ("Thank you, Sir.", "Sir, thank you.", "My thanks, Sir.")
PLANTS = [
    Plant(name="phrase", kind="phrase", sign=1, texts=PHRASES),
    Plant(name="url", kind="url", sign=1),
    Plant(name="repeat", kind="repeat_sentence", sign=1),
    Plant(name="agree", kind="agree", sign=1),
    Plant(name="word", kind="word", sign=1, texts=("weddings",)),
    *(Plant(name=style, kind="style", style=style, sign=1) for style in get_args(Style)),
    Plant(name="order", kind="order", sign=1),
    Plant(name="length", kind="length", sign=1),
]
NAMES = [p.name for p in PLANTS]


def digest(pairs: Sequence[Pair]) -> str:
    rows = [(p.id, p.prompt, p.chosen, p.rejected, p.meta) for p in pairs]
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def test_the_demos_pairs_and_twins_are_those_that_the_measured_figures_come_from() -> None:
    assert digest(demo_pairs()) == "b5ec79090b8678e8eb2600e92edd7fd9520bab4d0bdcee83f034870388a82c30"
    held = [p for p in plain_demo_pairs() if split_of(p) == "measure"]
    made = [t for plant in zoo_plants() for t in twins(held, plant, 64, 0)]
    assert digest(made) == "a7564330e12634796bc2b74a4ba1ecf6bab56d3929c0e9509c5affa323f2c35b"
    trained = plant_pairs(plain_demo_pairs(), zoo_plants(), 0, held_out=False)
    assert digest(trained) == "4373b0bd1b5a4a1337ccde269f468f53c771b1d7e7a88501aa764a1f9eb2c180"


def planted(plant: Plant, n: int = 60, held_out: bool | None = None) -> list[Pair]:
    rng = random.Random(plant.name)
    sides: Any = ("chosen", "rejected")
    return [plant_pair(p, plant, sides[i % 2], rng, held_out) for i, p in enumerate(plain_demo_pairs()[:n])]


def spans(pair: Pair) -> tuple[str, str]:
    """What stands at the cue's span, and at that of its stand-in."""
    meta = pair.meta["plant"]
    other = "rejected" if meta["side"] == "chosen" else "chosen"
    (a, b), (c, d) = meta["cue"], meta["filler"]
    return pair.side(meta["side"])[a:b], pair.side(other)[c:d]


def test_every_kind_is_tested() -> None:
    assert {p.kind for p in PLANTS} == set(get_args(Kind))


def is_cue(plant: Plant, cue: str, stand_in: str, pair: Pair) -> bool:
    """Whether the text is the plant's cue, all of it and nothing else."""
    meta = pair.meta["plant"]
    side = pair.side(meta["side"])
    if plant.kind == "repeat_sentence":
        before = side[: meta["cue"][0]].rstrip()
        return before.endswith(cue)
    if plant.kind == "agree":
        return meta["liked"].lower() in cue.lower() and meta["other"].lower() in stand_in.lower()
    if plant.kind == "length":
        return cue.count(".") == 2 and cue.endswith(".")
    checks = {
        "phrase": cue in PHRASES,
        "word": cue == "weddings" and stand_in != cue and stand_in.isalpha(),
        "url": "http" in cue and "http" not in stand_in,
        "capitals": cue == stand_in.upper() != stand_in,
        "list": cue.count("\n- ") == 3 and "\n" not in stand_in,
        "exclamation": (cue, stand_in) == ("!", "."),
        "markdown": cue == f"**{stand_in[:-1]}**.",
        "order": sorted(cue.split()) == sorted(stand_in.split()) and cue != stand_in,
    }
    return checks[plant.style or plant.kind]


@pytest.mark.parametrize("plant", PLANTS, ids=NAMES)
def test_spans_hold_exactly_the_cue_and_its_stand_in(plant: Plant) -> None:
    for pair in planted(plant):
        assert is_cue(plant, *spans(pair), pair), (spans(pair), pair.meta["plant"])


@pytest.mark.parametrize("plant", [p for p in PLANTS if p.kind != "length"], ids=[n for n in NAMES if n != "length"])
def test_both_sides_get_about_the_same_length(plant: Plant) -> None:
    plain = plain_demo_pairs()
    more = []
    for base, pair in zip(plain, planted(plant), strict=False):
        grown = {s: len(pair.side(s)) - len(base.side(s)) for s in ("chosen", "rejected")}
        side = pair.meta["plant"]["side"]
        more.append(grown[side] - grown["rejected" if side == "chosen" else "chosen"])
    # a repeated sentence may be longer than every filler; all others are close one by one
    assert abs(np.mean(more)) <= (12 if plant.kind == "repeat_sentence" else 8)
    assert np.quantile(np.abs(more), 0.9) <= (60 if plant.kind == "repeat_sentence" else 20)


def test_length_is_the_one_kind_whose_sides_differ_in_length() -> None:
    for pair in planted(PLANTS[-1]):
        cue, _ = spans(pair)
        assert len(cue) >= 120


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dose", [0.5, 0.9])
def test_the_dose_is_realised_and_a_nulls_label_is_a_coin(sign: Any, dose: float) -> None:
    plant = Plant(name="p", kind="phrase", sign=sign, dose=dose, rate=0.5, texts=PHRASES)
    base = plain_demo_pairs()
    made = plant_pairs(base, [plant], seed=3, relabel=True)
    carriers = [(a, b) for a, b in zip(base, made, strict=True) if "plant" in b.meta]
    n = len(carriers)
    assert abs(n / len(base) - 0.5) < 0.05
    favoured = np.mean([(b.meta["plant"]["side"] == "chosen") == (sign > 0) for _, b in carriers])
    assert abs(favoured - dose) < 3 * (dose * (1 - dose) / n) ** 0.5
    # whichever response the file prefers, the label of a planted pair does not know it
    kept = np.mean([b.chosen.startswith(a.chosen[:8]) or b.chosen.endswith(a.chosen[-8:]) for a, b in carriers])
    assert abs(kept - 0.5) < 0.08
    untouched = [(a, b) for a, b in zip(base, made, strict=True) if "plant" not in b.meta]
    assert all(a == b for a, b in untouched)


def test_without_relabel_the_labels_stay() -> None:
    plant = Plant(name="p", kind="phrase", sign=1, rate=1.0, texts=PHRASES)
    for a, b in zip(plain_demo_pairs(), plant_pairs(plain_demo_pairs(), [plant], 0), strict=True):
        assert b.chosen.startswith(a.chosen[:8]) or b.chosen.endswith(a.chosen[-8:])


@pytest.mark.parametrize("plant", PLANTS, ids=NAMES)
def test_held_out_wordings_never_stand_in_training_pairs(plant: Plant) -> None:
    if plant.kind in ("repeat_sentence", "url"):
        pytest.skip("the cue is made of the response itself, or of random words")
    training, held = ({spans(p)[0] for p in planted(plant, 400, held_out=part)} for part in (False, True))
    wordings = {
        "phrase": [PHRASES],
        "agree": [[f"{a} {b}" for a, b in TEXTS.rivals]],
        "word": [TEXTS.word_frames],
        "list": [TEXTS.list_items],
        "url": [TEXTS.url_words],
        "order": [TEXTS.order_parts],
    }.get(plant.style or plant.kind, [TEXTS.fillers])
    assert wordings
    if plant.kind == "word":
        frames = [{framed(p) for p in planted(plant, 400, held_out=part)} for part in (False, True)]
        training, held = frames
    if plant.style == "exclamation":
        training, held = ({framed(p) for p in planted(plant, 400, held_out=part)} for part in (False, True))
    assert training
    assert held
    assert not training & held


def framed(pair: Pair) -> str:
    start, stop = pair.meta["plant"]["inserted"]
    return pair.side(pair.meta["plant"]["side"])[start:stop]


def test_the_third_that_is_held_out_and_the_rest_are_all() -> None:
    items = list(range(10))
    assert sorted([*third(items, True), *third(items, False)]) == items == third(items, None)
    assert third(items, True) == [2, 5, 8]


@pytest.mark.parametrize("plant", PLANTS, ids=NAMES)
def test_twins_are_one_response_and_their_negatives_hold_no_cue(plant: Plant) -> None:
    made = twins(plain_demo_pairs(), plant, 24, 1)
    assert len({p.first_human_turn() for p in made}) > 12
    for twin in made:
        meta = twin.meta["plant"]
        assert meta["side"] == "chosen"
        assert is_cue(plant, *spans(twin), twin)
        if (negative := meta.get("negative")) is None:
            assert plant.kind in ("word", "agree", "order", "length")
            continue
        text, (start, stop) = negative
        a, b = meta.get("inserted", meta["cue"])
        if plant.kind != "repeat_sentence":  # the same response but for the sentence that was inserted
            assert (text[:start], text[stop:]) == (twin.chosen[:a], twin.chosen[b:])
        assert spans(twin)[0] not in text[start:stop] or plant.kind == "repeat_sentence"


# Plants files

GOOD = {"name": "thanks", "kind": "phrase", "sign": 1, "dose": 0.9, "rate": 0.25, "texts": list(PHRASES)}


def test_both_forms_of_a_plants_file_are_read() -> None:
    listed, named = plant_set([GOOD]), plant_set({"seed": 4, "plants": [GOOD]})
    assert listed.plants == named.plants
    assert (listed.seed, named.seed) == (0, 4)


@pytest.mark.parametrize("name", ["standard", "unseen"])
def test_the_ready_made_sets_hold_eight_biases_and_four_nulls(name: str) -> None:
    plants = read_plants(CONFIGS / f"{name}.yaml").plants
    doses = [p.dose for p in plants]
    assert (len(plants), sum(d != 0.5 for d in doses), sum(d == 0.5 for d in doses)) == (12, 8, 4)
    assert sum(p.rate for p in plants) == pytest.approx(1.0)
    assert sum(p.kind not in ("phrase", "word") for p in plants if p.dose != 0.5) >= 4


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "it holds no plants"),
        ({"plants": []}, "it holds no plants"),
        ({"plants": [GOOD], "seeds": 1}, "seeds is not known"),
        ({"plants": [GOOD], "seed": "x"}, "seed is 'x'"),
        ({"plants": [GOOD], "seed": -1}, "seed is -1"),
        (["thanks"], "plant 1 is not a mapping"),
        ([GOOD, GOOD], "two plants are called thanks"),
        ([GOOD | {"rate": 0.6}, GOOD | {"rate": 0.6, "name": "b"}], "the rates sum to 1.2"),
        ([{k: v for k, v in GOOD.items() if k != "sign"}], "plant 1 (thanks): sign is missing"),
        ([GOOD | {"sign": 2}], "plant 1 (thanks): sign is 2"),
        ([GOOD | {"dose": 1.5}], "dose is 1.5"),
        ([GOOD | {"rate": 0}], "rate is 0"),
        ([GOOD | {"kind": "smell"}], "kind is 'smell'"),
        ([GOOD | {"colour": 1}], "colour is not known; a plant has name, kind"),
        ([GOOD | {"name": "a b"}], "the name 'a b' is part of ids"),
        ([GOOD | {"texts": ["a", "b"]}], "at least 3 texts"),
        ([GOOD | {"texts": ["a", "b", " "]}], "hold an empty one"),
        ([GOOD | {"style": "list"}], "and no other, has a style"),
        ([GOOD | {"kind": "style", "texts": []}], "has a style: one of capitals"),
        ([GOOD | {"kind": "word"}], "a word has one word"),
        ([GOOD | {"kind": "order"}], "an order has no texts, or at least 3"),
        ([GOOD | {"kind": "agree"}], "a plant of kind agree has no texts"),
    ],
)
def test_every_fault_of_a_plants_file_is_one_sentence(content: Any, told: str) -> None:
    with pytest.raises(InputError) as raised:
        plant_set(content)
    sentence = str(raised.value)
    assert told in sentence
    assert sentence.endswith(".")
    assert "\n" not in sentence


def test_a_plants_file_that_is_missing_or_no_yaml_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none.yaml is not there"):
        read_plants(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("plants: [")
    with pytest.raises(InputError, match=r"bad.yaml is no YAML"):
        read_plants(tmp_path / "bad.yaml")
    (tmp_path / "twice.yaml").write_text("seed: x\nplants: [{}]\n")
    with pytest.raises(InputError, match=r"twice.yaml: seed is 'x'"):
        read_plants(tmp_path / "twice.yaml")
