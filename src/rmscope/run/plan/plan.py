"""Plans a run: sizes of the PM and the pairs, rates of the devices, and from both what each stage takes.

1. The PM's sizes come from its config.json alone where the plan is for cards of the table; else it is loaded.
2. The lengths of the pairs are counted as a run counts them, or given.
3. The rates are those of the table, or measured here: some batches of pairs, a short text, a step of SAE training.
4. Each stage's work is counted (``stages.py``), and each change of the run that may help is planned again.
"""

from __future__ import annotations

from collections.abc import Sequence

from rmscope.errors import InputError
from rmscope.hardware import memory
from rmscope.io import Display, NoDisplay, local_path
from rmscope.model.checks import Check, verdict
from rmscope.model.loading import load_tokenizer
from rmscope.model.rendering import NO_LIMIT, PairTokens, Rendering, tokenize_sides
from rmscope.model.reward_model import RewardModel
from rmscope.model.site_names import is_difference, needs_base
from rmscope.pairs.demo import plain_demo_pairs
from rmscope.run.inputs import Inputs, PairSet
from rmscope.run.plan.cards import Devices, devices_of_card, read_devices
from rmscope.run.plan.case import Case
from rmscope.run.plan.changes import Setup, best_change, tried
from rmscope.run.plan.memory import model_bytes
from rmscope.run.plan.rates import measured_rates
from rmscope.run.plan.result import ChangePlan, Plan, StagePlan, size
from rmscope.run.plan.settings import PlanConfig
from rmscope.run.plan.shape import Lengths, shape_from_config, shape_of
from rmscope.run.plan.stages import FORMULAS
from rmscope.run.settings import RunConfig
from rmscope.run.size import SIZES

PRICED = 1000
"""Pairs of the run that ``doctor`` tells the price of."""


def make_plan(config: PlanConfig, display: Display | None = None) -> Plan:
    """The plan of a run.

    Raises:
        InputError: the card is not known, the PM has no config.json or needs its weights to be timed, or its pairs cannot
            be counted.
    """
    display, run = display or NoDisplay(), config.run_config()
    if config.devices is None:
        if _has_no_weights(config.model):
            raise InputError(
                f"{config.model} holds no weights, so it cannot be timed here; name cards with --devices 8xH100."
            )
        inputs = Inputs(run)
        with display.stage("time"):
            return told(_on_this_machine(config, run, inputs), config)
    read_devices(config.devices)
    if config.model.startswith("zoo:"):
        inputs = Inputs(run)
        pm, data = shape_of(inputs.rm, config.base is not None), _lengths(config, run, inputs)
    else:
        pm, data = shape_from_config(run), _lengths(config, run, None)
    return told(Setup(Case(run, pm, data), devices_of_card(config.devices, run.dtype)), config)


def _on_this_machine(config: PlanConfig, run: RunConfig, inputs: Inputs) -> Setup:
    data, rm = _lengths(config, run, inputs), inputs.rm
    tokens = inputs.scored.tokens if config.data and not config.pairs else rm.tokenize_all(plain_demo_pairs())
    case = Case(run, shape_of(rm, config.base is not None), data)
    return Setup(case, timed(rm, case, [t for t in tokens if rm.fits(t)]))


def timed(rm: RewardModel, case: Case, tokens: Sequence[PairTokens]) -> Devices:
    """This machine's device, its rates measured."""
    part = max(case.trained, key=case.features, default="")
    m = case.features(part) if part else SIZES[0]
    sae = case.config.sae
    if part and is_difference(part):
        sae = case.config.difference_config(sae, m)
    rates = measured_rates(rm, case.pm, tokens, sae, m)
    return Devices(str(rm.device), 1, memory(str(rm.device)), rates, is_listed=False, is_cpu=rm.device.type == "cpu")


def _has_no_weights(model: str) -> bool:
    folder = local_path(model)
    kinds = ("*.safetensors", "*.bin", "*.gguf", "*.index.json", "rmscope.json")
    return (folder / "config.json").is_file() and not any(True for kind in kinds for _ in folder.glob(kind))


