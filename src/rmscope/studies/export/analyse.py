"""``rmscope export``: what a run found, in formats of others."""

from __future__ import annotations

from pathlib import Path

from rmscope.io import atomic_folder, check_replaceable, write_json
from rmscope.run.run import Run
from rmscope.studies.export.hub import export_hub
from rmscope.studies.export.neuronpedia import export_neuronpedia
from rmscope.studies.export.pages import export_pages
from rmscope.studies.export.push import check_token, files_of, push
from rmscope.studies.export.result import ExportResult, FormatExport, Upload
from rmscope.studies.export.settings import ExportConfig, Format
from rmscope.studies.export.tables import export_tables
from rmscope.studies.export.texts import public_name
from rmscope.studies.label.names import NamedConcept, named_concepts

MARK = "export.json"
"""The file that makes a folder an export."""


def analyse(run: Run, config: ExportConfig) -> ExportResult:
    """Writes the formats to subfolders of ``out``, which appears whole or not at all; uploads only where a repo is named.

    1. Check the output, the token of the hub, and that the run is finished.
    2. Name the concepts: by hand, by a language model, offline.
    3. Write each format.
    4. Upload the folder of the format hub to the repo, if the settings name one.

    Raises:
        InputError: the run is not finished, ``out`` holds something else, there is no token of the hub, or the hub refuses.
    """
    check_replaceable(config.out, MARK)  # 1
    if config.push:
        check_token()
    formats, made = list(dict.fromkeys(config.formats)), run.evidence.made
    concepts = named_concepts(run)  # 2
    with atomic_folder(config.out, MARK) as folder:  # 3
        for name in formats:
            _export(run, config, concepts, name, folder / name)
        write_json(folder / MARK, {"run": public_name(run.config.model), "made": made, "formats": formats})
    upload = _upload(config) if "hub" in formats else None  # 4
    return ExportResult(out=config.out, formats=[_format(config.out, name) for name in formats], upload=upload)


def _export(run: Run, config: ExportConfig, concepts: list[NamedConcept], name: Format, folder: Path) -> None:
    with run.display.stage(name) as progress:
        if name == "neuronpedia":
            export_neuronpedia(run, config, concepts, folder, progress)
        elif name == "tables":
            export_tables(run, concepts, folder)
        elif name == "pages":
            export_pages(run, concepts, folder)
        else:
            export_hub(run, config, concepts, folder)


def _format(out: Path, name: Format) -> FormatExport:
    sizes = [file.bytes for file in files_of(out / name)]
    return FormatExport(format=name, folder=out / name, files=len(sizes), bytes=sum(sizes))


def _upload(config: ExportConfig) -> Upload:
    folder = config.out / "hub"
    address = push(folder, config.push, config.public) if config.push else None
    return Upload(repo=config.push, files=files_of(folder), address=address)
