"""`registry hub pull` and `hub push`: adapters from the Hugging Face Hub, and to it."""

import os
import tempfile
from functools import partial
from pathlib import Path

import click

from .command import REF, OneLine, cli, opened, verb
from .errors import InvalidReference
from .printing import say_pushed, transfer
from .push_commands import with_source
from .reference import HubReference, check_name


@cli.group()
def hub() -> None:
    """Bring adapters from the Hugging Face Hub, and take them there."""


@partial(verb, group=hub)
@click.argument("source", metavar="OWNER/REPO[@REVISION]")
@click.option("--as", "name", metavar="NAME", help="Default: OWNER/REPO.")
@click.option("--base", metavar="ID_OR_PATH", help="The base to check against; default: what the adapter says.")
@click.option("--message", "-m", default="", help="What is new, for people; the commit is added to it.")
@click.option("--endpoint", metavar="URL", help="Another Hub; default: HF_ENDPOINT, then huggingface.co.")
def pull_(source: str, name: str | None, base: str | None, message: str, endpoint: str | None) -> None:
    """Fetch an adapter, prove its files by what the Hub says of them, and keep it as the next version of NAME.

    What was fetched before a failure is not fetched again. HF_TOKEN, or `hf auth login`, opens what is private.
    """
    ref = HubReference.parse(f"hf://{source.removeprefix('hf://')}")
    try:
        check_name(name or ref.repo_id)
    except InvalidReference as error:
        raise OneLine(f"{error}" if name else f"{error}; name it with --as NAME") from error
    from .hub import fetch_from_hub, find_on_hub  # here: it costs a third of a second that other verbs need not pay
    from .hub_downloads import download_folder

    with opened() as registry:
        commit, files = find_on_hub(ref, registry.limits, endpoint)
        with download_folder(commit, endpoint or os.environ.get("HF_ENDPOINT", "")) as folder:
            fetch_from_hub(commit, files, folder, endpoint)
            with transfer(f"push {name or ref.repo_id}", sum(one.size or 0 for one in files)) as progress:
                message = with_source(message, commit)
                version = registry.push(name or ref.repo_id, folder, base=base, message=message, progress=progress)
    say_pushed(version, f"{commit} is")


@partial(verb, group=hub)
@click.argument("ref", type=REF)
@click.argument("repo", metavar="OWNER/REPO")
@click.option("--private", is_flag=True, help="Make it private, and refuse one that is there and is not.")
@click.option("--revision", metavar="BRANCH", help="Default: main. A branch that is not there is made.")
@click.option("--endpoint", metavar="URL", help="Another Hub; default: HF_ENDPOINT, then huggingface.co.")
def push_(ref: str, repo: str, private: bool, revision: str | None, endpoint: str | None) -> None:
    """Upload the files of a version as one commit to OWNER/REPO, which is made if it is not there."""
    target = HubReference.parse(f"hf://{repo.removeprefix('hf://')}")
    if target.revision:
        raise click.UsageError(f"give the branch with --revision {target.revision}")
    from .hub import push_to_hub

    with opened() as registry, tempfile.TemporaryDirectory() as temporary:
        version = registry.resolve(ref)
        folder = registry.fetch(version.digest, Path(temporary) / "files")
        url = push_to_hub(folder, version, target.repo_id, private=private, revision=revision, endpoint=endpoint)
    click.echo(f"{version} is {url}")
