"""The whole run as data: which stages there are, with which config, and what feeds what.

``plan`` is the only place that knows the wiring. The command line runs it one node after the
other (``run``); the Prefect flows map the same nodes to tasks. Stage modules are imported when
a node is run, so a plan costs nothing.

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

from diffagent.errors import ConfigError
from diffagent.schemas.config import (
    EvaluationConfig,
    PartConfig,
    PipelineConfig,
    RuntimeConfig,
    SampleShard,
    SelectConfig,
    Selector,
)
from diffagent.store import Artifact, Inputs, Progress, Stage
from diffagent.store.child import run_in_child

log = logging.getLogger(__name__)

Group = Literal["build-dabench", "train-sft", "train-rrhf", "evaluate-agent"]
GROUPS: tuple[Group, ...] = ("build-dabench", "train-sft", "train-rrhf", "evaluate-agent")

#: Selectors that answer with a trained agent -> key of the node that trains it.
AGENTS: Mapping[Selector, str] = {"sft": "sft", "rrhf": "rrhf", "reranked": "rrhf"}


@dataclass(frozen=True)
class Node:
    """One stage of a run, or one shard of it."""

    key: str
    entry: str  # 'package.module:attribute' of the Stage
    config: BaseModel
    inputs: Mapping[str, tuple[str, ...]]  # name of the input -> keys of the nodes that make it
    group: Group
    heavy: bool = False  # runs in a process of its own, which gives its memory back
    queue: Literal["cpu", "gpu"] = "cpu"
    spread: bool = False  # one of many alike, which any machine with the store can make

    @property
    def parents(self) -> tuple[str, ...]:
        """Keys of all nodes that this one reads."""
        return tuple(key for keys in self.inputs.values() for key in keys)


def plan(config: PipelineConfig) -> dict[str, Node]:
    """All nodes of a run by key, parents before children.

    Keys: ``crawl``, ``filter``, ``shard``, ``sft``, ``sample-0`` ... , ``render-0`` ... ,
    ``score-0`` ... , ``rrhf``, then ``select-NAME``, ``render-NAME``, ``score-NAME`` and, with
    held-out judges, ``judge-NAME`` for each selector of ``config.evaluation``, and ``evaluate``.
    With shards of the evaluation they are ``part-NAME-0``, ``render-NAME-0``, ``score-NAME-0`` ...
    """
    nodes = [*_dataset_nodes(config), *_training_nodes(config), *_evaluation_nodes(config)]
    return {node.key: node for node in nodes}


def _dataset_nodes(config: PipelineConfig) -> Iterator[Node]:
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


def _training_nodes(config: PipelineConfig) -> Iterator[Node]:
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
        yield from _judge(config, f"sample-{i}", str(i), "train-rrhf")
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


def _evaluation_nodes(config: PipelineConfig) -> Iterator[Node]:
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
            yield from _judge(config, candidates, part, group)
            if config.judges.judges:
                yield _held_out(config, part, group)
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
    """Names of the parts of a selector's answers; there is one unless it is sharded."""
    if evaluation.num_shards == 1:
        return [selector]
    return [f"{selector}-{shard}" for shard in range(evaluation.num_shards)]


def _judge(config: PipelineConfig, candidates: str, name: str, group: Group) -> Iterator[Node]:
    """Render the candidates of one node and score the pictures."""
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


def _held_out(config: PipelineConfig, name: str, group: Group) -> Node:
    """Held-out judges look at the pictures of one selector; at no picture to train on."""
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
    """Keys that ``name`` stands for: a key, or the shards of a stage ('sample', 'render').

    Raises:
        ConfigError: the plan has no such stage.
    """
    shard = re.compile(re.escape(name) + r"-\d+")
    keys = tuple(key for key in nodes if key == name or shard.fullmatch(key))
    if not keys:
        raise ConfigError(f"no stage {name!r} in this run; there are: {', '.join(nodes)}")
    return keys


def upstream(nodes: Mapping[str, Node], keys: Iterable[str]) -> dict[str, Node]:
    """The nodes ``keys`` and all that they depend on, in the order of ``nodes``."""
    wanted = set(keys)
    for key in reversed(list(nodes)):
        if key in wanted:
            wanted.update(nodes[key].parents)
    return {key: node for key, node in nodes.items() if key in wanted}


def load_stage(node: Node) -> Stage[Any]:
    """Import the stage of a node."""
    module, _, attribute = node.entry.partition(":")
    stage: Stage[Any] = getattr(importlib.import_module(module), attribute)
    return stage


def node_inputs(node: Node, done: Mapping[str, Artifact]) -> dict[str, list[Artifact]]:
    """The artefacts that a node reads, by the name of its input."""
    return {name: [done[key] for key in keys] for name, keys in node.inputs.items()}


def cached(node: Node, done: Mapping[str, Artifact], config: PipelineConfig) -> Artifact | None:
    """The node's artefact when it is there already; None when it has to be built."""
    return load_stage(node).cached(node.config, node_inputs(node, done), config.runtime)


def find_cached(nodes: Mapping[str, Node], config: PipelineConfig) -> dict[str, Artifact]:
    """The artefacts of ``nodes`` that are on disk, whole; nothing is run.

    A node whose parents are not there is not there either: its request is not known yet.
    """
    found: dict[str, Artifact] = {}
    for key, node in nodes.items():
        if found.keys() >= set(node.parents) and (artifact := cached(node, found, config)):
            found[key] = artifact
    return found


def run_node(
    node: Node,
    inputs: Inputs,
    runtime: RuntimeConfig,
    *,
    site_url: str = "",
    refresh: bool = False,
    progress: Progress = lambda fraction, text: None,
) -> Artifact:
    """Run one node (from cache when it can), a heavy one in a child process.

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
    config: PipelineConfig,
    upto: str | None = None,
    *,
    refresh: bool = False,
    on_start: Callable[[Node], None] = lambda node: None,
    on_done: Callable[[Node, Artifact, bool], None] | None = None,
    progress: Progress = lambda fraction, text: None,
) -> dict[str, Artifact]:
    """Run the plan, or what the stage ``upto`` needs, one node after the other.

    Args:
        config: the whole run.
        upto: a key of ``plan`` or the name of a sharded stage; None runs everything.
        refresh: crawl again even when there is a snapshot; what follows is rebuilt only when
            the site had something new.
        on_start: called before a node that has to be built.
        on_done: called after each node with its artefact and whether it was cached.
        progress: called by the node that is being built.

    Returns:
        The artefacts by node key, in the order in which they were made.

    Raises:
        DiffAgentError: a stage failed, or there is no stage ``upto``.
    """
    nodes = plan(config)
    if upto is not None:
        nodes = upstream(nodes, targets(nodes, upto))
    done: dict[str, Artifact] = {}
    for node in nodes.values():
        again = refresh and node.key == "crawl"
        known = artifact = cached(node, done, config)
        if artifact is None or again:
            log.info("%s: running", node.key)
            on_start(node)
            artifact = run_node(
                node,
                node_inputs(node, done),
                config.runtime,
                site_url=config.crawl.site,
                refresh=again,
                progress=progress,
            )
        done[node.key] = artifact
        if on_done:
            on_done(node, artifact, artifact == known)
    return done
