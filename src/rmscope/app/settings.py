"""Settings of ``rmscope serve``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from rmscope.settings import Argument, Settings


class ServeConfig(Settings):
    """A local web app: browse runs, name their concepts, look at their pairs, and try texts on their PM.

    It has no passwords. Anyone who can reach the address can read the runs and use the PM. By default only this machine can.
    """

    folder: Annotated[Path, Argument]
    """A run folder, or a folder of run folders."""
    host: str = "127.0.0.1"
    """The address to listen on. With 0.0.0.0 other machines can reach the app."""
    port: int = Field(8765, ge=0, le=65535)
    """The port; 0 picks a free one."""
    trust_remote_code: bool = False
    """Run the code that comes with a PM's checkpoint."""
