"""The command ``serve``."""

from __future__ import annotations

from contextlib import suppress
from importlib.util import find_spec

from rmscope.app.library import Library
from rmscope.app.security import is_loopback
from rmscope.app.settings import ServeConfig
from rmscope.errors import InputError
from rmscope.io import Display
from rmscope.report.result import Result

NEEDED = ("fastapi", "uvicorn")


class Served(Result):
    """The app, after it was stopped."""

    address: str

    def summary(self) -> str:
        return f"{self.address} is stopped."


def serve(config: ServeConfig, display: Display) -> Served:
    """Serves the app until it is stopped (Ctrl+C). Raises InputError where its packages or the runs are missing."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise InputError(
            f"The app needs {' and '.join(missing)}, not installed here; pip install 'rmscope[app]' brings them."
        )
    import uvicorn

    from rmscope.app.server import create_app

    library = Library(config.folder, config.trust_remote_code)
    app = create_app(library, config.host)
    settings = uvicorn.Config(app, host=config.host, port=config.port, log_level="warning", server_header=False)  # type: ignore[arg-type]
    try:
        listening = settings.bind_socket()
    except SystemExit as error:  # uvicorn ends the process where a port is taken
        raise InputError(f"Port {config.port} of {config.host} cannot be used; choose another --port.") from error
    name = f"[{config.host}]" if ":" in config.host else config.host
    address = f"http://{name}:{listening.getsockname()[1]}"
    if not is_loopback(config.host):
        display.note(f"Anyone who can reach {config.host} can use the app: it has no passwords.")
    display.note(f"{len(library.entries)} run{'s' if len(library.entries) > 1 else ''} at {address} (Ctrl+C stops)")
    with suppress(KeyboardInterrupt):
        uvicorn.Server(settings).run([listening])
    return Served(address=address)
