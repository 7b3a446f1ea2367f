"""harvest and train: activations of a PM, and SAEs on them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError

from rmscope.cli.base import (
    Adapter,
    BadRow,
    Columns,
    Data,
    Debug,
    Device,
    Dtype,
    Format,
    Json,
    Limit,
    Model,
    Output,
    Trust,
    app,
    columns_of,
    emit,
    pm_options,
    print_rows,
    print_table,
)
from rmscope.cli.terminal import Bars
from rmscope.errors import InputError
from rmscope.sae.config import SaeConfig

if TYPE_CHECKING:
    from rmscope.model.reward_model import RewardModel
    from rmscope.pairs.pair import Pair

SWEPT = ("k", "l1", "l0")
"""Settings that take several values, comma-separated: an SAE each, all trained from one reading."""
KINDS = {"d_sae": int, "lr": float, "batch_size": int, "tokens": int, "epochs": int, "seed": int, "amp": bool}
"""The types shown for the flags people set most; all others are checked by the settings themselves."""
Sites = Annotated[str | None, typer.Option(help="Sites, comma-separated; left out, about one and two thirds of the depth.")]
AllPairs = Annotated[bool, typer.Option("--all-pairs", help="Every pair, not the fit split of the prompts alone.")]


@app.command()
def harvest(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder for the activations.")],
    sites: Sites = None,
    limit: Limit = None,
    all_pairs: AllPairs = False,
    on_bad_row: BadRow = None,
    columns: Columns = None,
    form: Format = None,
    adapter: Adapter = None,
    output: Output = None,
    trust_remote_code: Trust = False,
    device: Device = "auto",
    dtype: Dtype = "float32",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """The residual stream at some sites, written to disk for training SAEs."""
    from rmscope.activations.harvest import harvest as run_harvest

    pairs = _load_pairs(data, limit, on_bad_row, columns, form, all_pairs)
    rm, pairs = _load(model, pairs, pm_options(dtype, device, adapter, output, trust_remote_code))
    with Bars().stage("harvest") as progress:
        store = run_harvest(rm, pairs, _sites(rm, sites), out, progress)
    tokens = {site: store.tokens(site) for site in store.sites}
    print_rows(f"activations in {out}", {"pairs": len(pairs), **{f"tokens at {s}": n for s, n in tokens.items()}})
    emit({"out": str(out), "pairs": len(pairs), "tokens": tokens}, as_json)


def sae_flags(command: Callable[..., None]) -> Callable[..., None]:
    """The command with a flag for every setting of an SAE's training in place of its argument ``settings``."""

    @wraps(command)
    def flagged(**given: Any) -> None:
        settings = {name: given.pop(name) for name in SaeConfig.model_fields}
        command(**given, settings={name: value for name, value in settings.items() if value is not None})

    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "settings"]
    for name, described in SaeConfig.model_fields.items():
        several = " Several, comma-separated, make a sweep." if name in SWEPT else ""
        option = typer.Option(help=(described.description or "") + several)
        kind = Annotated[KINDS.get(name, str) | None, option]  # type: ignore[valid-type]
        own.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind))
    flagged.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    )
    flagged.__annotations__ = {p.name: p.annotation for p in own}
    return flagged


