"""Fetch the files of a model that are needed from the Hugging Face hub into its local cache, with `huggingface_hub`."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


def parse(name: str) -> tuple[str, str | None] | None:
    """Split `owner/name` or `owner/name@revision` into (owner/name, revision or None); None if `name` is neither."""
    match = _ID.fullmatch(name)
    return None if match is None else (match["id"], match["revision"])


def find_pipeline(model: str | os.PathLike[str]) -> tuple[str, str | None]:
    """Return the (folder, None) of a pipeline that diffusers has written, or (owner/name, revision) of the hub.

    Raises:
        FileNotFoundError: it is neither.
    """
    path = Path(model)
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise FileNotFoundError(f"{model} has no model_index.json, must be a folder that holds a pipeline")
        return str(model), None
    parsed = parse(str(model))
    if parsed is None:
        raise FileNotFoundError(f"{model} is not a folder, must be one of a pipeline, or owner/name of the hub")
    return parsed


def snapshot(name: str, files: Sequence[str]) -> Path:
    """Fetch those `files` that a model on the hub has, and return its folder in the local cache.

    Without a connection, or with HF_HUB_OFFLINE=1, only the cache is used.

    Args:
        name: owner/name, or owner/name@revision: a branch, tag or commit.
        files: paths inside the model.

    Raises:
        FileNotFoundError: the model cannot be fetched; the message says what was tried and how to solve it.
    """
    parsed = parse(name)
    if parsed is None:
        raise ValueError(f"name is {name!r}, must be owner/name or owner/name@revision")
    repository, revision = parsed
    try:
        from huggingface_hub import constants, errors, snapshot_download
    except ImportError:
        raise FileNotFoundError(
            f"{name} is no local file or folder, and to look for it on the hub huggingface_hub is needed: "
            "pip install 'fastddpm[hub]'"
        ) from None
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(files)))
    except (errors.RepositoryNotFoundError, errors.HFValidationError):  # also raised for private repositories
        why = f"{constants.ENDPOINT} has no {repository} (if it is private or gated: hf auth login)"
    except errors.RevisionNotFoundError:
        why = f"{repository} on {constants.ENDPOINT} has no revision {revision}"
    except errors.LocalEntryNotFoundError:
        offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached"
        why = f"{offline} and {constants.HF_HUB_CACHE} does not hold it, or lacks some of its files"
    except Exception as error:  # a connection can fail with errors of many types
        why = f"{constants.ENDPOINT} gave {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    raise FileNotFoundError(f"{name} is no local file or folder, and {why}")
