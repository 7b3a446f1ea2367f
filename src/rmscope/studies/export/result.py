"""What was exported, and what was, or would be, uploaded."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from rmscope.report.page import Page
from rmscope.report.result import Result, Rows
from rmscope.studies.export.pages import INDEX
from rmscope.studies.export.push import FileSize


class FormatExport(BaseModel):
    """A format's folder."""

    model_config = ConfigDict(extra="forbid")

    format: str
    folder: Path
    files: int
    bytes: int


class Upload(BaseModel):
    """The files for a hub repo."""

    model_config = ConfigDict(extra="forbid")

    repo: str | None
    """None where the settings name none."""
    files: list[FileSize]
    address: str | None
    """Where they were uploaded to; null where nothing was."""


class ExportResult(Result):
    """An export."""

    out: Path
    formats: list[FormatExport]
    upload: Upload | None
    """Null without the format hub."""

    def summary(self) -> str:
        told = f"{self.out} holds {', '.join(one.format for one in self.formats)}."
        if self.upload is None:
            return told
        size = sum(file.bytes for file in self.upload.files) / 1e6
        if self.upload.address is None:
            return f"{told} Nothing was uploaded; --push OWNER/NAME uploads {len(self.upload.files)} files, {size:,.1f} MB."
        return f"{told} Uploaded {len(self.upload.files)} files, {size:,.1f} MB: {self.upload.address}"

    def tables(self) -> dict[str, Rows]:
        exported = [{"format": one.format, "files": one.files, "MB": round(one.bytes / 1e6, 3)} for one in self.formats]
        tables: dict[str, Rows] = {"Exported": exported}
        if self.upload is not None:
            title = "Would be uploaded" if self.upload.address is None else f"Uploaded to {self.upload.repo}"
            tables[title] = [{"file": file.file, "MB": round(file.bytes / 1e6, 3)} for file in self.upload.files]
        return tables

    def page(self) -> Page | None:
        """The first of the exported pages."""
        path = self.out / "pages" / INDEX
        return Page(path.read_text("utf-8"), path) if any(one.format == "pages" for one in self.formats) else None
