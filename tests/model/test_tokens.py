"""From a conversation to tokens: rendering, divergence, spans."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from rmscope.errors import InputError
from rmscope.model.packing import pack_pairs
from rmscope.model.rendering import (
    AT_ONCE,
    LONG_TEXT,
    NO_LIMIT,
    Rendering,
    divergence,
    encode,
    encode_within,
    pair_tokens,
    render,
    tokenize_sides,
)
from rmscope.pairs.pair import Message, Pair
from tests.model.small import EOS, shared_pm, small_pm, tokenizer, user

IDS = st.lists(st.integers(0, 4), min_size=1, max_size=12)


@given(IDS, IDS)
def test_all_tokens_before_the_divergence_agree_and_the_one_there_differs(a: list[int], b: list[int]) -> None:
    tokens = pair_tokens(a, b)
    p, shared = tokens.divergence, tokens.shared
    shorter = min(len(a), len(b))
    assert p == divergence(b, a) >= 1
    assert a[:shared] == b[:shared]
    if a[0] != b[0]:
        assert (p, shared) == (1, 0)
    elif a[:shorter] == b[:shorter]:  # one is a prefix of the other: the last common token, never the first of all
        assert p == shared == max(1, shorter - 1)
    else:
        assert p == shared
        assert a[p] != b[p]


@given(IDS, IDS, IDS)
def test_a_common_prefix_moves_the_divergence_by_its_length(prefix: list[int], a: list[int], b: list[int]) -> None:
    if a[0] != b[0]:
        assert divergence(prefix + a, prefix + b) == len(prefix)


@given(st.lists(st.tuples(IDS, IDS), min_size=1, max_size=4))
def test_a_packed_row_holds_both_texts_once_and_lets_each_see_only_itself(
    pairs: list[tuple[list[int], list[int]]],
) -> None:
    tokens = [pair_tokens(a, b) for a, b in pairs]
    reads = [{"chosen": len(a) - 1, "rejected": len(b) - 1} for a, b in pairs]
    batch = pack_pairs([(i, t, r) for i, (t, r) in enumerate(zip(tokens, reads, strict=True))])
    for text in batch.texts:
        ids = tokens[text.pair].side(text.side)
        assert batch.ids[text.row, text.columns].tolist() == ids.tolist()
        assert batch.positions[text.row, text.columns].tolist() == list(range(len(ids)))
        assert text.span.tolist() == text.columns[text.divergence : text.read + 1].tolist()
        for place, column in enumerate(text.columns.tolist()):
            seen = batch.mask[text.row, 0, column].nonzero().flatten().tolist()
            assert seen == sorted(text.columns[: place + 1].tolist())
    assert batch.mask.any(-1).all()  # no empty softmax, padding included


def test_identical_sides_part_at_their_last_token() -> None:
    assert divergence([5, 6, 7], [5, 6, 7]) == 2


def test_one_side_a_prefix_of_the_other_parts_at_the_last_common_token() -> None:
    assert divergence([5, 6, 7], [5, 6, 7, 8, 9]) == 2
    assert divergence([5, 6, 7, 8, 9], [5, 6, 7]) == 2


def test_responses_that_begin_alike_part_inside_the_response() -> None:
    rm = shared_pm("llama")
    tokens = rm.tokenize(Pair("x", user("Which river?"), "It is the Seine.", "It is the small house."))
    common = rm.tokenizer.decode(tokens.chosen[: tokens.divergence])
    assert common.startswith("\n\nHuman: Which river?\n\nAssistant: It is the ")


def test_a_token_that_merges_across_the_border_belongs_to_the_response() -> None:
    """``Assistant: I`` against ``Assistant: 9``: after BPE the space goes with the word, so the sides part before it."""
    rm = shared_pm("llama")
    tokens = rm.tokenize(Pair("x", user("So?"), "I don't know.", "999"))
    left = [rm.tokenizer.decode([t]) for t in tokens.chosen[tokens.divergence - 1 : tokens.divergence + 1]]
    right = rm.tokenizer.decode([int(tokens.rejected[tokens.divergence])])
    assert left[1].startswith(" I")
    assert right == " "
    prompt = encode(rm.rendering, rm.tokenizer, ["\n\nHuman: So?\n\nAssistant: "])[0]
    assert tokens.chosen[: tokens.divergence].tolist() == prompt[:-1]


def test_a_letter_that_merges_with_the_prompts_end_moves_the_divergence_into_the_prompt() -> None:
    ids = {text: encode(Rendering("plain"), tokenizer(), [text])[0] for text in ("Pari", "Paris", "Parix")}
    assert tokenizer().decode(ids["Paris"]) == "Paris"
    merged = pair_tokens(ids["Paris"], ids["Parix"])
    assert merged.divergence < len(ids["Pari"])
    assert ids["Paris"][: merged.shared] == ids["Parix"][: merged.shared]


def test_the_hh_rendering_is_the_transcript_of_hh_rlhf() -> None:
    turns = [
        {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}, {"role": "user", "content": "Why?"},
    ]  # fmt: skip
    text = render(Rendering("hh"), tokenizer(), turns, "Because.")  # type: ignore[arg-type]
    assert text == "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Why?\n\nAssistant: Because."
    system = [{"role": "system", "content": "Be kind."}, *turns[:1]]
    assert render(Rendering("hh"), tokenizer(), system, "Yes.") == "Be kind.\n\nHuman: Hi\n\nAssistant: Yes."  # type: ignore[arg-type]


def test_the_plain_rendering_is_the_turns_a_line_each() -> None:
    assert render(Rendering("plain"), tokenizer(), user("Why?"), "Because.") == "Why?\nBecause."


def test_an_unknown_role_is_an_input_error() -> None:
    with pytest.raises(InputError, match="role tool"):
        render(Rendering("hh"), tokenizer(), [{"role": "tool", "content": "4"}], "Four.")


CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"


def test_the_chat_rendering_is_the_tokenizers_template_without_added_tokens() -> None:
    made = type(tokenizer())(tokenizer_object=tokenizer().backend_tokenizer, eos_token="<eos>", pad_token="<pad>")
    made.chat_template = CHAT
    rendering = Rendering.find(None, made)
    assert rendering.style == "chat"
    text = render(rendering, made, user("Why?"), "Because.")
    assert text == "<user>Why?\n<assistant>Because.\n"
    made.chat_template = "{{ raise_exception('only two turns') }}"
    with pytest.raises(InputError, match=r"roles \['user', 'assistant'\] .*only two turns"):
        render(rendering, made, user("Why?"), "Because.")


def test_eos_is_appended_where_the_rendering_says_so_and_refused_where_there_is_none() -> None:
    plain, with_eos = (encode(Rendering("hh", append), tokenizer(), ["Paris"])[0] for append in (False, True))
    assert with_eos == [*plain, EOS]
    without = type(tokenizer())(tokenizer_object=tokenizer().backend_tokenizer, pad_token="<pad>")
    with pytest.raises(InputError, match="no eos token"):
        encode(Rendering("hh", True), without, ["Paris"])


def test_the_rendering_beside_the_model_wins(tmp_path: Path) -> None:
    (tmp_path / "rmscope.json").write_text(json.dumps({"rendering": {"style": "plain", "append_eos": True}}))
    assert Rendering.find(tmp_path, tokenizer()) == Rendering("plain", True)
    assert Rendering.find(tmp_path / "nowhere", tokenizer()) == Rendering("hh", False)


CARD = """---
tags:
- trl
- {trainer}
---
### Framework versions

