"""``diffagent dabench``: inspect, compare, check and export datasets."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from diffagent.schemas.printable import printable, printable_json

app = typer.Typer(help="Inspect, compare, check and export DABench datasets.", no_args_is_help=True)

_HELP = "Directory of an artifact of the stage 'shard', or of an export."


def artifact_path(text: str | Path) -> Path:
    """Parse DIR: a directory, or the URI of an artifact, which is fetched from its store."""
    from diffagent.store import artifact_directory

    return artifact_directory(str(text))


def directory_to_check(text: str | Path) -> Path:
    """Parse DIR of a command that reports damage itself."""
    return artifact_path(text) if "://" in str(text) else Path(text)


Directory = Annotated[Path, typer.Argument(parser=artifact_path, metavar="DIR", help=_HELP)]
AsJSON = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class Format(StrEnum):
    """Layout of an exported dataset."""

    hf = "hf"
    instruction_api = "instruction-api"


@app.command()
def inspect(
    directory: Directory,
    rows: Annotated[int, typer.Option(min=0, max=10_000, help="Number of sample rows.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of the sample rows.")] = 0,
    as_json: AsJSON = False,
) -> None:
    """Show the content of a dataset: counts, lineage, funnel, distributions, sample rows."""
    from diffagent.dabench.dataset import open_dataset
    from diffagent.dabench.tools.dataset_summary import summarise, summary_text

    summary = summarise(open_dataset(directory), rows=rows, seed=seed)
    _print(summary) if as_json else typer.echo(printable(summary_text(summary), lines=True))


@app.command()
def diff(
    a: Annotated[
        Path, typer.Argument(parser=artifact_path, metavar="A", help=f"Older dataset. {_HELP}")
    ],
    b: Annotated[
        Path, typer.Argument(parser=artifact_path, metavar="B", help=f"Newer dataset. {_HELP}")
    ],
    examples: Annotated[int, typer.Option(min=0, help="Examples of each kind of change.")] = 5,
    as_json: AsJSON = False,
) -> None:
    """Show the changes from A to B; exit with 1 if a held-out row of A is in B's train split."""
    from diffagent.dabench.dataset import open_dataset
    from diffagent.dabench.tools.compare import compare, comparison_text

    comparison = compare(open_dataset(a), open_dataset(b), examples=examples)
    if as_json:
        _print(comparison)
    else:
        typer.echo(printable(comparison_text(comparison), lines=True))
    if comparison["leaks"]:
        raise typer.Exit(1)


@app.command()
def verify(
    directory: Annotated[
        Path, typer.Argument(parser=directory_to_check, metavar="DIR", help=_HELP)
    ],
    limit: Annotated[int, typer.Option(min=1, help="Problems of each kind to list.")] = 20,
    leaks: Annotated[
        bool, typer.Option(help="Compare prompts across splits, which takes most of the time.")
    ] = True,
    before: Annotated[
        Path | None,
        typer.Option(
            parser=artifact_path,
            metavar="DIR",
            help="Older version; every record must still be in the same split. "
            "[default: the version that the dataset continues]",
        ),
    ] = None,
    as_json: AsJSON = False,
) -> None:
    """Check files, schema, references, ranges, mappings and splits; exit with 1 on a problem."""
    from diffagent.dabench.tools.dataset_checks import verdict_text, verify_dabench

    verdict = verify_dabench(directory, limit=limit, leaks=leaks, before=before)
    _print(verdict.to_dict()) if as_json else typer.echo(
        printable(verdict_text(verdict), lines=True)
    )
    if not verdict.sound:
        raise typer.Exit(1)


@app.command()
def export(
    directory: Directory,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write.")],
    layout: Annotated[
        Format,
        typer.Option(
            "--format",
            help="'hf': for datasets.load_dataset; 'instruction-api': the authors' JSON.",
        ),
    ] = Format.hf,
    force: Annotated[bool, typer.Option("--force", help="Replace the content of OUT.")] = False,
) -> None:
    """Export a dataset for 'datasets.load_dataset', or as instruction-API pairs in JSON."""
    from diffagent.dabench.dataset import open_dataset
    from diffagent.dabench.tools.export import export_dabench

    manifest = export_dabench(open_dataset(directory), out, layout.value, force=force)
    size = sum(file.size for file in manifest.files) / 1e6
    rows = ", ".join(f"{name} {count:,}" for name, count in manifest.rows.items())
    typer.echo(f"{out}: {rows}; {len(manifest.files)} files, {size:,.1f} MB")


def _print(value: dict[str, Any]) -> None:
    import orjson

    options = orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS
    text = orjson.dumps(value, option=options, default=str).decode()
    typer.echo("\n".join(map(printable_json, text.split("\n"))))


if __name__ == "__main__":
    app()
