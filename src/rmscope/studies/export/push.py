"""The upload of a folder to a hub repo, and what it would upload."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rmscope.errors import InputError


@dataclass(frozen=True, slots=True)
class FileSize:
    """A file by its name in the repo."""

    file: str
    bytes: int


def files_of(folder: Path) -> list[FileSize]:
    """The files under a folder, by name."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [FileSize(path.relative_to(folder).as_posix(), path.stat().st_size) for path in paths]


def check_token() -> None:
    """InputError where there is no token of the hub. Call it before any work."""
    from huggingface_hub import get_token

    if not get_token():
        raise InputError("There is no token of the hub to upload with; log in with hf auth login, or set HF_TOKEN.")


def push(folder: Path, repo: str, public: bool) -> str:
    """Uploads a folder and gives the address of the commit. A repo that is not there is made.

    Raises:
        InputError: the hub cannot be reached, or refuses; the token is not in the message.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of httpx: no connection

    api = HfApi()
    try:
        api.create_repo(repo, private=not public, exist_ok=True)
        done = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="SAEs and card by rmscope")
        return str(done.commit_url)
    except (OSError, ValueError, HTTPError) as error:  # the hub's own errors are among these
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if token := get_token():
            reason = reason.replace(token, "…")
        raise InputError(
            f"{folder} is written, but could not be uploaded to {repo} ({reason}); check the name, the token's rights and "
            "the network, and run the same command again."
        ) from None  # a traceback would show what the message leaves out
