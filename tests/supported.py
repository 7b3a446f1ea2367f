"""Writes ``docs/supported.md``, the list of what is read, from what the tests read: ``python -m tests.supported``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from rmscope.pairs.pair import SIDES
from tests.model.small import DECODERS, ENCODERS, HYBRIDS, OTHERS
from tests.model.test_blocks import TRUNKS
from tests.model.test_checkpoint import HEADS
from tests.model.test_own_forward import COMPANY, READS
from tests.pairs.sets import SETS, DataSet
from tests.sae.sources import ROWS, SOURCES, SaeSource

PAGE = Path(__file__).parents[1] / "docs" / "supported.md"
HEAD = """# What is supported

`python -m tests.supported` writes this page from what the tests read, and a test checks that it is current.
"""
OWN_META = ("source", "line")
"""What every pair has in ``meta``."""


def data_sets() -> str:
    """The section on datasets: one row for each small file of the tests."""
    rows = [_data_set_row(data_set) for data_set in SETS]
    head = ("dataset", "read as", "the better response", "left out in the test file", "kept in `meta`", "test file")
    return "\n".join(
        [
            "## Datasets",
            "",
            "Each is recognised by its columns; `--format` names another one. The test file has the layout of the dataset,",
            "and text made for the test. [Use my own data](howto/own_data.md) tells the rules.",
            "",
            _table_row(head),
            "|" + "---|" * len(head),
            *map(_table_row, rows),
        ]
    )


def _data_set_row(data_set: DataSet) -> tuple[str, ...]:
    pairs, report = data_set.read()
    name = data_set.name + (f" (`{data_set.hub}`)" if data_set.hub else "")
    left_out = "; ".join(dict.fromkeys(reason for _, reason in report.skipped))
    meta = list(dict.fromkeys(key for pair in pairs for key in pair.meta if key not in OWN_META))
    sides = [key.removesuffix("_chosen") for key in meta if key.removesuffix("_chosen") + "_rejected" in meta]
    rest = [key for key in meta if key not in {f"{name}_{side}" for name in sides for side in SIDES}]
    kept = [f"`{key}`" for key in rest] + [f"`{key}_chosen`, `…_rejected`" for key in sides]
    return name, f"`{report.format}`", data_set.better, left_out, ", ".join(kept), f"`{data_set.file}`"


def sae_sources() -> str:
    """The section on SAEs: one row for each layout of the tests."""
    head = ("source", "files", "opens as", "site in the test file", "features equal")
    return "\n".join(
        [
            "## SAEs",
            "",
            "A small SAE in the layout of each is opened. Its features and reconstruction are compared on",
            f"{ROWS} rows with the source's own equations, written plainly. [Bring an SAE](howto/bring_sae.md) tells what",
            "is refused.",
            "",
            _table_row(head),
            "|" + "---|" * len(head),
            *(_table_row(_sae_row(source)) for source in SOURCES),
        ]
    )


def _sae_row(source: SaeSource) -> tuple[str, ...]:
    with TemporaryDirectory() as folder:
        equal = source.compare(Path(folder))
    name = source.name + (f" (`{source.hub}`)" if source.hub else "")
    return name, source.files, source.family, f"`{source.site}`" if source.site else "must be given", f"{equal} of {ROWS}"


def _table_row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"


def pms() -> str:
    """The section on PMs: the architectures and the heads that the tests try."""
    architectures = [
        (DECODERS, "rewards, gradients and ablations by the fast ways"),
        (list(OTHERS), "the same, each text in a row of its own"),
        (
            list(HYBRIDS),
            "rewards, gradients and ablations; the blocks after a site run alone, on whole texts (recurrent layers)",
        ),
        (
            [*ENCODERS, *TRUNKS, "bart"],
            "the same, most by the model's own forward from the site on (of an encoder-decoder in the decoder)",
        ),
        (["phi3 with longrope"], "texts beyond the short frequencies run alone"),
        (list(COMPANY), "each text runs alone, because padding changes its reward"),
        (["xlnet", "funnel"], "rewards alone: no stream that can be studied"),
    ]
    heads = [
        ("`score`, `classifier`", "transformers' sequence classification, whatever config.json calls the model"),
        (
            ", ".join(f"`{name}`" for name in HEADS[:-1]) + ", or any other name",
            "a weight `[1, d]` outside the blocks, with its bias, at the last token",
        ),
        ("`value_head.safetensors`", "beside the model or the adapter (LLaMA-Factory)"),
        ("`normalize_reward`, `mean`, `std` in the config", "followed"),
        ("the logits of two answers of a causal LM", "`--judge ' yes, no'`, after `--question`"),
        ("code of its own that gives: " + ", ".join(READS), "its own forward, with `--trust-remote-code`"),
    ]
    return "\n".join(
        [
            "## PMs",
            "",
            "Each is tried with a small random model. Its rewards are those of transformers' own forward on each text",
            "alone. [Every class of transformers](reference/architectures.md) was tried with the same checks.",
            "",
            _table_row(("architecture", "what works")),
            "|---|---|",
            *(_table_row((", ".join(names), what)) for names, what in architectures),
            "",
            _table_row(("head", "how it is read")),
            "|---|---|",
            *map(_table_row, heads),
        ]
    )


SECTIONS: tuple[Callable[[], str], ...] = (pms, data_sets, sae_sources)
"""The sections of the page, in order."""


def page() -> str:
    return "\n".join([HEAD, *("\n\n".join(section() for section in SECTIONS)).splitlines(), ""])


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
