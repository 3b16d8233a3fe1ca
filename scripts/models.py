"""`headrace models`: what is on this machine, and getting more of it. The work is done by `headrace.workers.models`."""

from __future__ import annotations

import json

import click

from headrace.scripts.options import command, option

__all__ = ["models"]


@click.group(
    "models",
    context_settings={"max_content_width": 110, "help_option_names": ["-h", "--help"]},
    epilog="MODEL is a Hugging Face id (org/name, or org/name@revision) or a .gguf file; by default a small "
    "instruction-tuned model. The folder of the cache is set by HEADRACE_MODELS.",
)
def models() -> None:
    """Fetch, convert, list and check models."""


@command(
    "fetch",
    "headrace models fetch",
    "headrace models fetch Qwen/Qwen2.5-1.5B-Instruct",
    "headrace models fetch ./model.gguf",
    short_help="Get MODEL into the cache and print its folder.",
)
@click.argument("model", required=False)
def fetch(model: str | None) -> None:
    """Get MODEL into the cache, ready to serve, and print its folder.

    What was downloaded before is used; after an interruption the download goes on where it was.
    """
    from headrace.scripts.progress import ProgressLine
    from headrace.workers.models import resolve

    with ProgressLine() as progress:
        folder = resolve(model, progress=progress)
    click.echo(folder)


@command("list", "headrace models list", "headrace models list --json", short_help="List the models in the cache.")
@option("--json", "as_json", heading="Output", is_flag=True, help="Print JSON.")
def list_models(as_json: bool) -> None:
    """List the models in the cache, and downloads that were interrupted."""
    from headrace.addresses import models_dir
    from headrace.workers.models import cached_models, format_size

    found = cached_models()
    if as_json:
        rows = [
            {"model": m.model, "folder": str(m.folder), "size": m.size, "source": m.source, "complete": m.complete}
            for m in found
        ]
        click.echo(json.dumps(rows, indent=2))
        return
    if not found:
        click.echo(f"No models in {models_dir()}. Get the default one: headrace models fetch")
        return
    width = max(len(m.model) for m in found)
    for m in found:
        state = m.source if m.complete else "unfinished: `headrace models fetch` goes on with it"
        click.echo(f"{m.model:<{width}}  {format_size(m.size):>8}  {state}")


@command(
    "check",
    "headrace models check",
    "headrace models check ./folder",
    short_help="Read all files of MODEL and compare their hashes.",
)
@click.argument("model", required=False)
def check(model: str | None) -> None:
    """Read all files of MODEL, or of a folder, and compare them with their hashes."""
    from headrace.scripts.progress import ProgressLine
    from headrace.workers.models import verify

    with ProgressLine() as progress:
        folder, compared = verify(model, progress=progress)
    what = (
        f"{compared} files are as they were installed" if compared else "all files are there and whole by their headers"
    )
    click.echo(f"{folder}: {what}.")


@command(
    "path", "headrace models path", "ls $(headrace models path)", short_help="Print the folder of MODEL, if it is here."
)
@click.argument("model", required=False)
def path(model: str | None) -> None:
    """Print the folder of MODEL if it is on this machine; nothing is fetched."""
    from headrace.workers.models import find

    click.echo(find(model))


@command(
    "remove",
    "headrace models remove Qwen/Qwen2.5-Coder-0.5B-Instruct",
    short_help="Delete MODEL from the cache.",
)
@click.argument("model")
def remove(model: str) -> None:
    """Delete MODEL from the cache, with what was downloaded of it so far."""
    from headrace.workers.models import format_size
    from headrace.workers.models import remove as remove_model

    freed = remove_model(model)
    click.echo(f"Removed {model}: {format_size(freed)} freed.")


for _command in (fetch, list_models, check, path, remove):
    models.add_command(_command)
