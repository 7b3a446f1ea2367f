"""Other kinds of heads, which turn the final hidden state at the read position into a reward.

A head is a torch module that takes hidden states after the PM's last norm, [texts, d], and returns rewards, [texts] or
[texts, 1], such as ``nn.Linear(d, 1)``; ``RewardModel(..., head=head)`` runs it at the last token of the text. A reward that
is not a function of one hidden state, such as DPO's sum over tokens, cannot be written as a head (docs/howto/heads.md).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rmscope.errors import InputError


class TokenDifference(nn.Module):
    """The logit of the next token ``better`` minus that of ``worse``, for a judge that is asked for a yes or a no.

    Raises :class:`InputError` where a text is not one token, or the model's logits are not two rows of its output matrix.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, lm: Any, tokenizer: Any, better: str, worse: str) -> None:
        super().__init__()
        tokens = [tokenizer(text, add_special_tokens=False).input_ids for text in (better, worse)]
        for text, ids in zip((better, worse), tokens, strict=True):
            if len(ids) != 1:
                raise InputError(f"{text!r} is {len(ids)} tokens for this tokenizer, not one; name one (' yes', say).")
        rows = torch.tensor(tokens).flatten()
        output = lm.get_output_embeddings()
        if output is None:
            raise InputError(f"{type(lm).__name__} has no output matrix, so no token has a logit; name a causal LM.")
        bias = getattr(output, "bias", None)
        self.register_buffer("weight", output.weight.detach()[rows].clone())
        self.register_buffer("bias", self.weight.new_zeros(2) if bias is None else bias.detach()[rows].clone())
        self.cap: float | None = getattr(lm.config.get_text_config(), "final_logit_softcapping", None)
        self._compare(lm, rows)

    def forward(self, hidden: Float[Tensor, "texts d"]) -> Float[Tensor, " texts"]:
        logits = nn.functional.linear(hidden, self.weight, self.bias)
        if self.cap is not None:
            logits = self.cap * torch.tanh(logits / self.cap)
        return logits[:, 0] - logits[:, 1]

    @torch.no_grad()
    def _compare(self, lm: Any, rows: Tensor) -> None:
        """Raises InputError unless the difference is that of the model's own logits on one text, without dropout."""
        lm.eval()
        ids = rows.to(lm.device)[None]
        logits = lm(ids).logits[0, -1, ids[0]].float()
        own, mine = logits[0] - logits[1], self(lm.base_model(ids).last_hidden_state[:, -1]).float()[0]
        if not torch.isclose(own, mine, rtol=1e-2, atol=1e-3 + 1e-2 * float(logits.abs().max())):
            raise InputError(
                f"{type(lm).__name__} scales its logits in a way of its own ({float(own):.4g} against {float(mine):.4g}), "
                "which TokenDifference does not support; write a head for it."
            )
