"""Preference datasets that people use: a small file in the layout of each, with text made for these tests.

Every answer begins with its grade, so that a test can tell the better one without the reader's help.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from rmscope.pairs.pair import Pair
from rmscope.pairs.readers import ReadReport, load_pairs

FOLDER = Path(__file__).parent / "published"
GRADES = ("best", "good", "fair", "poor", "bad", "worse", "worst")
"""The first word of an answer, the best first. Answers of a tie begin with another word."""


@dataclass(frozen=True)
class DataSet:
    """A dataset as it is published, and what its small file gives."""

    name: str
    file: str
    form: str
    better: str
    """What tells the better response."""
    pairs: int
    """Pairs that the small file gives."""
    hub: str = ""
    """Its name on the hub; empty for a layout that many sets share."""

    @property
    def path(self) -> Path:
        return FOLDER / self.file

    @cache  # noqa: B019 - the sets live as long as the module
    def read(self) -> tuple[list[Pair], ReadReport]:
        report = ReadReport()
        return load_pairs(self.path, report=report), report


def grade(text: str) -> int:
    """The place of an answer's grade among :data:`GRADES`."""
    word = re.match(r"\W*(\w+)", text)
    assert word is not None, text
    return GRADES.index(word[1].lower())


BY_NAME = "`chosen`, `rejected`"
BY_WINNER = "`winner`"
BEST = ": each of the others against the best"
SETS = (
    DataSet("hh-rlhf", "hh_rlhf.jsonl", "hh transcript", BY_NAME, 2, "Anthropic/hh-rlhf"),
    DataSet("rm-static", "rm_static.jsonl", "hh prompt", BY_NAME, 2, "Dahoas/rm-static"),
    DataSet("UltraFeedback", "ultrafeedback.jsonl", "ultrafeedback", f"`overall_score`{BEST}", 4, "openbmb/UltraFeedback"),
    DataSet(
        "UltraFeedback, binarized", "ultrafeedback_binarized.jsonl", "trl implicit prompt", BY_NAME, 2,
        "HuggingFaceH4/ultrafeedback_binarized",
    ),
    DataSet("HelpSteer 2", "helpsteer2.jsonl", "scored", "`helpfulness`", 2, "nvidia/HelpSteer2"),
    DataSet(
        "HelpSteer 2, preferences", "helpsteer2_preference.jsonl", "helpsteer preference", "`preference_strength`", 2,
        "nvidia/HelpSteer2",
    ),
    DataSet("HelpSteer 3", "helpsteer3.jsonl", "helpsteer3 preference", "`overall_preference`", 2, "nvidia/HelpSteer3"),
    DataSet(
        "Skywork-Reward-Preference", "skywork.jsonl", "trl implicit prompt", BY_NAME, 2,
        "Skywork/Skywork-Reward-Preference-80K-v0.2",
    ),
    DataSet("Nectar", "nectar.jsonl", "nectar", f"`rank`{BEST}", 6, "berkeley-nest/Nectar"),
    DataSet("SHP", "shp.jsonl", "shp", "`labels`", 2, "stanfordnlp/SHP"),
    DataSet("PKU-SafeRLHF", "pku_saferlhf.jsonl", "pku-saferlhf", "`better_response_id`", 2, "PKU-Alignment/PKU-SafeRLHF"),
    DataSet("Chatbot Arena", "chatbot_arena.jsonl", "arena", BY_WINNER, 2, "lmsys/chatbot_arena_conversations"),
    DataSet(
        "LMArena 55k", "lmarena_55k.csv", "arena 55k", "`winner_model_a`, `winner_model_b`", 2,
        "lmarena-ai/arena-human-preference-55k",
    ),
    DataSet("LMArena 140k", "lmarena_140k.jsonl", "arena", BY_WINNER, 2, "lmarena-ai/arena-human-preference-140k"),
    DataSet("MT-bench judgments", "mt_bench.jsonl", "arena", BY_WINNER, 1, "lmsys/mt_bench_human_judgments"),
    DataSet("WebGPT comparisons", "webgpt.jsonl", "webgpt", "`score_0`, `score_1`", 2, "openai/webgpt_comparisons"),
    DataSet("RewardBench 1", "rewardbench.jsonl", "rewardbench", BY_NAME, 2, "allenai/reward-bench"),
    DataSet(
        "RewardBench 2", "rewardbench2.jsonl", "best of n", f"{BY_NAME}: each chosen with each rejected", 7,
        "allenai/reward-bench-2",
    ),
    DataSet("RM-Bench", "rm_bench.jsonl", "rm-bench", f"{BY_NAME}: each chosen with each rejected", 9, "THU-KEG/RM-Bench"),
    DataSet(
        "PPE, human preferences", "ppe_preference.jsonl", "ppe preference", BY_WINNER, 2,
        "lmarena-ai/PPE-Human-Preference-V1",
    ),
    DataSet("PPE, best of K", "ppe_best_of_k.jsonl", "ppe best of k", f"`scores`{BEST}", 2, "lmarena-ai/PPE-GPQA-Best-of-K"),
    DataSet("JudgeBench", "judgebench.jsonl", "judgebench", "`label`", 2, "ScalerLab/JudgeBench"),
    DataSet("LLMBar", "llmbar.jsonl", "llmbar", "`label`", 2),
    DataSet(
        "Summarize from feedback", "summarize_from_feedback.jsonl", "tl;dr", "`choice`", 2, "openai/summarize_from_feedback"
    ),
    DataSet("TL;DR preferences", "tldr_preference.jsonl", "trl plain", BY_NAME, 2, "trl-lib/tldr-preference"),
    DataSet("Orca DPO pairs", "orca_dpo.jsonl", "instruction", BY_NAME, 2, "Intel/orca_dpo_pairs"),
    DataSet("Alpaca layout", "alpaca_preference.jsonl", "instruction", BY_NAME, 2),
    DataSet("ShareGPT layout", "sharegpt.jsonl", "dialogue", BY_NAME, 2),
    DataSet("Tool turns", "tool_turns.jsonl", "trl explicit prompt", BY_NAME, 1),
    DataSet("Prefilled answers", "prefill.jsonl", "trl explicit prompt", BY_NAME, 1),
)  # fmt: skip
