"""What a run would take: counts, minutes and bytes, estimated from one timed forward pass."""

from __future__ import annotations

from typing import Any

from rmscope.evaluation.reward_aware import RewardAwareConfig
from rmscope.model import doctor
from rmscope.pairs.pair import filtered_count
from rmscope.run.inputs import Inputs


def estimate(inputs: Inputs) -> dict[str, Any]:
    """The figures of ``rmscope run --dry-run`` by name."""
    c, scored, rm = inputs.config, inputs.scored, inputs.rm
    tokens = scored.tokens
    studied = filtered_count(len(tokens), c.top_share, c.top_pairs)
    rate = doctor.tokens_per_second(rm, tokens)
    tuning = len(inputs.sites) * doctor.tuning_minutes(tokens, rate, c.reward_aware, RewardAwareConfig().pairs)
    scoring = 0.0 if studied == len(tokens) else doctor.run_tokens(tokens) / rate / 60
    fit = sum(tokens[i].chosen.numel() + tokens[i].rejected.numel() for i in scored.of_split("fit"))
    return {
        "pairs": len(tokens),
        **({"of largest |Δr|, studied": studied} if scoring else {}),
        "tokens (shared prefixes once)": doctor.run_tokens(tokens),
        "sites": ", ".join(inputs.sites),
        "tokens per second, forward": round(rate),
        "minutes, about": round(scoring + tuning + doctor.run_minutes(rm, tokens, rate, studied), 1),
        "GB of memory, about": round(doctor.run_bytes(rm) / 1e9, 1),
        "GB on disk, about": round(fit * studied / len(tokens) * rm.d_model * 2 * len(inputs.sites) / 1e9, 2),
    }
