"""Cards to plan for: their peak rates and memory as the makers state them, and what of a peak was measured."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from rmscope.errors import InputError
from rmscope.run.plan.rates import Rates

TERA, GB = 1e12, 1e9


@dataclass(frozen=True)
class Card:
    """One card. Rates are of dense products, in FLOP/s."""

    bf16: float
    tf32: float
    """Nothing runs in TF32 yet: effects need float32."""
    fp32: float
    memory: float
    bandwidth: float
    """Bytes per second of its memory."""


CARDS = {
    # NVIDIA A100 Tensor Core GPU data sheet, 2021 (SXM4)
    "A100": Card(312 * TERA, 156 * TERA, 19.5 * TERA, 80 * GB, 2039 * GB),
    "A100-40GB": Card(312 * TERA, 156 * TERA, 19.5 * TERA, 40 * GB, 1555 * GB),
    # NVIDIA H100 Tensor Core GPU data sheet, 2023 (SXM5): 1,979 and 989 TFLOP/s there are with sparsity, twice these
    "H100": Card(989.4 * TERA, 494.7 * TERA, 66.9 * TERA, 80 * GB, 3350 * GB),
    # NVIDIA H200 Tensor Core GPU data sheet, 2024 (SXM): the H100's products, more and faster memory
    "H200": Card(989.4 * TERA, 494.7 * TERA, 66.9 * TERA, 141 * GB, 4800 * GB),
    # NVIDIA Blackwell architecture technical brief, 2024 (HGX B200): 4.5 and 2.2 PFLOP/s with sparsity
    "B200": Card(2250 * TERA, 1100 * TERA, 80 * TERA, 180 * GB, 7700 * GB),
    # NVIDIA L40S data sheet, 2023: 733 and 366 TFLOP/s with sparsity
    "L40S": Card(362.05 * TERA, 183 * TERA, 91.6 * TERA, 48 * GB, 864 * GB),
    # NVIDIA Ada GPU architecture whitepaper, 2022 (GeForce RTX 4090, sums in float32)
    "RTX4090": Card(165.2 * TERA, 82.6 * TERA, 82.6 * TERA, 24 * GB, 1008 * GB),
}
ALIASES = {"A100-80GB": "A100", "H100-80GB": "H100", "4090": "RTX4090"}

# What of a peak a step reached on one H200 (benchmarks/README.md, "On a GPU": 7.0 billion weights in 32 blocks, d 4,096).
CALL = 1e-3
"""Seconds that one block of one forward costs beside its products: launches, masks, hooks. It was not measured apart; the
shares below are what is left beside it."""
FORWARD = 0.23
"""Of bfloat16's peak: 15,000 tokens per second of both sides, of which .647 run, since a shared prefix runs once, take 106
ms per 1,024. 43 blocks' calls are in that (batches are filled to .75). 14.3 TFLOP in the other 63 ms are 227 TFLOP/s."""
FLOAT32 = 0.60
"""Of float32's peak: 5,984 ablations of a pair with responses of 92 and 7 tokens, each of about 44 tokens through 14 blocks
of 218 million weights, took 44 s: 40 TFLOP/s beside the calls."""
GRADIENT = 0.75
"""Of the rate of a forward: estimates of 32 pairs (6,656 tokens, 47 blocks' products forward and backward), at 37,000
features per second and some 2,700 features per response, which were not counted."""
ENCODE = 0.57
"""Of float32's peak: 71,000 tokens per second through an encoder of 4,096 by 65,536."""
SPARSE = 0.015
"""Of a card's bandwidth, if an entry (one active feature of a token, one dimension) counts 4 bytes: a step of 2,048 tokens
at d 4,096, m 65,536, k 64 took 47 ms; 5 are the encoder's product, 7 the rows, 6 the weights, 29 the sparse products."""
ROWS = 5e9
"""Bytes of float32 rows per second that the store gathers from mapped shards on the host."""
DISK = 1e9
"""Bytes per second that are written to a local disk."""


@dataclass(frozen=True)
class Devices:
    """So many devices of one kind, each of which runs one process."""

    name: str
    count: int
    memory: float
    rates: Rates
    is_listed: bool = True
    """Whether it is a card of the table, and its rates are those of the table."""
    is_cpu: bool = False

    def times(self, factor: int) -> Devices:
        """So many times as many of them."""
        return replace(self, count=self.count * factor)

    def __str__(self) -> str:
        return self.name if self.count == 1 else f"{self.count} x {self.name}"


def read_devices(text: str) -> tuple[int, str]:
    """(how many, which card) of H100, 8xH100 or 4x8xH100. InputError where the form or the card is not known."""
    found = re.fullmatch(r"((?:\d+\s*[x×*]\s*)*)([A-Za-z0-9][\w-]*)", text.strip())
    known = {name.casefold(): name for name in CARDS} | {name.casefold(): card for name, card in ALIASES.items()}
    if found is None or found[2].casefold() not in known:
        raise InputError(
            f"--devices {text} is not known; write H100, 8xH100 or 4x8xH100 with one of the cards {', '.join(CARDS)}, or "
            "leave it out to time this machine."
        )
    count = 1
    for number in re.findall(r"\d+", found[1]):
        count *= int(number)
    if not count:
        raise InputError(f"--devices {text} are no devices; write 1 or more.")
    return count, known[found[2].casefold()]


def devices_of_card(text: str, dtype: str) -> Devices:
    """Devices of the table, with rates for a run in a precision."""
    count, name = read_devices(text)
    return Devices(name, count, CARDS[name].memory, rates_of_card(CARDS[name], dtype))


def rates_of_card(card: Card, dtype: str) -> Rates:
    """The measured shares of a card's peaks. Ablations in bfloat16 were not measured: they count as a forward does."""
    products = FLOAT32 * card.fp32 if dtype == "float32" else FORWARD * card.bf16
    return Rates(
        forward=products,
        harvest=products,
        ablation=products,
        gradient=GRADIENT * products,
        encode=ENCODE * card.fp32,
        train=FORWARD * card.bf16,
        sparse=SPARSE * card.bandwidth,
        weights=card.bandwidth,
        rows=ROWS,
        disk=DISK,
        calls=1 / CALL,
    )
