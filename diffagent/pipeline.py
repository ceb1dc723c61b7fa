"""The plan of a run: its stages with their configurations and inputs, as data.

``plan`` defines the wiring and no other module does. The command line runs the nodes one after
the other (``run``); the Prefect flows map the same nodes to tasks. The module of a stage is
imported when its node runs, so that a plan loads no heavy library.

    crawl -> filter -> shard -> sft -> (sample -> render -> score) per shard -> rrhf
                          └──────┴────────────────────────────────────────────────┴─┐
                   (select -> render -> score, judge) per selector -> evaluate <─┘
"""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel

from diffagent.agent.sample_config import SampleShard
from diffagent.agent.select_config import SelectConfig, Selector
from diffagent.errors import ArtifactError, ConfigError
from diffagent.evaluation.evaluate_config import EvaluationConfig
from diffagent.render.part_config import PartConfig
from diffagent.run_config import RunConfig
from diffagent.schemas.runtime import RuntimeConfig
from diffagent.store import Artifact, Inputs, Progress, Stage
from diffagent.store.child import run_in_child

log = logging.getLogger(__name__)

Group = Literal["build-dabench", "train-sft", "train-rrhf", "evaluate-agent"]
GROUPS: tuple[Group, ...] = ("build-dabench", "train-sft", "train-rrhf", "evaluate-agent")

#: Selector that answers with a trained agent -> key of the node that trains the agent.
AGENTS: Mapping[Selector, str] = {"sft": "sft", "rrhf": "rrhf", "reranked": "rrhf"}


@dataclass(frozen=True)
class Node:
    """A stage of a run, or one shard of a stage.

    Attributes:
        key: unique name in the plan, e.g. 'render-3'.
        entry: 'package.module:attribute' of the ``Stage``.
        config: configuration of the stage.
        inputs: name of an input -> keys of the nodes whose artifacts it takes.
        group: flow that runs the node.
        heavy: run it in a child process, which returns its memory when it ends.
        queue: work queue of Prefect.
        site: it requests data from the Civitai API.
        spread: it is one of many equal nodes, which any machine with access to the store can run.
    """

    key: str
    entry: str
    config: BaseModel
    inputs: Mapping[str, tuple[str, ...]]
    group: Group
    heavy: bool = False
    queue: Literal["cpu", "gpu"] = "cpu"
    spread: bool = False

    @property
    def parents(self) -> tuple[str, ...]:
        """Keys of all nodes whose artifacts this node reads."""
        return tuple(key for keys in self.inputs.values() for key in keys)


def plan(config: RunConfig) -> dict[str, Node]:
    """Return all nodes of a run by key, parents before children.

    Keys: ``crawl``, ``filter``, ``shard``, ``sft``, ``sample-0`` ... , ``render-0`` ... ,
    ``score-0`` ... , ``rrhf``, then ``select-NAME``, ``render-NAME``, ``score-NAME`` and, with
    held-out judges, ``judge-NAME`` for each selector of ``config.evaluation``, and ``evaluate``.
    With shards of the evaluation they are ``part-NAME-0``, ``render-NAME-0``, ``score-NAME-0`` ...
    """
    nodes = [*_dataset_nodes(config), *_training_nodes(config), *_evaluation_nodes(config)]
    return {node.key: node for node in nodes}


def _dataset_nodes(config: RunConfig) -> Iterator[Node]:
    group: Group = "build-dabench"
    yield Node("crawl", "diffagent.crawl.crawl_stage:crawl", config.crawl, {}, group)
    yield Node(
        "filter",
        "diffagent.dabench.filter.filter_stage:filter_records",
        config.filters,
        {"snapshot": ("crawl",)},
        group,
    )
    yield Node(
        "shard",
        "diffagent.dabench.build.shard_stage:build_dabench",
        config.dabench,
        {"filtered": ("filter",)},
        group,
    )


def _training_nodes(config: RunConfig) -> Iterator[Node]:
    dabench, agent = ("shard",), ("sft",)
    yield Node(
        "sft",
        "diffagent.train.sft_stage:train_sft",
        config.sft,
        {"dabench": dabench},
        "train-sft",
        heavy=True,
        queue="gpu",
    )
    shards = range(config.sampling.num_shards)
    for i in shards:
        yield Node(
            f"sample-{i}",
            "diffagent.agent.sample_stage:sample",
            SampleShard(**config.sampling.model_dump(), shard=i),
            {"dabench": dabench, "agent": agent},
            "train-rrhf",
            heavy=True,
            queue="gpu",
            spread=True,
        )
        yield from _rendering_nodes(config, f"sample-{i}", str(i), "train-rrhf")
    yield Node(
        "rrhf",
        "diffagent.train.rrhf_stage:train_rrhf",
        config.rrhf,
        {
            "dabench": dabench,
            "agent": agent,
            "candidates": tuple(f"sample-{i}" for i in shards),
            "scores": tuple(f"score-{i}" for i in shards),
        },
        "train-rrhf",
        heavy=True,
        queue="gpu",
    )