def _lengths(config: PlanConfig, run: RunConfig, inputs: Inputs | None) -> Lengths:
    """The pairs: as they are given, or counted. Without the PM its tokenizer alone counts them."""
    if config.pairs and config.tokens:
        return Lengths.of_numbers(run, config.pairs, config.tokens, config.shared)
    if inputs is not None:
        return Lengths.of(inputs.scored, run)
    pairs = Inputs(run).all_pairs
    try:
        options = {"revision": run.revision, "trust_remote_code": run.trust_remote_code}
        tokenizer = load_tokenizer(str(local_path(run.model)) if local_path(run.model).is_dir() else run.model, options)
    except InputError as error:
        raise InputError(
            f"The tokens of {run.data} cannot be counted, as {run.model} has no tokenizer here; give --pairs and --tokens."
        ) from error
    tokens = tokenize_sides(Rendering.find(local_path(run.model), tokenizer), tokenizer, pairs, run.max_tokens or NO_LIMIT)
    kept = [i for i, t in enumerate(tokens) if t.longest <= (run.max_tokens or NO_LIMIT)]
    if not kept:
        raise InputError(f"No pair of {run.data} has sides of at most {run.max_tokens} tokens; raise max_tokens.")
    return Lengths.of(PairSet(pairs, tokens).only(kept), run)


def told(setup: Setup, config: PlanConfig) -> Plan:
    """The plan in figures."""
    case, alone = setup.case, tried(setup)
    best = best_change(setup, alone)
    amounts = {name: formula(case).work for name, formula in FORMULAS.items()}
    stages = [
        StagePlan(stage=name, flops=w.flops, seconds=setup.seconds(name), disk=w.disk, memory=setup.bytes(name))
        for name, w in amounts.items()
    ]
    return Plan(
        model=config.model,
        data=config.data,
        pairs=case.data.scored,
        studied=case.data.studied,
        tokens=case.data.side,
        devices=str(setup.devices),
        measured=config.devices is None,
        sites=case.sites,
        sites_assumed=not case.config.sites and any(map(needs_base, case.sites)),
        features=[case.of_site(site) for site in case.sites],
        stages=stages,
        seconds=setup.total_seconds,
        flops=sum(s.flops for s in stages),
        disk=sum(s.disk for s in stages),
        memory=setup.peak,
        model_memory=model_bytes(case, setup.devices.is_cpu),
        device_memory=setup.devices.memory,
        fits=setup.fits,
        best=None if best is None else _change(*best),
        changes=[_change(*found) for found in alone],
    )


def _change(name: str, setup: Setup) -> ChangePlan:
    return ChangePlan(change=name, seconds=setup.total_seconds, memory=setup.peak, fits=setup.fits)


def price(rm: RewardModel, tokens: Sequence[PairTokens]) -> Check:
    """Time and memory of a run on a thousand pairs like these, for ``rmscope doctor``."""
    if not rm.sites:
        return Check("cost", "ok", "it cannot be studied, so only scores have a price")
    side = sum(t.chosen.numel() + t.rejected.numel() for t in tokens) / (2 * len(tokens))
    shared = sum(t.shared for t in tokens) / len(tokens) / side
    run = RunConfig(model=rm.name, data="", out=".", dtype=str(rm.dtype)[6:])  # type: ignore[arg-type]
    case = Case(run, shape_of(rm), Lengths.of_numbers(run, PRICED, side, shared))
    setup = Setup(case, timed(rm, case, tokens))
    whole = "" if rm.capabilities.resume else ", most of it for ablations"
    minutes = setup.total_seconds / 60
    detail = f"a run on {PRICED:,} such pairs takes about {minutes:.2g} minutes{whole}, and {size(setup.peak)} of "
    detail += f"{size(setup.devices.memory)}"
    mend = "use --dtype bfloat16, which halves the weights, or a machine with more memory"
    return verdict("cost", setup.fits, detail, mend)
