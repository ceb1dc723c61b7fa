"""Rewards: the official packages' own loops against this library, on the same files.

Random weights at full size in the released layouts (CLIP ViT-L/14, ImageReward v1.0, HPS v2.1),
made on the first run; the same PNG files and prompts for both. Each side of each metric has a
process of its own, so that one network is in memory at a time; ``together`` has three of ours.
Loading is not timed, except where the official loop itself loads (hpsv2, at every call).

One JSON line a figure: pictures a second of the official loop (which says what it is) and of ours,
then the ratio with the largest difference of the scores; the ratio of processor seconds is the one
to read on a CPU that others use too. The official ``together`` is the sum of
its three, which know nothing of each other. ``ceiling`` is what a machine could reach whose matrix
products, timed alone in ours' precision, were all that a picture costs: no loop can be faster.

    python benchmarks/bench_rewards.py               on a GPU when there is one, else on the CPU
    python benchmarks/bench_rewards.py --device cuda --dtype bfloat16 --pictures 4096 --compile
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import official_rewards as official
from diffagent.device import keep_freed_memory
from diffagent.rewards.score_stage import score_pictures

TOGETHER = "together"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument(
        "--dtype", help="of ours; float16 on a GPU, where hpsv2 has it, else float32"
    )
    parser.add_argument("--metrics", nargs="+", default=list(official.METRICS))
    parser.add_argument("--pictures", type=int, help="of ours; 2048 on a GPU, else 8")
    parser.add_argument(
        "--official-pictures", type=int, help="the first ones; 32 on a GPU, else all"
    )
    parser.add_argument("--candidates", type=int, default=4, help="pictures in a row of one prompt")
    parser.add_argument(
        "--size", type=int, default=512, help="pixels; every other is 1.5 times as high"
    )
    parser.add_argument("--batch-size", type=int, help="256 on a GPU, else 8")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="that decode")
    parser.add_argument("--compile", action="store_true", help="ours through torch.compile")
    parser.add_argument("--no-together", action="store_true", help="all three need 9 GB of memory")
    parser.add_argument("--work", type=Path, help="keep weights (5 GB) and pictures here")
    parser.add_argument("--run", help=argparse.SUPPRESS)  # what a process of its own is to do
    given = parser.parse_args()
    gpu = given.device.startswith("cuda")
    given.dtype = given.dtype or ("float16" if gpu else "float32")
    given.pictures = given.pictures or (2048 if gpu else 8)
    given.official_pictures = min(given.official_pictures or (32 if gpu else 8), given.pictures)
    given.batch_size = given.batch_size or (256 if gpu else 8)
    return given


def main() -> None:
    given = parse()
    if given.run:
        return print(json.dumps(run(given, *given.run.split("/"))))
    with tempfile.TemporaryDirectory() as temporary:
        given.work = given.work or Path(temporary)
        for metric in given.metrics:
            official.write_release(metric, given.work)
        official.write_pictures(given.work / "pictures", given.pictures, given.size)
        print(json.dumps({"benchmark": "rewards", "settings": describe(given)}), flush=True)
        compare(given)


def describe(given: argparse.Namespace) -> dict[str, Any]:
    settings = {k: v for k, v in vars(given).items() if k not in ("run", "work")}
    name = torch.cuda.get_device_name() if given.device.startswith("cuda") else "CPU"
    return settings | {
        "hardware": name,
        "torch_threads": torch.get_num_threads(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "torch": torch.__version__,
    }


def compare(given: argparse.Namespace) -> None:
    found: dict[str, dict[str, Any]] = {}
    for metric in given.metrics:
        for side in ("official", "ours"):
            found[f"{side}/{metric}"] = measure(given, f"{side}/{metric}")
        report(metric, found[f"official/{metric}"], found[f"ours/{metric}"])
    for metric in {"image_reward", "hps_v2"} & {*given.metrics}:
        lists = measure(given, f"official/{metric}/by prompt")
        report(f"{metric} by prompt", lists, found[f"ours/{metric}"])
    if {*given.metrics} == {*official.METRICS} and not given.no_together:
        theirs = [found[f"official/{metric}"] for metric in given.metrics]
        rate = 1 / sum(1 / one["pictures_per_second"] for one in theirs)
        scores = {name: values for one in theirs for name, values in one["scores"].items()}
        loop = "the three loops above, one after the other"
        together = {
            "pictures_per_second": rate,
            "cpu_seconds_a_picture": sum(one["cpu_seconds_a_picture"] for one in theirs),
            "loop": loop,
            "scores": scores,
        }
        report(TOGETHER, together, measure(given, f"ours/{TOGETHER}"))


def measure(given: argparse.Namespace, what: str) -> dict[str, Any]:
    """Runs one side in a process of its own and prints its figure."""
    command = [sys.executable, __file__, *sys.argv[1:], "--work", str(given.work), "--run", what]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    shown = {key: value for key, value in found.items() if key != "scores"}
    print(json.dumps({"run": what, **shown}), flush=True)
    return found


def report(metric: str, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    difference = max(
        np.abs(np.subtract(values, ours["scores"][name][: len(values)])).max()
        for name, values in theirs["scores"].items()
    )
    spread = min(float(np.std(values)) for values in theirs["scores"].values())
    cost = theirs["cpu_seconds_a_picture"] if ours["on_cpu"] else 1 / theirs["pictures_per_second"]
    line = {
        "metric": metric,
        "official_pictures_per_second": round(theirs["pictures_per_second"], 4),
        "ours_pictures_per_second": round(ours["pictures_per_second"], 4),
        "ratio": round(ours["pictures_per_second"] / theirs["pictures_per_second"], 2),
        "ratio_of_cpu_seconds": round(
            theirs["cpu_seconds_a_picture"] / ours["cpu_seconds_a_picture"], 2
        ),
        "ceiling_ratio": round(ours["ceiling"] * cost, 2),
        "largest_difference": float(f"{difference:.2g}"),
        "spread_of_scores": float(f"{spread:.2g}"),
    }
    print(json.dumps(line), flush=True)


def run(given: argparse.Namespace, side: str, metric: str, variant: str = "") -> dict[str, Any]:
    """Loads, warms up and times one side."""
    count = given.pictures if side == "ours" else given.official_pictures
    files = official.write_pictures(given.work / "pictures", given.pictures, given.size)[:count]
    prompts = official.write_prompts(given.pictures, given.candidates)[:count]
    if side == "official":
        name = f"{metric} {variant}".strip()
        started = time.perf_counter()
        loop = official.load_official(metric, given.work, given.device, by_prompt=bool(variant))
        loaded = time.perf_counter()
        loop(["a picture to warm up with"], files[:1])
        warm, used = time.perf_counter(), time.process_time()
        scores = {metric: loop(prompts, files)}
        seconds, used = time.perf_counter() - warm, time.process_time() - used
        extra: dict[str, Any] = {"loop": official.OFFICIAL_LOOPS[name]}
    else:
        keep_freed_memory()  # as the processes of this library's stages and commands do
        started = time.perf_counter()
        names = given.metrics if metric == TOGETHER else [metric]
        runtime = {"device": given.device, "dtype": given.dtype, "compiled": given.compile}
        runtime["batch_size"] = given.batch_size
        scorers = [official.load_ours(name, given.work, **runtime) for name in names]
        loaded = time.perf_counter()
        options = {"batch_size": given.batch_size, "threads": given.threads}
        warming = files[: given.batch_size if given.device.startswith("cuda") else 1]
        score_pictures(scorers, ["a picture to warm up with"] * len(warming), warming, **options)
        warm, used = time.perf_counter(), time.process_time()
        judged = score_pictures(scorers, prompts, files, **options)
        seconds, used = time.perf_counter() - warm, time.process_time() - used
        scores = {name: values.tolist() for name, values in judged.metrics.items()}
        extra = {"loop": "score_pictures", "dtype": given.dtype, **ceiling(scorers, given)}
    return {
        "pictures": count,
        "seconds": round(seconds, 3),
        "cpu_seconds_a_picture": used / count,
        "pictures_per_second": count / seconds,
        "load_seconds": round(loaded - started, 2),
        "scores": scores,
        **extra,
    }


def ceiling(scorers: list[Any], given: argparse.Namespace) -> dict[str, float]:
    """Pictures a second if nothing cost anything but the matrix products of the networks.

    On a CPU: a second of a processor, which others may use too.
    """
    from torch.utils.flop_counter import FlopCounterMode

    torch.backends.mha.set_fastpath_enabled(False)  # which the counter does not know
    count = given.batch_size if given.compile else 2  # a compiled batch is always full
    eager = torch.compiler.set_stance("force_eager")
    with eager, FlopCounterMode(display=False) as counter:
        for scorer in scorers:
            shape = (count, 3, *scorer.preparation.size)
            scorer.score_pixels(["a picture to count with"] * count, torch.zeros(shape))
    flops = counter.get_total_flops() / count
    a = torch.randn(4096, 1280, device=given.device, dtype=getattr(torch, given.dtype))
    b = torch.randn(1280, 5120, device=given.device, dtype=a.dtype)
    gpu, speeds = given.device.startswith("cuda"), []
    clock, repeats = (time.perf_counter, 50) if gpu else (time.process_time, 1)
    for _ in range(5):
        _synchronise(given.device)
        started = clock()
        for _ in range(repeats):
            a @ b
        _synchronise(given.device)
        speeds.append(repeats * 2 * 4096 * 1280 * 5120 / (clock() - started))
    return {
        "on_cpu": not gpu,
        "gflop_a_picture": round(flops / 1e9, 1),
        "matmul_gflops": round(max(speeds) / 1e9, 1),
        "ceiling": max(speeds) / flops,
    }


def _synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
