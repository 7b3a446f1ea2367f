"""What a run found as Neuronpedia imports it, and as SAEDashboard hands it over.

Field names, types and folders are those of two public repositories:

- hijohnnylin/neuronpedia: the tables Model, SourceRelease, SourceSet, Source, Neuron, Activation and Explanation of
  ``apps/webapp/prisma/schema.prisma`` at commit 008d5040ab97abd5c44d92d190b30034ad7a6e97, and the layout that
  ``utils/neuronpedia-utils/neuronpedia_utils/export-data.py`` writes at commit 1a80fe9b493b90fd521c9437726d0c82c7677917
  (docs.neuronpedia.org, Exports): ``MODEL/SOURCE/`` with ``features``, ``activations`` and ``explanations``, each of
  ``batch-N.jsonl.gz``, and ``model``, ``release``, ``sourceset`` and ``source`` ``.jsonl``. A column that is left out takes
  its default there. All lines of a file have the same keys: the importer reads them from the first.
- jbloomAus/SAEDashboard: the batches of ``sae_dashboard/neuronpedia/neuronpedia_dashboard.py`` with ``vector`` and
  ``sae_id_suffix``, as ``neuronpedia_export.py`` reads them at commit 3ea1249ac0e31c3f8433c6c270c40d4e3bec9169.

A site of the run is a source. Its features have the run's numbers, and their activations are in the stream's own units.
What is not measured (logits, correlated neurons) is an empty list. The tables have no field for effects on reward, so they
are in the ``notes`` of explanations.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from rmscope.io import Progress
from rmscope.run.firings import SiteFirings
from rmscope.run.run import Run
from rmscope.studies.export.settings import ExportConfig
from rmscope.studies.export.sources import Row, SiteRows, Source, explanations, features_at, hook_of
from rmscope.studies.export.texts import public_name, slug
from rmscope.studies.label.names import NamedConcept

BATCH = 1024
"""Features, or explanations, of a file."""
UPLOAD = "saedashboard"
"""The folder of SAEDashboard's batches, beside that of the model."""
T = TypeVar("T")


def export_neuronpedia(
    run: Run, config: ExportConfig, concepts: Sequence[NamedConcept], folder: Path, progress: Progress
) -> None:
    """Writes every site of a run to ``folder``."""
    model = config.model_id or slug(public_name(run.config.model))
    for done, site in enumerate(run.sites):
        progress(done, len(run.sites), "sites")
        firings = SiteFirings(run.store, run.saes[site], site)
        features = set(run.features(site)["feature"].to_list())
        features.update(j for concept in concepts for j in features_at(concept.row, site))
        if config.all_features:
            features.update(firings.features())
        source = Source(site, model)
        _export_site(SiteRows(run, config, source, firings), sorted(features), folder)
        rows = list(explanations(source, config.creator_id, concepts))
        for number, batch in enumerate(_batches(rows)):
            _write_lines(folder / model / source.id / "explanations" / f"batch-{number}.jsonl.gz", batch)
    progress(len(run.sites), len(run.sites), "sites")


def _export_site(rows: SiteRows, features: Sequence[int], folder: Path) -> None:
    source = rows.source
    place = folder / source.model / source.id
    for name, row in rows.metadata().items():
        _write_lines(place / f"{name}.jsonl", [row])
    for number, batch in enumerate(_batches(features)):
        shown = {j: rows.firings.firing_texts(j) for j in batch}
        file, activations = f"batch-{number}.jsonl.gz", [rows.activation(j, text) for j in batch for text in shown[j]]
        _write_lines(place / "features" / file, [rows.feature(j) for j in batch])
        _write_lines(place / "activations" / file, activations)
        upload = folder / UPLOAD / f"{source.model}_{source.set}_{hook_of(rows.sae, source.site, 0)}_{rows.sae.m}"
        _write(upload / f"batch-{number}.json", json.dumps(rows.dashboards(shown), allow_nan=False))


def _batches(items: Sequence[T]) -> list[list[T]]:
    return [list(items[start : start + BATCH]) for start in range(0, len(items), BATCH)]


def _write_lines(path: Path, rows: Sequence[Row]) -> None:
    """One JSON object on each line."""
    _write(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


def _write(path: Path, text: str) -> None:
    """A file, compressed where its name ends in .gz; the same text gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = text.encode("ascii")
    path.write_bytes(gzip.compress(content, 5, mtime=0) if path.suffix == ".gz" else content)
