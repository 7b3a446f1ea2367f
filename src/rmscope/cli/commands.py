"""All commands, in the order of the help: a name, its settings, the function that does it, a panel, the help."""

from __future__ import annotations

from rmscope.cli import step_settings as steps
from rmscope.cli.build import add_command
from rmscope.studies.audit.settings import AuditConfig
from rmscope.studies.compare.settings import CompareConfig
from rmscope.studies.edit.settings import EditConfig, GateConfig
from rmscope.studies.evaluate.settings import EvaluateConfig
from rmscope.studies.experiment.settings import ExperimentConfig
from rmscope.studies.jailbreak.settings import JailbreakConfig
from rmscope.studies.sufficiency.settings import SufficiencyConfig

START, STEPS, STUDIES, TRAINING = "Start here", "Single steps", "Studies", "Training"
IN_STEPS, IN_STUDIES = "rmscope.cli.steps:", "rmscope.studies."

add_command(
    "demo", steps.DemoConfig, IN_STEPS + "demo", START,
    "What the embedded PM with six planted biases rewards, with the truth beside it.",
)  # fmt: skip
add_command(
    "run", steps.RunCommandConfig, IN_STEPS + "run", START,
    "The whole pipeline on your own PM and pairs. After a kill, run the same command again: it resumes.",
    config_file="A YAML file of settings that flags override, or a run folder to resume.",
)  # fmt: skip
add_command(
    "doctor", steps.DoctorConfig, IN_STEPS + "doctor", START,
    "Checks a PM before it is studied: one row per check with ok, warn or fail, and how to mend it.",
)  # fmt: skip
add_command(
    "score", steps.ScoreConfig, IN_STEPS + "score", STEPS,
    "Rewards of both sides of every pair, and the accuracy with its interval beside the length-only baseline.",
)  # fmt: skip
add_command(
    "harvest", steps.HarvestConfig, IN_STEPS + "harvest", STEPS,
    "Writes the residual stream at some sites to disk, to train SAEs on.",
)  # fmt: skip
add_command(
    "train", steps.TrainConfig, IN_STEPS + "train", STEPS,
    "Trains SAEs on stored or streamed activations, several settings in one pass.",
)  # fmt: skip
add_command(
    "attribute", steps.AttributeConfig, IN_STEPS + "attribute", STEPS,
    "Estimates the ablation effect of every active feature from gradients.",
)  # fmt: skip
add_command(
    "ablate", steps.AblateConfig, IN_STEPS + "ablate", STEPS,
    "Measures exact ablation effects of features on pairs of a run's measure split.", on_run=True,
)  # fmt: skip
add_command(
    "ledger", steps.LedgerConfig, IN_STEPS + "ledger", STEPS,
    "Splits reward differences into features, error, remainder and gap: over a run's pairs, or in one pair.", on_run=True,
)  # fmt: skip
add_command(
    "rank", steps.RankConfig, IN_STEPS + "rank", STEPS,
    "Lists the frozen features of a run by what they do to the reward or to the preference, with their flags.", on_run=True,
)  # fmt: skip
add_command(
    "evaluate", EvaluateConfig, IN_STUDIES + "evaluate.analyse:analyse", STEPS,
    "Compares SAEs on held-out pairs: L0, FVU, dead features, and how much of the reward difference their splice keeps.",
)  # fmt: skip
add_command(
    "report", steps.ReportConfig, IN_STEPS + "report", STEPS,
    "Renders report.html again from what a finished run stored.", on_run=True,
)  # fmt: skip
add_command(
    "jailbreak", JailbreakConfig, IN_STUDIES + "jailbreak.analyse:analyse", STUDIES,
    "Builds completions that fool your own PM: phrases of its features, searched on some prompts, measured on others.",
    on_run=True,
)  # fmt: skip
add_command(
    "experiment", ExperimentConfig, IN_STUDIES + "experiment.analyse:analyse", STUDIES,
    "Tests a hypothesis: texts under named conditions, with and without features, and a verdict.",
)  # fmt: skip
add_command(
    "sufficiency", SufficiencyConfig, IN_STUDIES + "sufficiency.analyse:analyse", STUDIES,
    "Puts each reported feature in, by steering and by text, and says whether the reward moves.", on_run=True,
)  # fmt: skip
add_command(
    "compare", CompareConfig, IN_STUDIES + "compare.analyse:analyse", STUDIES,
    "Compares two PMs: which features both have, and which rewarded concepts appeared, vanished or changed.", on_run=True,
)  # fmt: skip
add_command(
    "edit", EditConfig, IN_STUDIES + "edit.analyse:analyse", STUDIES,
    "Suppresses, clamps or damps features of a PM, saves the patch for rs.load_edited, and shows what it changes.",
    on_run=True,
)  # fmt: skip
add_command(
    "gate", GateConfig, IN_STUDIES + "edit.gate:analyse_gate", STUDIES,
    "Fails (exit code 1) where the reward of a named concept moved by more than a bound between two PMs.",
)  # fmt: skip
add_command(
    "audit", AuditConfig, IN_STUDIES + "audit.analyse:analyse", STUDIES,
    "Plants biases, trains a PM on them, runs the pipeline without telling it, and counts what it finds.",
)  # fmt: skip
add_command(
    "train-pm", steps.TrainPmConfig, IN_STEPS + "train_pm", TRAINING,
    "Trains a PM by a recipe. After a kill, run the same command again: it resumes.",
)  # fmt: skip
