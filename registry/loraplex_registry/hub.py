"""Adapters from the Hugging Face Hub: fetches one commit's adapter files. Knows no registry."""

from pathlib import Path

import huggingface_hub as hub
from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage] - whichever client it uses

from .errors import RemoteError
from .reference import HubReference

ADAPTER_FILES = ["adapter_config.json", "adapter_model.safetensors", "README.md"]


def fetch_from_hub(ref: HubReference, into: Path) -> HubReference:
    """Download the adapter files of the revision into a folder; the answer names the commit they are from.

    The commit is resolved once and then pinned: a branch that moves meanwhile mixes nothing. Raises RemoteError.
    """
    try:
        commit = hub.HfApi().model_info(ref.repo_id, revision=ref.revision).sha
        hub.snapshot_download(ref.repo_id, revision=commit, local_dir=into, allow_patterns=ADAPTER_FILES)
    except (OSError, ValueError, HTTPError) as error:
        reason = str(error).strip() or type(error).__name__
        raise RemoteError(f"{ref} cannot be fetched: {' '.join(reason.split())}") from error
    return HubReference(ref.repo_id, commit)
