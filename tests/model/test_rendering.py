"""Text as the PM was trained on it: two segments, chat templates with dates, templates that cut, refuse or never end."""

from __future__ import annotations

import json
from copy import deepcopy
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors

from rmscope.errors import InputError
from rmscope.model import chat_template
from rmscope.model.checks import notes, preflight
from rmscope.model.doctor import examine
from rmscope.model.rendering import DATE, Rendering, changed_responses, render
from rmscope.model.reward_model import RewardModel
from rmscope.pairs.pair import Pair
from rmscope.run.inputs import Inputs
from rmscope.run.settings import RunConfig
from tests.model.small import PAIRS, small_model, small_pm, tokenizer

TURNS = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
THINKING = (
    "{% for m in messages %}{% set c = m['content'].split('</think>')[-1].strip() %}"
    "{{ m['role'] + ': ' + c + '\n' }}{% endfor %}"
)
TODAY = "{% if strftime_now is defined %}Today Date: {{ strftime_now('%d %b %Y') }}\n{% endif %}" + TURNS


def worded(template: str) -> Any:
    words = deepcopy(tokenizer())
    words.chat_template = template
    return words


def chat_pm(template: str) -> RewardModel:
    return RewardModel(small_model("llama"), worded(template), Rendering.find(None, worded(template)), "chat")


# Two segments


def bert_words() -> Any:
    words = deepcopy(tokenizer())
    words.add_special_tokens({"cls_token": "<pad>", "sep_token": "<eos>"})
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<pad> $A <eos>", pair="<pad> $A <eos> $B:1 <eos>:1", special_tokens=[("<pad>", 0), ("<eos>", 1)]
    )
    words.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return words


@pytest.mark.parametrize("architecture", ["bert", "roberta", "deberta-v2"])
def test_two_segments_are_those_of_the_tokenizer_with_their_token_types(architecture: str) -> None:
    model, words = small_model(architecture), bert_words()
    rm = RewardModel(model, words, Rendering("segments"), "segments")
    types = model.config.type_vocab_size > 1
    for pair in PAIRS[:4]:
        expected = []
        for response in (pair.chosen, pair.rejected):
            inputs = words("\n".join(m["content"] for m in pair.prompt), response, return_tensors="pt")
            kept = {k: v for k, v in inputs.items() if types or k != "token_type_ids"}
            with torch.no_grad():
                expected.append(float(model(**kept).logits[0, 0]))
        scores = rm.score([pair])
        assert [float(scores.chosen[0]), float(scores.rejected[0])] == pytest.approx(expected, abs=1e-5)
    assert (rm.segment_end is None) != types


def test_a_card_that_calls_the_tokenizer_on_two_texts_asks_for_segments(tmp_path: Path) -> None:
    small_model("bert").save_pretrained(tmp_path)
    bert_words().save_pretrained(tmp_path)
    assert RewardModel.load(str(tmp_path), device="cpu").rendering == Rendering("hh")
    (tmp_path / "README.md").write_text("inputs = tokenizer(question, answer, return_tensors='pt')\nmodel(**inputs)\n")
    assert RewardModel.load(str(tmp_path), device="cpu").rendering == Rendering("segments")


class FirstSegment(RewardModel):
    """A PM that ranks pairs as labelled only where it reads two segments."""

    def score_tokens(self, tokens: Any, *args: Any, **kwargs: Any) -> Any:
        scores = super().score_tokens(tokens, *args, **kwargs)
        better = scores.rejected + (1 if self.rendering.style == "segments" else -1)
        return type(scores)(better, scores.rejected)


def test_doctor_tries_segments_where_an_encoder_has_a_separator() -> None:
    pairs = [Pair(f"p{i}", PAIRS[0].prompt, f"It is Paris{'.' * (i + 1)}", f"It is {i}.") for i in range(12)]
    rm = FirstSegment(small_model("bert"), bert_words(), Rendering("hh"), "segments")
    found = {c.check: c for c in examine(rm, pairs).checks}
    assert '"style": "segments"' in found["as in training"].mend
    decoder = RewardModel(small_model("llama"), bert_words(), Rendering("hh"), "decoder")
    assert "3 other renderings" in {c.check: c for c in examine(decoder, pairs).checks}["as in training"].detail


# The date


def test_the_date_of_a_template_is_pinned_and_part_of_the_identity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small_model("llama").save_pretrained(tmp_path)
    worded(TODAY).save_pretrained(tmp_path)
    rm = RewardModel.load(str(tmp_path), device="cpu")
    text = render(rm.rendering, rm.tokenizer, PAIRS[0].prompt, PAIRS[0].chosen)
    assert text.startswith("Today Date: 26 Jul 2024\n")
    assert rm.rendering.date == DATE
    assert {c.check: c.status for c in preflight(rm, rm.tokenize_all(PAIRS)).checks}["rendering"] == "warn"
    assert any(DATE in note for note in notes(rm))
    (tmp_path / "rmscope.json").write_text(json.dumps({"rendering": {"style": "chat", "date": "2025-02-01"}}))
    later = RewardModel.load(str(tmp_path), device="cpu")
    assert "Today Date: 01 Feb 2025\n" in render(later.rendering, later.tokenizer, PAIRS[0].prompt, "Yes.")
    assert later.identity != rm.identity
    (tmp_path / "rmscope.json").write_text(json.dumps({"rendering": {"style": "chat", "date": "tomorrow"}}))
    with pytest.raises(InputError, match="has the date 'tomorrow'"):
        RewardModel.load(str(tmp_path), device="cpu")


