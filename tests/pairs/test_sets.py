"""Facts about the datasets that people use: each is read as it is meant, and what it gives no pair for is listed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rmscope.errors import InputError
from rmscope.pairs.formats import NAMES
from rmscope.pairs.pair import check_pairs
from rmscope.pairs.readers import ReadReport, load_pairs
from rmscope.pairs.sides import SIDE_SCORES
from tests.pairs.files import PLAIN, Read, turn, write
from tests.pairs.sets import FOLDER, SETS, DataSet, grade


def of(name: str) -> DataSet:
    return next(s for s in SETS if s.name == name)


def reasons(name: str) -> list[str]:
    return [reason for _, reason in of(name).read()[1].skipped]


@pytest.mark.parametrize("data_set", SETS, ids=lambda s: s.name)
def test_every_pair_of_a_data_set_prefers_the_better_answer(data_set: DataSet) -> None:
    pairs, report = data_set.read()
    check_pairs(pairs)
    assert (report.format, len(pairs)) == (data_set.form, data_set.pairs)
    if data_set.name != "Prefilled answers":  # there both sides begin with the prefill
        assert all(grade(pair.chosen) < grade(pair.rejected) for pair in pairs)
    assert all(pair.prompt[-1]["role"] in ("user", "tool") for pair in pairs)
    rows = 2 if data_set.form == "scored" else 1  # the scored file has two responses to every prompt
    assert report.rows == rows * (len({pair.meta["line"] for pair in pairs}) + len(report.skipped))


def test_every_file_is_of_a_data_set_and_every_format_has_one() -> None:
    assert {s.file for s in SETS} == {path.name for path in FOLDER.iterdir()}
    assert {s.form for s in SETS} == set(NAMES)


@pytest.mark.parametrize("form", sorted(set(NAMES)))
def test_a_format_may_be_named_and_gives_what_is_recognised(form: str) -> None:
    for data_set in (s for s in SETS if s.form == form):
        assert load_pairs(data_set.path, form=form) == data_set.read()[0]


@pytest.mark.parametrize(
    "name",
    [
        "HelpSteer 2, preferences",
        "HelpSteer 3",
        "LMArena 55k",
        "LMArena 140k",
        "WebGPT comparisons",
        "PPE, human preferences",
    ],
)
def test_a_tie_is_no_preference_and_is_listed(name: str) -> None:
    assert reasons(name)[0] == "neither response is preferred"


@pytest.mark.parametrize("name", ["UltraFeedback", "Nectar", "PPE, best of K"])
def test_a_ranking_of_equal_responses_is_listed(name: str) -> None:
    assert reasons(name) == ["all responses have the same score"]


def test_equal_scores_are_no_preference() -> None:
    assert reasons("UltraFeedback, binarized") == ["score_chosen and score_rejected are equal"]


def test_scored_prompts_without_a_preference_are_listed() -> None:
    assert reasons("HelpSteer 2") == ["all responses of its prompt have the same score"]


def test_turns_that_helpsteer_marks_are_turns() -> None:
    for name in ("HelpSteer 2", "HelpSteer 2, preferences"):
        pair = of(name).read()[0][1]
        assert [m["role"] for m in pair.prompt] == ["user", "assistant", "user"]
        assert pair.prompt[1] == turn("assistant", "It is wide.")
        assert not any("extra_id" in m["content"] for m in pair.prompt)


def test_of_a_ranking_every_answer_meets_a_best_one() -> None:
    pairs, _ = of("Nectar").read()
    assert {pair.chosen for pair in pairs} == {"Best: soak, rinse, boil for an hour."}
    assert sorted(grade(pair.rejected) for pair in pairs) == [1, 2, 3, 4, 5, 6]
    assert (pairs[0].meta["score_chosen"], pairs[0].meta["model_chosen"]) == (-1.0, "model 1")
    several, _ = of("PPE, best of K").read()
    assert [pair.chosen for pair in several] == ["Good: 42.", "Good: it is 42."]  # both right answers take a turn


def test_annotators_strengths_are_kept_from_the_side_of_the_chosen_response() -> None:
    first, second = of("HelpSteer 3").read()[0]
    assert first.meta["annotators"] == [2, -1]  # response1 is chosen: -2 speaks for it, 1 against
    assert second.meta["annotators"] == [3, 1]
    assert (first.meta["preference"], first.meta["domain"]) == (2.0, "general")


def test_safety_is_kept_beside_pkus_choice() -> None:
    first, second = of("PKU-SafeRLHF").read()[0]
    assert (first.meta["safe_chosen"], first.meta["safe_rejected"], first.meta["chosen_is_safer"]) == (True, False, True)
    assert second.meta["chosen_is_safer"] is False


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("PKU-SafeRLHF", {"prompt": "prompt", "chosen": "response_0", "rejected": "response_1"}),
        ("SHP", {"prompt": "history", "chosen": "human_ref_A", "rejected": "human_ref_B"}),
    ],
)
def test_columns_never_take_a_place_for_a_label(name: str, columns: dict[str, str]) -> None:
    with pytest.raises(InputError, match="a label tells the better response; leave --columns out"):
        load_pairs(of(name).path, columns=columns)


def test_own_columns_beside_those_of_a_format_are_read(read: Read) -> None:
    row = {"prompt": "p", "answers": ["x", "y"], "good": "a", "bad": "b"}
    (pair,), report = read(row, columns={"chosen": "good", "rejected": "bad"})
    assert (report.format, pair.chosen, pair.rejected) == ("trl plain", "a", "b")
    with pytest.raises(InputError, match="its columns are those of nectar"):
        read(row, columns={"chosen": "answers", "rejected": "bad"})


def test_a_response_with_a_score_is_scored_whatever_else_the_row_holds(read: Read) -> None:
    rows = [{"prompt": "p", "response": f"r{score}", "score": score, "answers": ["r"]} for score in (1, 2)]
    (pair,), report = read(*rows)
    assert (report.format, pair.chosen, pair.rejected) == ("scored", "r2", "r1")


def test_empty_and_identical_responses_of_people_are_listed(read: Read) -> None:
    responses = [("a", 3), ("a", 2), (" ", 1), ("b", 0)]
    pairs, report = read(*({"prompt": "p", "response": text, "score": score} for text, score in responses))
    assert {(pair.chosen, pair.rejected) for pair in pairs} == {("a", "b")}
    assert report.skipped == [("line 3", "response is empty"), ("line 1, pair 0-1", "chosen and rejected are identical")]
    labelled = {"prompt": "p", "response_0": "a", "better_response_id": 0}
    pairs, report = read(*({**labelled, "response_1": text} for text in ("b", "a", "")))
    assert (len(pairs), report.skipped) == (
        1,
        [("line 2", "chosen and rejected are identical"), ("line 3", "rejected is empty")],
    )


def test_a_judged_turn_ends_the_conversation() -> None:
    (pair,), _ = of("MT-bench judgments").read()
    assert [m["role"] for m in pair.prompt] == ["user"]
    assert pair.chosen.startswith("Good")


@pytest.mark.parametrize("write_number", [int, float, str])
def test_a_judged_turn_may_be_a_number_or_its_text(read: Read, write_number: Any) -> None:
    sides = {
        f"conversation_{name}": [
            turn("user", "p"),
            turn("assistant", name),
            turn("user", "q"),
            turn("assistant", f"{name}2"),
        ]
        for name in "ab"
    }
    row = {**sides, "winner": "model_b"}
    (pair,), _ = read({**row, "turn": write_number(1)})
    assert (pair.prompt, pair.chosen, pair.rejected) == ([turn("user", "p")], "b", "a")
    for turns in (0, 1.5, "first"):
        with pytest.raises(InputError, match="line 1: turn is not a"):
            read({**row, "turn": turns})


def test_conversations_that_part_before_their_last_answer_are_listed() -> None:
    parted = "the two conversations do not differ in their last assistant message alone"
    assert reasons("Chatbot Arena")[-1] == reasons("LMArena 55k")[-1] == parted


def test_a_post_is_summarised_as_in_its_study() -> None:
    (text,) = {pair.prompt[0]["content"] for pair in of("Summarize from feedback").read()[0]}
    assert text.startswith("SUBREDDIT: r/cooking\n\nTITLE: Sprouted beans\n\nPOST: I soaked")
    assert text.endswith("\n\nTL;DR:")


@pytest.mark.parametrize("column", ["system", "system_prompt"])
def test_a_system_column_is_the_system_turn(read: Read, column: str) -> None:
    (pair,), _ = read({**PLAIN, column: "Answer in rhyme."})
    assert pair.prompt == [turn("system", "Answer in rhyme."), turn("user", "Is water wet?")]
    (pair,), _ = read({**PLAIN, column: ""})
    assert pair.prompt == [turn("user", "Is water wet?")]
    (pair,), _ = read({"persona": "A pirate.", **PLAIN}, columns={"system": "persona"})
    assert pair.prompt[0] == turn("system", "A pirate.")
    own = [turn("system", "Answer in prose."), turn("user", "Is water wet?")]
    with pytest.raises(InputError, match=f"the column {column} and the prompt's own system turn differ"):
        read({**PLAIN, "prompt": own, column: "Answer in rhyme."})


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
@pytest.mark.parametrize("write_list", [str, None], ids=["as Python writes it", "as JSON"])
def test_messages_that_are_stored_as_text_are_messages(read: Read, ending: str, write_list: Any) -> None:
    said = [turn("user", 'Is "it" wet?\nSay.'), turn("assistant", "Yes, it's wet.")]
    sides = {"chosen": said, "rejected": [said[0], turn("assistant", "No.")]}
    (pair,), report = read({k: (write_list or json.dumps)(v) for k, v in sides.items()}, name=f"data.{ending}")
    assert report.format == "trl implicit prompt"
    assert (pair.prompt, pair.chosen, pair.rejected) == (said[:1], "Yes, it's wet.", "No.")


def test_messages_in_a_text_that_cannot_be_read_are_refused(read: Read) -> None:
    with pytest.raises(InputError, match="row 1: chosen holds messages as a text that is not JSON"):
        read({**PLAIN, "chosen": "[{'role': 'assistant' 'content': oh}]"}, name="data.csv")


def test_only_columns_of_messages_are_read_as_messages(read: Read) -> None:
    """Where a text is asked for, the text of messages is a text; a column that no pair needs is left alone."""
    text = "[{'role': 'assistant', 'content': oh}]"
    (pair,), _ = read({**PLAIN, "log": text, "scores": "[see the notes]", "info": "{}{"}, name="data.csv")
    assert pair.chosen == "Yes."
    rows = [{"prompt": "p", "response": f'[{{"role": "user", "content": "{s}"}}]', "score": s} for s in (1, 2)]
    (pair,), _ = read(*rows, name="data.csv")
    assert pair.chosen == rows[1]["response"]
    with pytest.raises(InputError, match="row 1: prompt holds messages as a text that is not JSON"):
        read({**PLAIN, "prompt": "[{'role': {[]: 1}}]"}, name="data.csv")
    with pytest.raises(InputError, match="row 1: scores is not a list with one entry for each of the 2 responses"):
        read({"prompt": "p", "response_1": "a", "response_2": "b", "scores": "[1, zwei]"}, name="data.csv")


def test_a_list_in_an_answer_stays_a_text(read: Read) -> None:
    (pair,), _ = read({**PLAIN, "chosen": '["a", "b"]', "rejected": '[{"name": 1}]'})
    assert (pair.chosen, pair.rejected) == ('["a", "b"]', '[{"name": 1}]')


def test_parts_of_a_message_are_joined_and_images_are_refused(read: Read) -> None:
    parts = [{"type": "text", "text": "Is it"}, {"type": "text", "text": " wet?"}]
    row = {
        "prompt": [{"role": "user", "content": parts}],
        "chosen": [turn("assistant", "a")],
        "rejected": [turn("assistant", "b")],
    }
    (pair,), _ = read(row)
    assert pair.prompt == [turn("user", "Is it wet?")]
    parts.append({"type": "image", "text": ""})
    with pytest.raises(InputError, match="line 1: a message of prompt has a part of the kind image, and only texts"):
        read(row)


def test_a_prefill_begins_both_responses_once(read: Read) -> None:
    prompt = [turn("user", "Say a number."), turn("assistant", "It is ")]
    (pair,), _ = read({"prompt": prompt, "chosen": "seven.", "rejected": "blue."})
    assert (pair.prompt, pair.chosen, pair.rejected) == (prompt[:1], "It is seven.", "It is blue.")
    (pair,), _ = read({"prompt": prompt, "chosen": "It is seven.", "rejected": "It is blue."})
    assert (pair.chosen, pair.rejected) == ("It is seven.", "It is blue.")
    with pytest.raises(InputError, match="no prompt before the assistant's first turn"):
        read({"prompt": prompt[1:], "chosen": "seven.", "rejected": "blue."})


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_white_space_that_ends_a_prefill_stays(read: Read, ending: str) -> None:
    prompt = [turn("user", "Is it?"), turn("assistant", "Answer: ")]
    (pair,), _ = read({"prompt": prompt, "chosen": "A", "rejected": " B"}, name=f"data.{ending}")
    assert (pair.chosen, pair.rejected, pair.meta["prefill"]) == ("Answer: A", "Answer:  B", "Answer: ")


def test_a_prefill_begins_scored_responses_once(read: Read) -> None:
    prompt = [turn("user", "Say a number."), turn("assistant", "It is ")]
    texts = [("It is seven.", 3), ("blue.", 1), ("It is It is.", 0)]
    pairs, report = read(*({"prompt": prompt, "response": text, "score": score} for text, score in texts))
    assert report.format == "scored"
    assert [pair.chosen for pair in pairs] == ["It is seven.", "It is seven.", "It is blue."]
    assert [pair.rejected for pair in pairs] == ["It is blue.", "It is It is.", "It is It is."]
    assert all(pair.prompt == prompt[:1] for pair in pairs)


@pytest.mark.parametrize("column", ["messages", "conversation", "conversations"])
def test_a_dialogue_that_holds_a_response_is_no_prompt(read: Read, column: str) -> None:
    dialogue = [turn("user", "Is it?"), turn("assistant", "Yes.")]
    sides = {"chosen": turn("assistant", "Yes."), "rejected": turn("assistant", "No.")}
    with pytest.raises(InputError, match="line 1: the prompt ends with the chosen response"):
        read({column: dialogue, **sides})
    with pytest.raises(InputError, match="line 1: the prompt ends with the rejected response"):
        read({column: [dialogue[0], turn("assistant", "No.")], "chosen": "Yes.", "rejected": "No. "})
    (pair,), _ = read({"prompt": "Is it?", column: dialogue, **sides})
    assert (pair.prompt, pair.chosen, pair.rejected) == (dialogue[:1], "Yes.", "No.")


@pytest.mark.parametrize("role", ["assistant", "gpt", "bot", "chatgpt"])
def test_one_message_by_the_assistant_under_any_name_is_a_response(read: Read, role: str) -> None:
    sides = {side: [{"from": role, "value": text}] for side, text in (("chosen", "a"), ("rejected", "b"))}
    (pair,), _ = read({"prompt": [turn("user", "p")], **sides})
    assert (pair.prompt, pair.chosen, pair.rejected) == ([turn("user", "p")], "a", "b")


def test_a_question_is_the_prompt_alone_and_an_instruction_takes_its_input(read: Read) -> None:
    sides = {"chosen": "a", "rejected": "b"}
    pairs, _ = read(
        {"question": "Why?", "instruction": "Answer.", "input": "Why?", **sides},
        {"question": " ", "instruction": "Sum.", "input": "1, 2", **sides},
        {"input": "Alone.", **sides},
    )
    assert [pair.prompt[0]["content"] for pair in pairs] == ["Why?", "Sum.\n1, 2", "Alone."]


def test_an_instruction_comes_after_its_history(read: Read) -> None:
    row = {"instruction": "And now?", "input": "", "chosen": "a", "rejected": "b"}
    (pair,), _ = read({**row, "history": [["Hi", "Hello"], ["So?", "So."]]})
    assert [m["content"] for m in pair.prompt] == ["Hi", "Hello", "So?", "So.", "And now?"]
    assert [m["role"] for m in pair.prompt] == ["user", "assistant"] * 2 + ["user"]
    assert read({**row, "history": []})[0][0].prompt == [turn("user", "And now?")]
    with pytest.raises(InputError, match="line 1: history is not a list of two texts each"):
        read({**row, "history": [["Hi"]]})


@pytest.mark.parametrize("mark", ["Fill <extra_id_1> in.", "<extra_id_1>Users agree.", "<extra_id_1>"])
def test_a_mark_without_a_speaker_is_text_but_not_beside_marked_turns(read: Read, mark: str) -> None:
    (pair,), _ = read({**PLAIN, "prompt": mark})
    assert pair.prompt == [turn("user", mark)]
    with pytest.raises(InputError, match="a mark <extra_id_1> without a speaker"):
        read({**PLAIN, "prompt": f"Hi\n<extra_id_1>Assistant\nHo\n<extra_id_1>User\n{mark}"})


@pytest.mark.parametrize(("better", "worse"), SIDE_SCORES)
def test_scores_of_both_sides_are_kept_and_must_agree_with_them(read: Read, better: str, worse: str) -> None:
    rows = [{**PLAIN, "prompt": f"{high}, {low}", better: high, worse: low} for high, low in ((5, 3), (4, 4))]
    (pair,), report = read(*rows)
    assert (pair.meta["score_chosen"], pair.meta["score_rejected"]) == (5.0, 3.0)
    assert report.skipped == [("line 2", f"{better} and {worse} are equal")]
    with pytest.raises(InputError, match=f"line 1: {better} is below {worse}"):
        read({**PLAIN, better: 3, worse: 5})


def test_tool_turns_and_calls_stay_in_the_prompt(read: Read) -> None:
    (pair,), _ = of("Tool turns").read()
    assert [m["role"] for m in pair.prompt] == ["user", "assistant", "tool"]
    assert pair.prompt[1]["tool_calls"][0]["function"]["name"] == "tide_table"
    assert pair.prompt[2]["name"] == "tide_table"
    call = '{"name": "tide_table", "arguments": {"place": "harbour"}}'
    said = [("human", "When?"), ("function_call", call), ("observation", "06:10")]
    row = {"conversations": [{"from": r, "value": t} for r, t in said], "chosen": "At six.", "rejected": "At noon."}
    (shared,), _ = read(row)
    assert [m["role"] for m in shared.prompt] == ["user", "assistant", "tool"]
    assert shared.prompt[1]["tool_calls"] == pair.prompt[1]["tool_calls"]
    asked = {**turn("assistant", ""), "tool_calls": pair.prompt[1]["tool_calls"]}
    with pytest.raises(InputError, match="chosen is a tool call, and only texts can be compared"):
        read({"prompt": pair.prompt[:1], "chosen": [asked], "rejected": [turn("assistant", "No.")]})


def test_a_call_has_one_layout_and_what_is_none_is_refused(read: Read) -> None:
    def asked(calls: Any) -> list[dict[str, Any]]:
        return [{"role": "user", "content": "p"}, {"role": "assistant", "content": None, "tool_calls": calls}]

    answered = {"chosen": "a", "rejected": "b"}
    function = {"name": "f", "arguments": {"x": 1}}
    for call in (function, {"type": "function", "function": function}):
        (pair,), _ = read({"prompt": [*asked([call]), turn("tool", "r")], **answered})
        assert pair.prompt[1]["tool_calls"] == [{"type": "function", "function": function}]
    for calls in ("f()", {"name": "f"}):
        with pytest.raises(InputError, match="line 1: the tool calls of prompt are not a list"):
            read({"prompt": asked(calls), **answered})
    for calls in ([None], ["f"], [{}], [{"function": "f"}], [{"function": {"name": 3}}]):
        with pytest.raises(InputError, match="line 1: a tool call of prompt has no name"):
            read({"prompt": asked(calls), **answered})
    with pytest.raises(InputError, match="line 1: a text holds half of a surrogate pair"):
        read({"prompt": [*asked([{"name": "\ud83d"}]), turn("tool", "r")], **answered})


# Several files


def shards(folder: Path, split: str = "train", count: int = 3) -> list[Path]:
    rows = [{**PLAIN, "prompt": f"Is {i} even?"} for i in range(2 * count)]
    folder.mkdir(exist_ok=True, parents=True)
    names = [f"{split}-{i:05}-of-{count:05}.parquet" for i in range(count)]
    return [write(folder / name, rows[2 * i : 2 * i + 2]) for i, name in enumerate(names)]


@pytest.mark.parametrize("inner", ["", "data"])
def test_shards_in_a_folder_or_by_a_pattern_are_read_like_one_file(tmp_path: Path, inner: str) -> None:
    shards(tmp_path / "set" / inner)
    shards(tmp_path / "set" / inner, "test", 1)
    report = ReadReport()
    pairs = load_pairs(tmp_path / "set", report=report)
    assert [pair.id for pair in pairs] == [f"set-train:{i}" for i in range(1, 7)]
    assert [pair.first_human_turn() for pair in pairs] == [f"Is {i} even?" for i in range(6)]
    assert report.rows == 6
    assert len(load_pairs(tmp_path / "set", split="test")) == 2
    by_pattern = load_pairs(tmp_path / "set" / inner / "train-*.parquet")
    assert [(p.id, p.prompt) for p in by_pattern] == [(f"train:{i}", p.prompt) for i, p in enumerate(pairs, 1)]
    assert len(load_pairs(tmp_path / "set" / inner / "train-0000[01]-*.parquet")) == 4


def test_a_fault_in_a_shard_names_the_shard(tmp_path: Path) -> None:
    files = shards(tmp_path)
    write(files[1], [PLAIN, {**PLAIN, "rejected": None}])
    with pytest.raises(InputError, match=r"row 2 of train-00001-of-00003\.parquet: rejected is null"):
        load_pairs(tmp_path)


def test_a_folder_in_which_it_is_not_clear_what_is_meant_is_refused(tmp_path: Path) -> None:
    files = shards(tmp_path)
    with pytest.raises(InputError, match="has no file of the split 'validation'; give --split train"):
        load_pairs(tmp_path, split="validation")
    files[1].unlink()
    with pytest.raises(InputError, match="has 2 of 3 shards; fetch the others"):
        load_pairs(tmp_path)
    (tmp_path / "other").mkdir()
    for name in ("mine.jsonl", "yours.jsonl"):
        write(tmp_path / "other" / name, [PLAIN])
    with pytest.raises(InputError, match=r"is a folder of several files \(mine\.jsonl, yours\.jsonl\)"):
        load_pairs(tmp_path / "other")
    with pytest.raises(InputError, match=r"No file matches .*none-\*\.jsonl"):
        load_pairs(tmp_path / "none-*.jsonl")
    for ending in ("csv", "jsonl"):
        write(tmp_path / "kinds" / f"train-00000-of-00001.{ending}", [PLAIN])
    with pytest.raises(InputError, match="is a folder of several files"):
        load_pairs(tmp_path / "kinds")


@pytest.mark.parametrize("count", [1, 2, 3])
def test_ids_do_not_depend_on_how_many_shards_there_are(tmp_path: Path, count: int) -> None:
    rows = [{**PLAIN, "prompt": f"Is {i} even?"} for i in range(6)]
    for i in range(count):
        write(tmp_path / "set" / f"train-{i:05}-of-{count:05}.jsonl", rows[i * 6 // count : (i + 1) * 6 // count])
    assert [pair.id for pair in load_pairs(tmp_path / "set")] == [f"set-train:{i}" for i in range(1, 7)]
    assert [pair.id for pair in load_pairs(tmp_path / "set" / "train-*.jsonl")] == [f"train:{i}" for i in range(1, 7)]


def test_a_split_is_not_one_whose_name_goes_on(tmp_path: Path) -> None:
    for name in ("train_sft-00000-of-00001", "train_prefs-00000-of-00001", "train10"):
        write(tmp_path / f"{name}.jsonl", [{**PLAIN, "prompt": name}])
    (pair,) = load_pairs(tmp_path, split="train_sft")
    assert pair.first_human_turn() == "train_sft-00000-of-00001"
    with pytest.raises(InputError, match="has no file of the split 'train'; give --split train_prefs"):
        load_pairs(tmp_path)
    write(tmp_path / "train_0.jsonl", [{**PLAIN, "prompt": "numbered"}])
    assert load_pairs(tmp_path)[0].first_human_turn() == "numbered"