@app.command()
@sae_flags
def train(
    settings: dict[str, Any],
    out: Annotated[Path, typer.Option(help="Folder for the SAEs, one subfolder a site.")],
    store: Annotated[Path | None, typer.Argument(help="Activations from rmscope harvest; left out, the PM streams.")] = None,
    model: Annotated[str | None, typer.Option(help="The PM: to stream from, or for --reward-aware.")] = None,
    data: Annotated[str | None, typer.Option(help="Pairs: to stream, or for --reward-aware.")] = None,
    sites: Sites = None,
    reward_aware: Annotated[
        int | None, typer.Option(help="Then fine-tune for so many steps on what the SAE does to the reward difference.")
    ] = None,
    weight: Annotated[float, typer.Option(help="Weight of the rewards in that.")] = 1.0,
    limit: Limit = None,
    all_pairs: AllPairs = False,
    on_bad_row: BadRow = None,
    columns: Columns = None,
    form: Format = None,
    adapter: Adapter = None,
    output: Output = None,
    trust_remote_code: Trust = False,
    device: Device = "auto",
    dtype: Dtype = "float32",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """SAEs on stored or streamed activations, several settings from one reading; --reward-aware fine-tunes them."""
    from rmscope.activations.store import ActivationStore
    from rmscope.activations.stream import stream
    from rmscope.sae import train_saes

    named = sweep(settings)
    if (store is None or reward_aware) and not (model and data):
        what = "--reward-aware" if reward_aware else "Training without a folder of activations"
        raise InputError(f"{what} needs the PM and pairs; give --model and --data.")
    source: Any = None
    if model and data:
        options = pm_options(dtype, device, adapter, output, trust_remote_code)
        rm, pairs = _load(model, _load_pairs(data, limit, on_bad_row, columns, form, all_pairs), options)
        source = stream(rm, pairs, _sites(rm, sites)) if store is None else None
    source = source or ActivationStore.open(store)  # type: ignore[arg-type]
    chosen = sites.split(",") if sites else source.sites
    with Bars().stage("train") as progress:
        place = rm.device.type if model and data else "cpu"
        saes = train_saes(source, named, out, chosen, progress, place)
    folders = [out / site / name for site, name in saes]
    if reward_aware:
        from rmscope.evaluation.reward_aware import RewardAwareConfig, fine_tune

        tuning = RewardAwareConfig(steps=reward_aware, weight=weight)
        for (site, name), sae in saes.items():
            with Bars().stage("fine-tune") as progress:
                fine_tune(rm, sae, pairs, tuning, named[name], out / "reward-aware" / name, progress)
            folders.append(out / "reward-aware" / name / site)
    _tell(folders, out, as_json)


def sweep(settings: dict[str, Any]) -> dict[str, SaeConfig]:
    """The settings of each SAE by name, such as ``k16``; one nameless without a sweep. InputError names the bad flag."""
    several = {name: str(settings[name]).split(",") for name in SWEPT if name in settings}
    fixed = {name: value for name, value in settings.items() if name not in several}
    if "prefixes" in fixed:
        fixed["prefixes"] = fixed["prefixes"].split(",")
    made = {}
    for values in product(*several.values()):
        chosen = dict(zip(several, values, strict=True))
        name = "_".join(f"{key}{value}" for key, value in chosen.items() if len(several[key]) > 1)
        try:
            made[name] = SaeConfig(**fixed, **chosen)
        except ValidationError as error:
            first = error.errors()[0]
            flag = str(first["loc"][0]).replace("_", "-")
            raise InputError(f"--{flag} {first['input']}: {first['msg'].lower()}.") from error
    return made


def _sites(rm: RewardModel, sites: str | None) -> list[str]:
    return sites.split(",") if sites else rm.default_sites


def _load_pairs(
    data: str, limit: int | None, on_bad_row: str | None, columns: str | None, form: str | None, every: bool
) -> list[Pair]:
    """The pairs of the fit split, or all."""
    from rmscope.pairs.pair import split_of
    from rmscope.pairs.readers import load_pairs

    pairs = load_pairs(
        data,
        limit=limit,
        columns=columns_of(columns),
        form=form,
        on_bad_row=on_bad_row or "error",  # type: ignore[arg-type]
    )
    return [p for p in pairs if every or split_of(p) == "fit"]


def _load(model: str, pairs: list[Pair], options: dict[str, Any]) -> tuple[RewardModel, list[Pair]]:
    """The PM, and those pairs that its context takes."""
    from rmscope.model.reward_model import RewardModel

    rm = RewardModel.load(model, **options)
    kept = [p for p, t in zip(pairs, rm.tokenize_all(pairs), strict=True) if rm.fits(t)]
    if not kept:
        raise InputError(
            f"None of the {len(pairs)} pairs of the fit split fits the PM's context of {rm.context} tokens; give shorter "
            "texts, or --all-pairs where the data are few."
        )
    return rm, kept


def _tell(folders: list[Path], out: Path, as_json: bool) -> None:
    """The last figures of each training: on the terminal, and as the result."""
    import polars as pl

    rows = []
    for folder in folders:
        last = pl.read_parquet(folder / "training.parquet").row(-1, named=True)
        shown = {name: last[name] for name in ("fvu", "l0", "dead", "damage") if last.get(name) is not None}
        rows.append({"sae": str(folder.relative_to(out)), **shown})
    print_table(f"SAEs in {out}, figures on the last batch", pl.DataFrame(rows, infer_schema_length=None))
    emit({"out": str(out), "saes": rows}, as_json)