def test_a_template_with_a_pinned_date_is_transformers_own_on_that_day() -> None:
    words = worded(TODAY)
    messages = [*PAIRS[0].prompt, {"role": "assistant", "content": "Yes."}]
    own = words.apply_chat_template(messages, tokenize=False)
    assert render(Rendering("chat", date=datetime.now().date().isoformat()), words, PAIRS[0].prompt, "Yes.") == own


def test_a_date_whose_format_is_computed_cannot_be_pinned() -> None:
    with pytest.raises(InputError, match="computes how it writes today's date"):
        render(Rendering("chat"), worded("{% set f = '%Y' %}{{ strftime_now(f) }}" + TURNS), PAIRS[0].prompt, "Yes.")


# What a template cuts or refuses


def thought(i: int) -> Pair:
    return Pair(f"t{i}", PAIRS[0].prompt, f"<think>{i}</think> Paris", f"<think>{i + 1}</think> Paris")


def test_responses_that_a_template_cuts_are_counted_and_equal_sides_are_ties() -> None:
    rm = chat_pm(THINKING)
    pairs = [*map(thought, range(3)), Pair("kept", PAIRS[0].prompt, "It is Paris.", "It is Lyon.  ")]
    assert changed_responses(rm.rendering, rm.tokenizer, pairs) == [
        *((i, side) for i in range(3) for side in ("chosen", "rejected")), (3, "rejected"),
    ]  # fmt: skip
    assert rm.score(pairs).delta[:3].tolist() == [0.0] * 3
    found = {c.check: c for c in examine(rm, pairs).checks}
    assert found["responses"].status == "warn"
    assert "changes 7 of 8 responses; in 3 of 4 pairs" in found["responses"].detail
    assert {c.check: c for c in examine(small_pm("llama"), PAIRS).checks}["responses"].status == "ok"


def inputs_of(rm: RewardModel, pairs: list[Pair], path: Path, **settings: Any) -> Inputs:
    rows = [{"id": p.id, "prompt": p.prompt, "chosen": turn(p.chosen), "rejected": turn(p.rejected)} for p in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = Inputs(RunConfig(model="small", data=str(path), out=Path(), **settings))
    found.__dict__["rm"] = rm
    return found


def turn(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def test_ties_after_rendering_are_left_out_and_counted(tmp_path: Path) -> None:
    rm = chat_pm(THINKING)
    kept = Pair("kept", PAIRS[0].prompt, "It is Paris.", "It is Lyon.")
    inputs = inputs_of(rm, [*map(thought, range(3)), kept], tmp_path / "pairs.jsonl")
    assert len(inputs.scored.pairs) == 1
    assert "3 pairs are left out: the same tokens on both sides" in inputs.notes
    only = inputs_of(rm, list(map(thought, range(3))), tmp_path / "ties.jsonl")
    with pytest.raises(InputError, match=r"None of the 3 pairs .* \(3 are the same tokens on both sides\)"):
        _ = only.scored


def test_a_row_that_the_template_refuses_is_named_and_skipped_where_asked(tmp_path: Path) -> None:
    refusing = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TURNS
    )
    rm = chat_pm(refusing)
    system = Pair("sys", [{"role": "system", "content": "Be brief."}, *PAIRS[0].prompt], "Yes.", "No.")
    pairs = [PAIRS[0], system, PAIRS[1]]
    path = tmp_path / "pairs.jsonl"
    with pytest.raises(InputError, match=r"pairs.*2.*System role not supported|sys: .*System role not supported"):
        _ = inputs_of(rm, pairs, path).scored
    inputs = inputs_of(rm, pairs, path, on_bad_row="skip")
    assert len(inputs.scored.pairs) == 2
    assert [reason for _, reason in inputs.read_report.skipped] == ["the PM's rendering refuses its conversation"]


# Templates that never end


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(9) %}{% endfor %}{% endfor %}{% endfor %}",
        "{% set n = namespace(x='word') %}{% for a in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
        "{% for a in range(99999) %}{{ 'word ' * 99 }}{% endfor %}",
    ],
    ids=["time", "memory", "characters"],
)
def test_a_template_that_never_ends_is_refused_in_bounded_time(
    template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 1)
    small_model("llama").save_pretrained(tmp_path)
    worded(template).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="chat template does not end"):
        RewardModel.load(str(tmp_path), device="cpu")
