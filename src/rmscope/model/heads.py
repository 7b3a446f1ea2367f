"""Other kinds of heads, which turn the final hidden state at the read position into a reward.

A head is a torch module that takes hidden states after the PM's last norm, [texts, d], and returns rewards, [texts] or
[texts, 1]. ``RewardModel(lm, tokenizer, rendering, name, head=head)`` then scores, resumes, ablates and differentiates as
with a PM's own score head, and reads the last token of the text. A value head is simply an ``nn.Linear(d, 1)``.

A reward that is not a function of one hidden state, such as DPO's sum over the response's tokens, cannot be written as a
head (see docs/howto/heads.md).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rmscope.errors import InputError


class TokenDifference(nn.Module):
    """The logit of the next token ``better`` minus that of ``worse``, for a judge that is asked for a yes or a no.

    Raises :class:`InputError` where a text is not one token, or where the model computes its logits differently from two
    rows of its output matrix with the cap of Gemma 2.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, lm: Any, tokenizer: Any, better: str, worse: str) -> None:
        super().__init__()
        rows = torch.tensor([_token(tokenizer, text) for text in (better, worse)])
        output = lm.get_output_embeddings()
        if output is None:
            raise InputError(f"{type(lm).__name__} has no output matrix, so no token has a logit; name a causal LM.")
        bias = getattr(output, "bias", None)
        self.register_buffer("weight", output.weight.detach()[rows].clone())
        self.register_buffer("bias", self.weight.new_zeros(2) if bias is None else bias.detach()[rows].clone())
        self.cap: float | None = getattr(lm.config.get_text_config(), "final_logit_softcapping", None)
        self._check(lm, rows)

    def forward(self, hidden: Float[Tensor, "texts d"]) -> Float[Tensor, " texts"]:
        logits = nn.functional.linear(hidden, self.weight, self.bias)
        if self.cap is not None:
            logits = self.cap * torch.tanh(logits / self.cap)
        return logits[:, 0] - logits[:, 1]

    @torch.no_grad()
    def _check(self, lm: Any, rows: Tensor) -> None:
        """Compares the difference with the model's own logits on one text, without dropout."""
        lm.eval()
        ids = rows.to(lm.device)[None]
        own = lm(ids).logits[0, -1, ids[0]].float()
        mine = self(lm.base_model(ids).last_hidden_state[:, -1]).float()[0]
        if not torch.isclose(own[0] - own[1], mine, rtol=1e-2, atol=1e-3 + 1e-2 * float(own.abs().max())):
            raise InputError(
                f"{type(lm).__name__} scales its logits in a way of its own ({float(own[0] - own[1]):.4g} against "
                f"{float(mine):.4g}), which TokenDifference does not support; write a head for it."
            )


def _token(tokenizer: Any, text: str) -> int:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if len(ids) != 1:
        raise InputError(
            f"{text!r} is {len(ids)} tokens for this tokenizer, not one; name a text that is one token (' yes', say)."
        )
    return int(ids[0])
