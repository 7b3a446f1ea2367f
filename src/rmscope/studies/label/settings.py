"""Settings of the names that a language model gives."""

from __future__ import annotations

from urllib.parse import urlsplit

from pydantic import Field, field_validator

from rmscope.settings import Numbers, Settings

LEAST_SCORE = 0.7
"""The score below which a name counts as unsure, unless the settings say another."""


class LabelConfig(Settings):
    """A language model names the reported concepts of a run and is tested on it: does the name tell on which texts a concept
    fires (detection), and on which tokens (fuzzing)? Do texts written from the name alone make it fire, and move the reward
    as its effect says?

    Names, scores and what they cost are kept in the run folder; concepts that are done are skipped.
    """

    llm: str
    """The language model: its name at the endpoint, or, without an endpoint, a folder or hub id for transformers."""
    endpoint: str | None = None
    """The address of a server that speaks OpenAI's chat protocol, such as http://localhost:8000/v1."""
    key_variable: str = "OPENAI_API_KEY"
    """The environment variable that holds the server's key; it is sent to the endpoint alone and written nowhere."""
    concepts: Numbers | None = None
    """The numbers of some concepts; left out, all reported ones."""
    shown: int = Field(16, ge=2)
    """Passages that the model sees of a concept."""
    scored: int = Field(20, ge=4)
    """Passages for each of the two scores, half of them right."""
    prompts: int = Field(12, ge=0)
    """Prompts to which a reply is written with the name, and one without; 0: none."""
    timeout: float = Field(120, gt=0)
    """Seconds to wait for an answer."""
    retries: int = Field(5, ge=0)
    """How often a question is asked again after a time-out, a rate limit or an error of the server."""
    parallel: int = Field(4, ge=1)
    """Questions that an endpoint is asked at once."""
    price_in: float | None = Field(None, ge=0)
    """What a million tokens of questions cost, to tell the costs."""
    price_out: float | None = Field(None, ge=0)
    """What a million tokens of answers cost."""
    again: bool = False
    """Name concepts again that this model has named."""

    @field_validator("endpoint")
    @classmethod
    def _endpoint_is_an_address(cls, given: str | None) -> str | None:
        if given is not None and not given.startswith(("http://", "https://")):
            raise ValueError("it is no address; write one such as http://localhost:8000/v1")
        if given is not None and ("@" in urlsplit(given).netloc or urlsplit(given).query):
            raise ValueError("it holds a password or a query; put the key into an environment variable (--key-variable)")
        return given