def _evaluation_nodes(config: RunConfig) -> Iterator[Node]:
    group: Group = "evaluate-agent"
    evaluation = config.evaluation
    shared = evaluation.model_dump(
        include={"split", "num_prompts", "max_new_tokens", "decoding", "encoder", "seed"}
    )
    for name in evaluation.selectors:
        agent = {"agent": (AGENTS[name],)} if name in AGENTS else {}
        yield Node(
            f"select-{name}",
            "diffagent.agent.select_stage:select",
            SelectConfig(selector=name, **shared),
            {"dabench": ("shard",), **agent},
            group,
            heavy=True,
            queue="gpu" if agent else "cpu",
            spread=True,
        )
        for shard, part in enumerate(_parts(evaluation, name)):
            candidates = f"select-{name}"
            if part != name:
                candidates = f"part-{part}"
                yield Node(
                    candidates,
                    "diffagent.render.part_stage:part",
                    PartConfig(num_parts=evaluation.num_shards, part=shard),
                    {"candidates": (f"select-{name}",)},
                    group,
                )
            yield from _rendering_nodes(config, candidates, part, group)
            if config.judges.judges:
                yield _judge_node(config, part, group)
    parts = [part for name in evaluation.selectors for part in _parts(evaluation, name)]
    judged = {"judgements": tuple(f"judge-{part}" for part in parts)}
    yield Node(
        "evaluate",
        "diffagent.evaluation.evaluate_stage:evaluate",
        evaluation,
        {
            "dabench": ("shard",),
            "candidates": tuple(f"select-{name}" for name in evaluation.selectors),
            "renders": tuple(f"render-{part}" for part in parts),
            "scores": tuple(f"score-{part}" for part in parts),
            **(judged if config.judges.judges else {}),
        },
        group,
        heavy=True,
    )


def _parts(evaluation: EvaluationConfig, selector: str) -> list[str]:
    """Return the names of the parts of a selector's answers; one part unless sharded."""
    if evaluation.num_shards == 1:
        return [selector]
    return [f"{selector}-{shard}" for shard in range(evaluation.num_shards)]


def _rendering_nodes(config: RunConfig, candidates: str, name: str, group: Group) -> Iterator[Node]:
    """Yield the nodes that render the candidates of a node and score the pictures."""
    yield Node(
        f"render-{name}",
        "diffagent.render.render_stage:render",
        config.render,
        {"candidates": (candidates,), "dabench": ("shard",)},
        group,
        heavy=True,
        queue="gpu",
        spread=True,
    )
    yield Node(
        f"score-{name}",
        "diffagent.rewards.score_stage:score",
        config.rewards,
        {"renders": (f"render-{name}",)},
        group,
        heavy=True,
        queue="gpu",
        spread=True,
    )


def _judge_node(config: RunConfig, name: str, group: Group) -> Node:
    """Return the node in which held-out judges score a selector's pictures.

    Judges score pictures of the evaluation only, never those that an agent is trained on.
    """
    return Node(
        f"judge-{name}",
        "diffagent.rewards.score_stage:judge",
        config.judges,
        {"renders": (f"render-{name}",)},
        group,
        heavy=True,
        queue="gpu",
        spread=True,
    )


def targets(nodes: Mapping[str, Node], name: str) -> tuple[str, ...]:
    """Return the keys of a node or of all shards of a stage ('sample', 'render').

    Raises:
        ConfigError: the plan has no such stage.
    """
    shard = re.compile(re.escape(name) + r"-\d+")
    keys = tuple(key for key in nodes if key == name or shard.fullmatch(key))
    if not keys:
        raise ConfigError(f"no stage {name!r} in this run; choose one of: {', '.join(nodes)}")
    return keys


def upstream(nodes: Mapping[str, Node], keys: Iterable[str]) -> dict[str, Node]:
    """Return the nodes ``keys`` and their ancestors, in the order of ``nodes``."""
    selected = set(keys)
    for key in reversed(list(nodes)):
        if key in selected:
            selected.update(nodes[key].parents)
    return {key: node for key, node in nodes.items() if key in selected}


