"""``diffagent select``: choose models and parameters for prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffagent.cli.dabench_commands import artifact_path
from diffagent.cli.options import Verbose, refuse_options
from diffagent.schemas.printable import printable_json

if TYPE_CHECKING:
    from diffagent.agent.selector import Selector

_AGENT = "Agent (--agent)"
_DABENCH = "Selector fitted on a dataset (--dabench)"


def select(
    context: typer.Context,
    prompt: Annotated[
        str,
        typer.Argument(help="Description of the picture; '-' reads a prompt a line from stdin."),
    ],
    *,
    agent: Annotated[
        Path | None,
        typer.Option(
            parser=artifact_path,
            metavar="DIR",
            help="Agent to answer: artifact of the stage 'sft' or 'rrhf', or its URI.",
            rich_help_panel=_AGENT,
        ),
    ] = None,
    unconstrained: Annotated[
        bool,
        typer.Option(
            "--unconstrained",
            help="Decode without the grammar; answers may be invalid.",
            rich_help_panel=_AGENT,
        ),
    ] = False,
    free_negative_prompt: Annotated[
        bool,
        typer.Option(
            "--free-negative-prompt",
            help="Also write negative prompts that the training data does not have; slower.",
            rich_help_panel=_AGENT,
        ),
    ] = False,
    int8: Annotated[
        bool,
        typer.Option("--int8", help="Weights in 8 bits: faster on a CPU.", rich_help_panel=_AGENT),
    ] = False,
    dabench: Annotated[
        Path | None,
        typer.Option(
            parser=artifact_path,
            metavar="DIR",
            help="DABench to fit a selector on: artifact of the stage 'shard', or its URI. With "
            "--agent, the selector proposes models and the agent chooses one.",
            rich_help_panel=_DABENCH,
        ),
    ] = None,
    selector: Annotated[
        str, typer.Option(help="Selector to fit.", rich_help_panel=_DABENCH)
    ] = "combined",
    encoder: Annotated[
        str,
        typer.Option(
            help="Sentence encoder, e.g. 'minilm'; '' for none.", rich_help_panel=_DABENCH
        ),
    ] = "",
    store: Annotated[
        str,
        typer.Option(metavar="DIR", help="Store of fitted selectors.", rich_help_panel=_DABENCH),
    ] = "store",
    n: Annotated[
        int,
        typer.Option("-n", "--n", min=1, max=32, help="Different API calls, likeliest first."),
    ] = 1,
    device: Annotated[str, typer.Option(help="'auto', 'cpu', 'cuda' or 'mps'.")] = "auto",
    verbose: Verbose = 0,
) -> None:
    """Choose models and parameters for a prompt; print API calls, one a line.

    A line is JSON: the prompt, the API call, and the SHA256 of its files, so that `diffagent
    render` can draw it. With '-' the selector is loaded once and each prompt is answered as soon
    as its line is read; blank lines are skipped. Where an unconstrained agent gives no valid call,
    the line is {"prompt": ..., "error": ...}.
    """
    from diffagent.agent.opening import open_selector
    from diffagent.errors import ConfigError, SchemaError

    if not prompt.strip():
        raise ConfigError("the prompt is empty; describe the picture, or use '-' to read stdin")
    if dabench is None:
        refuse_options(context, ("selector", "encoder", "store"), "need --dabench DIR")
    if agent is None:
        names = ("unconstrained", "free_negative_prompt", "int8")
        refuse_options(context, names, "need --agent DIR")
    if unconstrained:
        refuse_options(context, ("free_negative_prompt",), "has no effect with --unconstrained")

    chooser = open_selector(
        agent,
        dabench,
        selector,
        encoder=encoder,
        store=store,
        device=device,
        int8=int8,
        constrained=not unconstrained,
        negative_prompts="free" if free_negative_prompt else "known",
    )

    if prompt != "-":
        _print_calls(chooser, prompt, n)
        return
    for line in typer.get_text_stream("stdin", "utf-8", "replace"):
        if text := line.strip():
            try:
                _print_calls(chooser, text, n)
            except SchemaError as error:
                problem = {"prompt": text, "error": str(error)}
                typer.echo(printable_json(json.dumps(problem, ensure_ascii=False)))


def _print_calls(chooser: Selector, prompt: str, n: int) -> None:
    from diffagent.agent.selector import call_line, valid_apis

    for api in valid_apis(chooser, prompt, n):
        typer.echo(printable_json(call_line(prompt, api, chooser.catalogue)))
