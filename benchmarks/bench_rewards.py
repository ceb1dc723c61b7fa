"""Rewards: the official packages' own loops against this library, on the same files.

Random weights at full size in the released layouts (CLIP ViT-L/14, ImageReward v1.0, HPS v2.1),
written by the first run; both sides read the same PNG files and prompts. Each side of each metric
runs in a process of its own, so that one network is in memory at a time; ``together`` has three of
this library. Loading is not timed, except inside the official loop (hpsv2 loads at every call).

One JSON line per figure: pictures per second of the official loop (with its description) and of
this library, then their ratio with the largest difference of the scores; on a shared CPU use the
ratio of processor seconds. The official ``together`` is the sum of its three loops. ``ceiling`` is
the speed of a loop that costs only the networks' matrix products, timed separately in the same
precision: no loop can be faster.

    python benchmarks/bench_rewards.py               on a GPU if there is one, else on the CPU
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
    parser.add_argument("--run", help=argparse.SUPPRESS)  # side that this process measures
    options = parser.parse_args()
    gpu = options.device.startswith("cuda")
    options.dtype = options.dtype or ("float16" if gpu else "float32")
    options.pictures = options.pictures or (2048 if gpu else 8)
    options.official_pictures = min(
        options.official_pictures or (32 if gpu else 8), options.pictures
    )
    options.batch_size = options.batch_size or (256 if gpu else 8)
    return options


def main() -> None:
    options = parse()
    if options.run:
        return print(json.dumps(run(options, *options.run.split("/"))))
    with tempfile.TemporaryDirectory() as temporary:
        options.work = options.work or Path(temporary)
        for metric in options.metrics:
            official.write_release(metric, options.work)
        official.write_pictures(options.work / "pictures", options.pictures, options.size)
        print(json.dumps({"benchmark": "rewards", "settings": describe(options)}), flush=True)
        compare(options)


def describe(options: argparse.Namespace) -> dict[str, Any]:
    settings = {k: v for k, v in vars(options).items() if k not in ("run", "work")}
    name = torch.cuda.get_device_name() if options.device.startswith("cuda") else "CPU"
    return settings | {
        "hardware": name,
        "torch_threads": torch.get_num_threads(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "torch": torch.__version__,
    }


def compare(options: argparse.Namespace) -> None:
    figures: dict[str, dict[str, Any]] = {}
    for metric in options.metrics:
        for side in ("official", "ours"):
            figures[f"{side}/{metric}"] = measure(options, f"{side}/{metric}")
        report(metric, figures[f"official/{metric}"], figures[f"ours/{metric}"])
    for metric in {"image_reward", "hps_v2"} & {*options.metrics}:
        lists = measure(options, f"official/{metric}/by prompt")
        report(f"{metric} by prompt", lists, figures[f"ours/{metric}"])
    if {*options.metrics} == {*official.METRICS} and not options.no_together:
        theirs = [figures[f"official/{metric}"] for metric in options.metrics]
        rate = 1 / sum(1 / figure["pictures_per_second"] for figure in theirs)
        scores = {name: values for figure in theirs for name, values in figure["scores"].items()}
        loop = "the three loops above, one after the other"
        together = {
            "pictures_per_second": rate,
            "cpu_seconds_a_picture": sum(figure["cpu_seconds_a_picture"] for figure in theirs),
            "loop": loop,
            "scores": scores,
        }
        report(TOGETHER, together, measure(options, f"ours/{TOGETHER}"))


def measure(options: argparse.Namespace, side: str) -> dict[str, Any]:
    """Runs one side in a process of its own and prints its figure."""
    command = [sys.executable, __file__, *sys.argv[1:], "--work", str(options.work), "--run", side]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    figure: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    printed = {key: value for key, value in figure.items() if key != "scores"}
    print(json.dumps({"run": side, **printed}), flush=True)
    return figure


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


def run(options: argparse.Namespace, side: str, metric: str, variant: str = "") -> dict[str, Any]:
    """Loads, warms up and times one side."""
    count = options.pictures if side == "ours" else options.official_pictures
    files = official.write_pictures(options.work / "pictures", options.pictures, options.size)[
        :count
    ]
    prompts = official.write_prompts(options.pictures, options.candidates)[:count]
    if side == "official":
        name = f"{metric} {variant}".strip()
        started = time.perf_counter()
        loop = official.load_official(metric, options.work, options.device, by_prompt=bool(variant))
        loaded = time.perf_counter()
        loop(["a picture to warm up with"], files[:1])
        warm, used = time.perf_counter(), time.process_time()
        scores = {metric: loop(prompts, files)}
        seconds, used = time.perf_counter() - warm, time.process_time() - used
        extra: dict[str, Any] = {"loop": official.OFFICIAL_LOOPS[name]}
    else:
        keep_freed_memory()  # like this library's stages and commands
        started = time.perf_counter()
        names = options.metrics if metric == TOGETHER else [metric]
        runtime = {"device": options.device, "dtype": options.dtype, "compiled": options.compile}
        runtime["batch_size"] = options.batch_size
        scorers = [official.load_ours(name, options.work, **runtime) for name in names]
        loaded = time.perf_counter()
        settings = {"batch_size": options.batch_size, "threads": options.threads}
        warming = files[: options.batch_size if options.device.startswith("cuda") else 1]
        score_pictures(scorers, ["a picture to warm up with"] * len(warming), warming, **settings)
        warm, used = time.perf_counter(), time.process_time()
        scored = score_pictures(scorers, prompts, files, **settings)
        seconds, used = time.perf_counter() - warm, time.process_time() - used
        scores = {name: values.tolist() for name, values in scored.metrics.items()}
        extra = {"loop": "score_pictures", "dtype": options.dtype, **ceiling(scorers, options)}
    return {
        "pictures": count,
        "seconds": round(seconds, 3),
        "cpu_seconds_a_picture": used / count,
        "pictures_per_second": count / seconds,
        "load_seconds": round(loaded - started, 2),
        "scores": scores,
        **extra,
    }


def ceiling(scorers: list[Any], options: argparse.Namespace) -> dict[str, float]:
    """Returns pictures per second if only the matrix products of the networks cost time.

    On a CPU, per second of processor time, because it may be shared.
    """
    from torch.utils.flop_counter import FlopCounterMode

    torch.backends.mha.set_fastpath_enabled(False)  # the counter does not support it
    count = options.batch_size if options.compile else 2  # a compiled batch is always full
    eager = torch.compiler.set_stance("force_eager")
    with eager, FlopCounterMode(display=False) as counter:
        for scorer in scorers:
            shape = (count, 3, *scorer.preparation.size)
            scorer.score_pixels(["a picture to count with"] * count, torch.zeros(shape))
    flops = counter.get_total_flops() / count
    a = torch.randn(4096, 1280, device=options.device, dtype=getattr(torch, options.dtype))
    b = torch.randn(1280, 5120, device=options.device, dtype=a.dtype)
    gpu, speeds = options.device.startswith("cuda"), []
    clock, repeats = (time.perf_counter, 50) if gpu else (time.process_time, 1)
    for _ in range(5):
        _synchronise(options.device)
        started = clock()
        for _ in range(repeats):
            a @ b
        _synchronise(options.device)
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