def load_stage(node: Node) -> Stage[Any]:
    """Import the stage of a node."""
    module, _, attribute = node.entry.partition(":")
    stage: Stage[Any] = getattr(importlib.import_module(module), attribute)
    return stage


def node_inputs(node: Node, done: Mapping[str, Artifact]) -> dict[str, list[Artifact]]:
    """Return the artifacts that a node reads, by the name of the input."""
    return {name: [done[key] for key in keys] for name, keys in node.inputs.items()}


def cached(node: Node, done: Mapping[str, Artifact], config: RunConfig) -> Artifact | None:
    """Return the node's artifact if the store has it; None if it has to be built."""
    return load_stage(node).cached(node.config, node_inputs(node, done), config.runtime)


def find_cached(nodes: Mapping[str, Node], config: RunConfig) -> dict[str, Artifact]:
    """Return the complete artifacts of ``nodes`` that the store has; run nothing.

    A node without the artifacts of its parents has no artifact: its identity depends on theirs.
    """
    artifacts: dict[str, Artifact] = {}
    for key, node in nodes.items():
        if artifacts.keys() >= set(node.parents) and (result := cached(node, artifacts, config)):
            artifacts[key] = result
    return artifacts


def find_inputs(
    nodes: Mapping[str, Node], keys: Iterable[str], config: RunConfig
) -> dict[str, Artifact]:
    """Return the artifacts that the nodes ``keys`` read, and those of all their ancestors.

    Raises:
        ArtifactError: the store lacks one that they read.
    """
    parents = [parent for key in keys for parent in nodes[key].parents]
    artifacts = find_cached(upstream(nodes, parents), config)
    for parent in parents:
        if parent not in artifacts:
            raise ArtifactError(
                f"{config.runtime.store!r} has no artifact of {parent!r} for this configuration; "
                f"build it with: diffagent run -c FILE --until {parent}, or the deployment "
                f"{nodes[parent].group!r}"
            )
    return artifacts


def run_node(
    node: Node,
    inputs: Inputs,
    runtime: RuntimeConfig,
    *,
    site_url: str = "",
    refresh: bool = False,
    progress: Progress = lambda fraction, text: None,
) -> Artifact:
    """Run one node, a heavy one in a child process; an artifact in the store is not built again.

    Raises:
        DiffAgentError: the stage failed.
    """
    stage = load_stage(node)
    if node.heavy and stage.cached(node.config, inputs, runtime) is None:
        return run_in_child(
            node.entry, node.config, inputs, runtime, site_url=site_url, progress=progress
        )
    return stage.run(
        node.config, inputs, runtime, site_url=site_url, refresh=refresh, progress=progress
    )


def run(
    config: RunConfig,
    until: str | None = None,
    *,
    only: str | None = None,
    refresh: bool = False,
    on_start: Callable[[Node], None] = lambda node: None,
    on_done: Callable[[Node, Artifact, bool], None] | None = None,
    progress: Progress = lambda fraction, text: None,
) -> dict[str, Artifact]:
    """Run the plan, or the part of it that one stage needs, one node after the other.

    Args:
        config: the whole run.
        until: a key of ``plan`` or the name of a sharded stage: the last stage to run.
        only: the same, of the only stage to run; its inputs must be in the store.
        refresh: crawl again even if the store has a snapshot; later stages are rebuilt only if
            the site has changed.
        on_start: called before a node is built.
        on_done: called after each node with its artifact and whether the store had it.
        progress: called by the node that is being built.

    Returns:
        The artifacts by node key, in the order in which they were made.

    Raises:
        DiffAgentError: a stage failed, or the plan has no such stage.
        ArtifactError: the store lacks an input of the stage ``only``.
    """
    nodes = plan(config)
    done: dict[str, Artifact] = {}
    if until is not None:
        nodes = upstream(nodes, targets(nodes, until))
    if only is not None:
        keys = targets(nodes, only)
        done = find_inputs(nodes, keys, config)
        nodes = {key: nodes[key] for key in keys}
    for node in nodes.values():
        recrawl = refresh and node.key == "crawl"
        existing = artifact = cached(node, done, config)
        if artifact is None or recrawl:
            log.info("%s: running", node.key)
            on_start(node)
            artifact = run_node(
                node,
                node_inputs(node, done),
                config.runtime,
                site_url=config.crawl.site,
                refresh=recrawl,
                progress=progress,
            )
        done[node.key] = artifact
        if on_done:
            on_done(node, artifact, artifact == existing)
    return done
