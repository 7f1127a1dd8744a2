"""The name of a checkpoint to a path: a file or folder here, or one of the hub, which is fetched."""

import re
from pathlib import Path
from typing import Any

# Of a repository that is asked for as a whole: what folders in diffusers' or transformers' layout are made of.
_WANTED = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]

_OWNER_AND_NAME = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(?:/(?P<file>[^/].*))?")
_LINK_TO_FILE = re.compile(r"(?:blob|resolve)/(?P<revision>[^/]+)/(?P<file>.+)")


def find_source(name: str, **options: Any) -> Path:
    """The path behind a name, local things first.

    Args:
        name: a path; "owner/name" of a repository; "owner/name/path/in/it" of a file, also after "hf://"; or the link
            to a file, as the hub's pages show it.
        **options: for huggingface_hub's `hf_hub_download` or `snapshot_download`: `revision`, `cache_dir`, `token`,
            `force_download`, `local_files_only`.

    Raises:
        FileNotFoundError: if nothing has this name here, and it cannot be one of the hub.
        OSError: if the hub has none of this name, or cannot be reached.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    place = _OWNER_AND_NAME.fullmatch(_without_host(name))
    if place is None:
        raise FileNotFoundError(f"there is no file or folder {name}")
    repository, file = place["repository"], place["file"]
    if file and (link := _LINK_TO_FILE.fullmatch(file)):
        file, revision = link["file"], options.get("revision") or link["revision"]
        options = {**options, "revision": revision}
    return _fetch(name, repository, file, options)


def _without_host(name: str) -> str:
    from huggingface_hub.constants import ENDPOINT

    host = ENDPOINT.partition("://")[2]
    return re.sub(rf"^(?:hf://|(?:https?://)?(?:www\.)?(?:{re.escape(host)}|hf\.co)/)", "", name)


def _fetch(name: str, repository: str, file: str | None, options: dict[str, Any]) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        if file:
            return Path(hf_hub_download(repository, file, **options))
        return Path(snapshot_download(repository, allow_patterns=_WANTED, **options))
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise OSError(f"there is no file or folder {name}, and the hub gave none: {reason}") from error
