"""Upload a compressed model to the Hugging Face hub."""

from pathlib import Path
from typing import Any

from spectrim.errors import UserError, first_line
from spectrim.fetch import pretrained


def client() -> Any:
    """Return the client of the Hugging Face hub. Raises ``UserError`` where nobody is logged in."""
    hub = pretrained.imported("huggingface_hub")
    try:
        found = hub.HfApi()
        found.whoami()
    except Exception as error:  # its own errors and those of its client
        raise UserError(
            f"--push-to-hub needs a login ({first_line(error)}); run `hf auth login`, or leave it out"
        ) from None
    return found


def push(client: Any, name: str, out: Path) -> None:
    """Upload the folder ``out`` as ``name``. Raises ``UserError`` where that fails; the folder stays."""
    try:
        client.create_repo(name, exist_ok=True)
        client.upload_folder(repo_id=name, folder_path=str(out))
    except Exception as error:
        raise UserError(
            f"{out} is whole, but was not uploaded ({_said(error)}); upload it by: hf upload {name} {out}"
        ) from None
    print(f"uploaded to {name}")


def _said(error: Exception) -> str:
    """Return what went wrong in one line. The error of a large file says only which one; its cause says why."""
    said = first_line(error)
    return said if isinstance(error, OSError) or not error.__cause__ else f"{said} {first_line(error.__cause__)}"
