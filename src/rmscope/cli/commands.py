"""All commands, in the order of the help."""

from __future__ import annotations

from rmscope.app.settings import ServeConfig
from rmscope.cli import step_settings as steps
from rmscope.cli.build import add_command
from rmscope.run.plan.settings import PlanConfig
from rmscope.settings import Settings
from rmscope.studies.audit.settings import AuditConfig
from rmscope.studies.compare.settings import CompareConfig
from rmscope.studies.edit.settings import EditConfig, GateConfig
from rmscope.studies.evaluate.settings import EvaluateConfig
from rmscope.studies.experiment.settings import ExperimentConfig
from rmscope.studies.export.settings import ExportConfig
from rmscope.studies.jailbreak.settings import JailbreakConfig
from rmscope.studies.label.settings import LabelConfig
from rmscope.studies.sufficiency.settings import SufficiencyConfig

Row = tuple[str, type[Settings], str, str]
PANELS: dict[str, list[Row]] = {
    "Start here": [
        ("demo", steps.DemoConfig, "cli.steps:demo", "What the embedded, biased PM rewards, beside the truth."),
        ("run", steps.RunCommandConfig, "cli.steps:run", "The pipeline on your own PM and pairs; run it again to resume."),
        ("serve", ServeConfig, "app.serve:serve", "A local web app: browse runs, name concepts, try texts on the PM."),
        ("doctor", steps.DoctorConfig, "cli.steps:doctor", "Checks a PM before it is studied, and says how to mend it."),
    ],
    "Single steps": [
        ("score", steps.ScoreConfig, "cli.steps:score", "Rewards of every pair, and accuracy beside length alone."),
        ("baseline", steps.BaselineConfig, "cli.steps:baseline", "What words, phrases and style explain without an SAE."),
        ("harvest", steps.HarvestConfig, "cli.steps:harvest", "Writes the residual stream at some sites to disk."),
        ("train", steps.TrainConfig, "cli.steps:train", "Trains SAEs on stored or streamed activations."),
        ("attribute", steps.AttributeConfig, "cli.steps:attribute", "Estimates each feature's effect."),
        ("ablate", steps.AblateConfig, "cli.steps:ablate", "Measures exact effects on a run's measure split."),
        ("ledger", steps.LedgerConfig, "cli.steps:ledger", "Splits Δr into features, error, remainder and gap."),
        ("rank", steps.RankConfig, "cli.steps:rank", "Lists a run's features by what they do."),
        ("evaluate", EvaluateConfig, "studies.evaluate.analyse:analyse", "Compares SAEs on held-out pairs."),
        ("report", steps.ReportConfig, "cli.steps:report", "Renders report.html again from what a finished run stored."),
    ],
    "Studies": [
        ("jailbreak", JailbreakConfig, "studies.jailbreak.analyse:analyse", "Builds completions that fool your PM."),
        ("experiment", ExperimentConfig, "studies.experiment.analyse:analyse", "Tests a hypothesis; gives a verdict."),
        ("sufficiency", SufficiencyConfig, "studies.sufficiency.analyse:analyse", "Puts each reported feature in."),
        ("compare", CompareConfig, "studies.compare.analyse:analyse", "Compares what two PMs reward."),
        ("edit", EditConfig, "studies.edit.analyse:analyse", "Damps features of a PM and saves the patch."),
        ("gate", GateConfig, "studies.edit.gate:analyse_gate", "Fails (exit code 1) where the reward of a concept moved."),
        ("label", LabelConfig, "studies.label.analyse:analyse", "Has a language model name concepts, and tests the names."),
        ("export", ExportConfig, "studies.export.analyse:analyse", "Writes a run as tables, pages, for Neuronpedia, a hub."),
        ("audit", AuditConfig, "studies.audit.analyse:analyse", "Plants biases, trains a PM, counts what a run finds."),
    ],
    "Training": [("train-pm", steps.TrainPmConfig, "cli.steps:train_pm", "Trains a PM by a recipe.")],
    "Planning": [
        ("plan", PlanConfig, "run.plan.plan:make_plan", "FLOPs, time, disk and memory of a run, before it is run."),
    ],
}  # fmt: skip
ON_RUN = {"ablate", "ledger", "rank", "report", "jailbreak", "sufficiency", "compare", "edit", "label", "export"}
"""Commands that take a run folder first."""
CONFIG_FILE = {
    "run": "A YAML file of settings that flags override, or a run folder to resume.",
    "plan": "A YAML file of a run's settings that flags override, or a run folder.",
}
SETTINGS = {name: settings for rows in PANELS.values() for name, settings, _, _ in rows}

for panel, rows in PANELS.items():
    for name, settings, function, text in rows:
        add_command(name, settings, f"rmscope.{function}", panel, text, name in ON_RUN, CONFIG_FILE.get(name, ""))
