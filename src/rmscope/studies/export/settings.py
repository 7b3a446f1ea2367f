"""Settings of an export."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from rmscope.settings import Flag, Settings, comma_separated

Format = Literal["neuronpedia", "tables", "pages", "hub"]


class ExportConfig(Settings):
    """What a run found, for others. neuronpedia: features, activations and explanations as Neuronpedia imports them.
    tables: concepts, features, labels and names as CSV and Parquet. pages: the report and a page per reported concept, which
    open with no server. hub: the SAEs in SAELens' layout with a model card.

    Nothing leaves the machine without --push.
    """

    out: Path
    """The folder to write, with a subfolder per format; only an empty folder or an earlier export is replaced."""
    formats: Annotated[list[Format], BeforeValidator(comma_separated), Flag("--format")] = Field(min_length=1)
    """One or more of neuronpedia, tables, pages and hub, comma-separated."""
    all_features: bool = False
    """For neuronpedia: every feature that fires on stored tokens, not only those that were frozen or are in a concept."""
    model_id: str | None = None
    """For neuronpedia: the PM's id there; left out, made from its name."""
    creator: str = Field("rmscope", min_length=1)
    """For neuronpedia: the name of who made the SAEs."""
    creator_id: str = Field("clkht01d40000jv08hvalcvly", min_length=1)
    """For neuronpedia: the user that the rows belong to; left out, that of Neuronpedia's own importers."""
    licence: str = "unknown"
    """For hub: the licence of the SAEs, as the hub writes it, such as apache-2.0."""
    push: str | None = None
    """For hub: upload the folder to this repo, OWNER/NAME; left out, nothing is uploaded. The token is that of hf auth
    login, or in HF_TOKEN."""
    public: bool = False
    """For hub: a repo that is made for the upload is public; left out, it is private."""

    @field_validator("model_id")
    @classmethod
    def _is_an_id(cls, given: str | None) -> str | None:
        if given is not None and not re.fullmatch(r"[a-z0-9_-]{1,128}", given):
            raise ValueError("it is no id of a model; write at most 128 lower-case letters, digits, - and _")
        return given

    @field_validator("licence")
    @classmethod
    def _is_a_licence(cls, given: str) -> str:
        if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", given):
            raise ValueError("it is no licence as the hub writes them; write one such as apache-2.0")
        return given

    @field_validator("push")
    @classmethod
    def _is_a_repo(cls, given: str | None) -> str | None:
        if given is not None and not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", given):
            raise ValueError("it is no repo of the hub; write OWNER/NAME")
        return given

    @model_validator(mode="after")
    def _pushes_a_hub_folder(self) -> ExportConfig:
        if self.push and "hub" not in self.formats:
            raise ValueError("push uploads the folder of the format hub; add hub to the formats")
        return self
