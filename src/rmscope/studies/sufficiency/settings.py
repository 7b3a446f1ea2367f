"""Settings of the sufficiency study."""

from __future__ import annotations

from pydantic import Field

from rmscope.settings import Settings


class SufficiencyConfig(Settings):
    """Steers by each reported feature, inserts text that fires it, and ablates it, all on fresh prompts.

    Says which features move the reward when they are put in, and why the others do not.
    """

    site: str | None = None
    """One site, such as resid_post.7; left out, all sites of the run."""
    prompts: int = Field(24, ge=8)
    """Fresh prompts on which features are steered and sentences are inserted."""