- TRL: {version}
- Transformers: 5.0.0
"""


@pytest.mark.parametrize(
    ("trainer", "version", "appended"),
    [("reward-trainer", "0.24.0", True), ("reward-trainer", "1.2.0.dev0", True), ("reward-trainer", "0.23.1", False),
     ("sft", "1.2.0", False)],
)  # fmt: skip
def test_the_eos_that_trls_reward_trainer_appends_to_plain_text_is_followed(
    trainer: str, version: str, appended: bool
) -> None:
    card = CARD.format(trainer=trainer, version=version)
    assert Rendering.find(None, tokenizer(), card) == Rendering("hh", append_eos=appended)
    made = type(tokenizer())(tokenizer_object=tokenizer().backend_tokenizer, eos_token="<eos>", pad_token="<pad>")
    made.chat_template = CHAT
    assert Rendering.find(None, made, card) == Rendering("chat")  # conversations get the template's own end
    without = type(tokenizer())(tokenizer_object=tokenizer().backend_tokenizer, pad_token="<pad>")
    assert Rendering.find(None, without, card) == Rendering("hh")


def test_a_chat_template_that_is_asked_for_and_missing_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "rmscope.json").write_text(json.dumps({"rendering": {"style": "chat"}}))
    with pytest.raises(InputError, match="asks for the chat template, but the tokenizer has none"):
        Rendering.find(tmp_path, tokenizer())


def test_a_suffix_stands_behind_the_response_and_before_the_eos(tmp_path: Path) -> None:
    asked = Rendering("plain", append_eos=True, suffix="\nGood?")
    text = render(asked, tokenizer(), user("Why?"), "Because.")
    assert text == "Why?\nBecause.\nGood?"
    assert encode(asked, tokenizer(), [text])[0][-1] == EOS
    (tmp_path / "rmscope.json").write_text(json.dumps({"rendering": asked.as_dict()}))
    assert Rendering.find(tmp_path, tokenizer()) == asked
    assert Rendering("plain").as_dict() == {"style": "plain", "append_eos": False}  # hashes of runs made before hold


@pytest.mark.parametrize("text", ['{"rendering": {"stile": "plain"}}', '{"rendering": {"style": "alpaca"}}', "{", "[]"])
def test_a_rendering_that_cannot_be_read_is_an_input_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "rmscope.json").write_text(text)
    with pytest.raises(InputError, match=r"rmscope\.json"):
        Rendering.find(tmp_path, tokenizer())


def own_tokenizer(**tokens: str) -> Any:
    """A tokenizer that may be changed: the shared one stays as it is."""
    own = Tokenizer.from_str(tokenizer().backend_tokenizer.to_str())
    return type(tokenizer())(tokenizer_object=own, eos_token="<eos>", pad_token="<pad>", **tokens)


def test_a_rendering_without_bos_drops_the_one_that_the_tokenizer_puts_first(tmp_path: Path) -> None:
    with_bos = own_tokenizer(bos_token="<eos>")  # any token that is there
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", EOS)])
    plain, without = Rendering("plain"), Rendering("plain", bos=False)
    (ids,), (rest,) = encode(plain, with_bos, ["Is water wet?"]), encode(without, with_bos, ["Is water wet?"])
    assert ids == [EOS, *rest]
    assert encode(without, tokenizer(), ["Is water wet?"]) == encode(plain, tokenizer(), ["Is water wet?"]) == [rest]
    (tmp_path / "rmscope.json").write_text(json.dumps({"rendering": without.as_dict()}))
    assert Rendering.find(tmp_path, tokenizer()) == without
    assert str(without).endswith("no bos")


@pytest.mark.parametrize("context", [1, 300])
@pytest.mark.parametrize("part", ["yes ", " ", "é"])
def test_of_a_text_of_megabytes_enough_is_read_to_know_that_it_is_too_long(context: int, part: str) -> None:
    made, long = tokenizer(), part * (3 * LONG_TEXT // len(part))
    (whole,), (read,) = encode(Rendering(), made, [long]), encode_within(Rendering(), made, [long], context)
    assert (len(read) > context) == (len(whole) > context)
    assert len(read) < 0.4 * len(whole)
    assert encode_within(Rendering(), made, ["short", long], NO_LIMIT)[1] == whole


def test_a_call_of_a_tool_is_rendered_or_refused() -> None:
    """A template that passes over calls would show the PM another conversation."""
    call = {"type": "function", "function": {"name": "tide_table", "arguments": {}}}
    prompt: list[Message] = [
        *user("When is high tide? Ask tide_table."),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "06:10"},
    ]
    made = own_tokenizer()
    made.chat_template = CHAT
    with pytest.raises(InputError, match="chat template drops the call of tide_table"):
        render(Rendering("chat"), made, prompt, "At six.")
    made.chat_template = (
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}{{ c.function.name }}{% endfor %}|{% endfor %}"
    )
    whole = "When is high tide? Ask tide_table.|tide_table|06:10|At six.|"
    assert render(Rendering("chat"), made, prompt, "At six.") == whole
    made.chat_template = made.chat_template.replace("m.tool_calls", "(m.tool_calls or [])[:1]")
    assert render(Rendering("chat"), made, prompt, "At six.") == whole
    twice: Message = {**prompt[1], "tool_calls": [call, {"type": "function", "function": {"name": "tide"}}]}
    with pytest.raises(InputError, match="chat template drops the call of tide from the prompt"):
        render(Rendering("chat"), made, [prompt[0], twice, prompt[2]], "At six.")
    with pytest.raises(InputError, match="rendering hh has no place for the call of tide_table"):
        render(Rendering("hh"), made, prompt, "At six.")


def test_spans_run_from_the_divergence_to_the_read_position() -> None:
    for rm, last in (
        (small_pm("llama", append_eos=True), 1),
        (small_pm("llama", append_eos=True, pad_token_id=EOS), 2),
    ):
        tokens = rm.tokenize(Pair("x", user("Which river?"), "The Seine.", "The small one."))
        for text in next(iter(rm.batches([tokens]))).texts:
            n = tokens.side(text.side).numel()
            assert text.span.tolist() == text.columns[tokens.divergence : n - last + 1].tolist()


def test_a_response_that_ends_where_the_other_goes_on_has_no_span_before_its_eos() -> None:
    rm = small_pm("llama", append_eos=True, pad_token_id=EOS)
    tokens = rm.tokenize(Pair("x", user("Is water wet?"), "You're right", "You're right, thanks"))
    chosen, rejected = next(iter(rm.batches([tokens]))).texts
    assert chosen.span.numel() == 0
    assert rejected.span.numel() == tokens.rejected.numel() - 1 - tokens.divergence


def test_many_pairs_have_the_tokens_of_each_alone() -> None:
    pairs = [Pair(str(i), user(f"Which river? {i}"), f"The Seine, {i}.", "The small one.") for i in range(2 * AT_ONCE + 1)]
    together = tokenize_sides(Rendering("hh"), tokenizer(), pairs)
    for pair, tokens in zip(pairs, together, strict=True):
        alone = tokenize_sides(Rendering("hh"), tokenizer(), [pair])[0]
        assert tokens.chosen.tolist() == alone.chosen.tolist()
        assert (tokens.rejected.tolist(), tokens.divergence) == (alone.rejected.tolist(), alone.divergence)
