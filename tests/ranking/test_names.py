"""Names on texts whose truth is known: a phrase, a position, a link, a repetition."""

from __future__ import annotations

import numpy as np
import pytest

from rmscope.ranking.names import Name, WordIndex

WORDS = "the cat sat on a mat while rain fell over hills and many birds sang near old stone walls".split()  # noqa: SIM905


def texts(changes: dict[int, list[str]], n: int = 60) -> tuple[list[list[str]], list[np.ndarray]]:
    """Responses of random words with a full stop and an end mark; ``changes`` puts words into every third one at a place."""
    rng = np.random.default_rng(0)
    rows, marked = [], []
    for i in range(n):
        row = [" " + WORDS[k] for k in rng.integers(0, len(WORDS), 14)]
        at = np.zeros(len(row) + 2)
        if i % 3 == 0:
            for place, words in changes.items():
                row[place : place + len(words)] = words
                at[place + len(words) - 1] = 1.0
        rows.append([*row, ".", "<end>"])
        marked.append(at)
    return rows, marked


def named(rows: list[list[str]], activation: np.ndarray) -> Name:
    pieces = sorted({p for row in rows for p in row})
    number = {p: i for i, p in enumerate(pieces)}
    token = np.array([number[p] for row in rows for p in row])
    response = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    text = WordIndex(token, response, pieces.__getitem__, [number["<end>"]] if "<end>" in number else [])
    return text.name(activation)


def test_a_phrase_names_what_fires_on_it() -> None:
    rows, marked = texts({4: [" thank", " you", " so"]})
    name = named(rows, np.concatenate(marked))
    assert "thank you" in name.text
    assert not name.form
    assert name.covers == pytest.approx(1.0)


def test_two_phrases_are_both_told() -> None:
    rows, marked = texts({2: [" no", " problem"], 9: [" my", " plea", "sure"]})
    name = named(rows, np.concatenate(marked))
    assert "no problem" in name.text
    assert "my pleasure" in name.text  # pieces of a word are joined
    assert name.covers == pytest.approx(1.0)


@pytest.mark.parametrize(("piece", "told"), [(".", "ends of sentences"), ("<end>", "the end of the text")])
def test_a_position_names_what_no_word_explains_and_is_form(piece: str, told: str) -> None:
    rows, _ = texts({})
    name = named(rows, np.array([float(p == piece) for row in rows for p in row]))
    assert name == Name(told, pytest.approx(1.0), True)


def test_ends_of_sentences_with_a_phrase_are_named_by_the_phrase() -> None:
    rows, marked = texts({4: [" thank", " you", "."]})
    stops = np.concatenate([at * [p == "." for p in row] for row, at in zip(rows, marked, strict=True)])
    name = named(rows, stops)
    assert name.text.startswith("sentences with “thank")
    assert not name.form


def test_links_and_repetitions_have_names_of_their_own() -> None:
    rows, _ = texts({5: [" https", "://", "abc", ".org"]})
    link = np.concatenate([np.array([float(p in (" https", "://")) for p in row]) for row in rows])
    assert named(rows, link).text in ("links", "“https”")
    assert not named(rows, link).form
    again = [row[:8] + row[:8] + row[8:] for row in rows]
    said = np.concatenate([np.r_[np.zeros(8 + 4), np.ones(4), np.zeros(len(row) - 8)] for row in rows])
    assert named(again, said).text == "repeated text"


def test_what_is_silent_is_named_so() -> None:
    rows, _ = texts({})
    assert named(rows, np.zeros(sum(map(len, rows)))).text == "silent"
