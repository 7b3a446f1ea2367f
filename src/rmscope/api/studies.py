"""The studies as functions: a run (or a PM) and settings by name; each gives a typed result.

Every result has ``summary()`` (one line), ``tables()`` and ``show()`` (its page, inline in a notebook).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rmscope.io import Display, NoDisplay
from rmscope.run.run import Run
from rmscope.settings import read_settings
from rmscope.studies.audit import analyse as audit_study
from rmscope.studies.audit.result import AuditResult
from rmscope.studies.audit.settings import AuditConfig
from rmscope.studies.compare import analyse as compare_study
from rmscope.studies.compare.result import CompareResult
from rmscope.studies.compare.settings import CompareConfig
from rmscope.studies.edit import analyse as edit_study
from rmscope.studies.edit import gate as gate_study
from rmscope.studies.edit.result import EditResult, GateResult
from rmscope.studies.edit.settings import EditConfig, GateConfig
from rmscope.studies.evaluate import analyse as evaluate_study
from rmscope.studies.evaluate.result import EvaluateResult
from rmscope.studies.evaluate.settings import EvaluateConfig
from rmscope.studies.experiment import analyse as experiment_study
from rmscope.studies.experiment.result import ExperimentResult
from rmscope.studies.experiment.settings import ExperimentConfig
from rmscope.studies.export import analyse as export_study
from rmscope.studies.export.result import ExportResult
from rmscope.studies.export.settings import ExportConfig
from rmscope.studies.jailbreak import analyse as jailbreak_study
from rmscope.studies.jailbreak.result import JailbreakResult
from rmscope.studies.jailbreak.settings import JailbreakConfig
from rmscope.studies.label import analyse as label_study
from rmscope.studies.label.result import LabelResult
from rmscope.studies.label.settings import LabelConfig
from rmscope.studies.sufficiency import analyse as sufficiency_study
from rmscope.studies.sufficiency.result import SufficiencyResult
from rmscope.studies.sufficiency.settings import SufficiencyConfig


def jailbreak(run: Run, **settings: Any) -> JailbreakResult:
    """Completions that fool the run's PM, and what carries them. Settings: :class:`JailbreakConfig`."""
    return jailbreak_study.analyse(run, read_settings(JailbreakConfig, None, settings))


def sufficiency(run: Run, **settings: Any) -> SufficiencyResult:
    """What each reported feature does when it is put in. Settings: :class:`SufficiencyConfig`."""
    return sufficiency_study.analyse(run, read_settings(SufficiencyConfig, None, settings))


def label(run: Run, **settings: Any) -> LabelResult:
    """Names of a run's concepts by a language model, and tests of them. Settings: :class:`LabelConfig`."""
    return label_study.analyse(run, read_settings(LabelConfig, None, settings))


def export(run: Run, **settings: Any) -> ExportResult:
    """What a run found, for Neuronpedia, as tables, pages, or a hub repo. Settings: :class:`ExportConfig`."""
    return export_study.analyse(run, read_settings(ExportConfig, None, settings))


def experiment(run: Run | None, file: str, **settings: Any) -> ExperimentResult:
    """A hypothesis tested on a run, or (run None, ``model=``) on a PM alone. Settings: :class:`ExperimentConfig`."""
    config = read_settings(ExperimentConfig, None, {"file": file, **settings})
    return experiment_study.analyse(config, _display(run), run)


def evaluate(run: Run | None = None, **settings: Any) -> EvaluateResult:
    """SAEs side by side on held-out pairs, of a run or brought. Settings: :class:`EvaluateConfig`."""
    return evaluate_study.analyse(read_settings(EvaluateConfig, None, settings), _display(run), run)


def compare(run: Run, other: Run | str | Path, **settings: Any) -> CompareResult:
    """Two PMs on the same fresh pairs; ``other`` is a run, its folder, a PM, a patch or a base.

    Settings: :class:`CompareConfig`.
    """
    name = str(other.folder if isinstance(other, Run) else other)
    config = read_settings(CompareConfig, None, {"other": name, **settings})
    return compare_study.analyse(run, config, other if isinstance(other, Run) else None)


def edit(run: Run, **settings: Any) -> EditResult:
    """A patch that edits features of the run's PM. Settings: :class:`EditConfig`."""
    return edit_study.analyse(run, read_settings(EditConfig, None, settings))


def gate(base: str, new: str, display: Display | None = None, **settings: Any) -> GateResult:
    """Whether the reward of a named concept moved between two PMs. Settings: :class:`GateConfig`."""
    config = read_settings(GateConfig, None, {"base": base, "new": new, **settings})
    return gate_study.analyse_gate(config, display or NoDisplay())


def audit(display: Display | None = None, **settings: Any) -> AuditResult:
    """Plants biases, trains a PM on them, and counts what a run finds. Settings: :class:`AuditConfig`."""
    return audit_study.analyse(read_settings(AuditConfig, None, settings), display or NoDisplay())


def _display(run: Run | None) -> Display:
    return run.display if run is not None else NoDisplay()
