"""ComfyUI's HTTP API as a backend: a graph of core nodes for each recipe, no websocket.

ComfyUI knows models by their names in its folders alone. A model is taken by the name of its file,
or by the name that the configuration gives; where the same file lies here as well, what the headers
of both say is compared. The answer's graph has to be the one that was sent.

docs/how-to/render-on-a-server.md has what was read where.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from diffagent.errors import RenderError, RenderServerError
from diffagent.render.http.remote import (
    Remote,
    decode_picture,
    failure,
    metadata_of,
    parse,
    stem,
    stems,
)
from diffagent.render.http.server_renderer import ServerRenderer
from diffagent.render.recipe import Recipe
from diffagent.render.renderer import Files, ModelRef
from diffagent.store import canonical_json
from diffagent.t2i.base_models import ecosystem
from diffagent.t2i.samplers import SAMPLERS, normalise

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

Graph = dict[str, dict[str, Any]]

#: Kind of file -> node and input that list its names, and folder of ``/view_metadata``.
_LISTED = MappingProxyType(
    {
        "checkpoint": ("CheckpointLoaderSimple", "ckpt_name", "checkpoints"),
        "lora": ("LoraLoader", "lora_name", "loras"),
        "vae": ("VAELoader", "vae_name", "vae"),
    }
)
#: The schedules of KSampler; its beta and kl_optimal are not the WebUI's.
_SCHEDULES: Mapping[str, str] = MappingProxyType(
    {
        "": "normal",
        "Karras": "karras",
        "Exponential": "exponential",
        "SGM Uniform": "sgm_uniform",
        "Simple": "simple",
        "DDIM Uniform": "ddim_uniform",
        "Beta (ComfyUI)": "beta",
        "KL Optimal (ComfyUI)": "kl_optimal",
        "Linear Quadratic": "linear_quadratic",
    }
)
#: Solvers that have a schedule of their own in the WebUI; here it is named.
_OWN_SCHEDULES: Mapping[str, str] = MappingProxyType({"DDIM": "ddim_uniform", "LCM": "sgm_uniform"})
_MAX_HEADER = 1 << 20  # of a file that /view_metadata reads
_POLL = (0.05, 2.0)  # seconds between two looks, at first and at most
_SAVE = "save"


@dataclass(frozen=True)
class _Prepared:
    """The names on the server of the files in use; of networks by SHA256."""

    checkpoint: str
    vae: str | None
    networks: Mapping[str, str]
    skips_layers: bool  # whether clip skip means something to this architecture


class ComfyUIRenderer(ServerRenderer[_Prepared]):
    """A `diffagent.render.renderer.Renderer` that asks a ComfyUI."""

    name = "comfyui"

    def __init__(self, server: Remote, **options: Any) -> None:
        """As `ServerRenderer`: ``names``, ``local``."""
        super().__init__(server, **options)
        self._lists: dict[tuple[str, str], list[str]] = {}
        self._embeddings: list[str] | None = None
        self._proven: set[tuple[str, str]] = set()

    @property
    def version(self) -> str:
        """The server's versions, devices and flags, as a digest."""
        stats = self.server.get("/system_stats")
        system = stats.get("system", {})
        told = {name: system.get(name) for name in ("comfyui_version", "pytorch_version", "argv")}
        told["devices"] = [device.get("name") for device in stats.get("devices", [])]
        return f"comfyui-{hashlib.sha256(canonical_json(told)).hexdigest()[:16]}"

    # One picture

    def _draw(self, recipe: Recipe, prepared: _Prepared) -> Image:
        graph = self.graph(recipe, prepared)
        asked: list[str] = []

        def ask() -> Image:
            asked.append(str(uuid.uuid4()))
            # A name of its own, or a graph that was drawn before is answered without a picture.
            graph[_SAVE]["inputs"]["filename_prefix"] = f"diffagent/{asked[-1]}"
            body = {"prompt": graph, "prompt_id": asked[-1]}  # older servers choose another id
            answer = parse(self.server.send("POST", "/prompt", body=body), "/prompt")
            asked[-1] = str(answer.get("prompt_id"))
            entry = self._wait(asked[-1])
            data = self.server.send("GET", "/view", params=_picture_of(entry))
            picture, texts = decode_picture(data, recipe.width, recipe.height)
            self._prove(graph, entry, texts)
            return picture

        try:
            return self.server.patiently(ask, abandon=lambda: self._abandon(asked[-1]))
        except BaseException:
            self._abandon(asked[-1])
            raise

    def graph(self, recipe: Recipe, prepared: _Prepared) -> Graph:
        """The recipe as a graph in API format."""
        sampler, scheduler = self._sampler(recipe)
        graph: Graph = {
            "checkpoint": _node("CheckpointLoaderSimple", ckpt_name=prepared.checkpoint)
        }
        model, clip, vae = ["checkpoint", 0], ["checkpoint", 1], ["checkpoint", 2]
        for i, use in enumerate(recipe.loras):
            graph[f"lora{i}"] = _node(
                "LoraLoader",
                model=model,
                clip=clip,
                lora_name=prepared.networks[use.sha256],
                strength_model=use.weight,
                strength_clip=use.weight,
            )
            model, clip = [f"lora{i}", 0], [f"lora{i}", 1]
        if recipe.clip_skip > 1 and prepared.skips_layers:
            graph["skip"] = _node(
                "CLIPSetLastLayer", clip=clip, stop_at_clip_layer=-recipe.clip_skip
            )
            clip = ["skip", 0]
        if prepared.vae:
            graph["vae"] = _node("VAELoader", vae_name=prepared.vae)
            vae = ["vae", 0]
        words = {sha256: f"embedding:{name}" for sha256, name in prepared.networks.items()}
        for name in ("prompt", "negative_prompt"):
            text = recipe.text(words, negative=name != "prompt")
            graph[name] = _node("CLIPTextEncode", clip=clip, text=text)
        size = recipe.model_dump(include={"width", "height"})
        graph["size"] = _node("EmptyLatentImage", **size, batch_size=1)
        graph["sample"] = _node(
            "KSampler",
            model=model,
            positive=["prompt", 0],
            negative=["negative_prompt", 0],
            latent_image=["size", 0],
            seed=recipe.seed,
            steps=recipe.steps,
            cfg=recipe.cfg_scale,
            sampler_name=sampler,
            scheduler=scheduler,
            denoise=1.0,
        )
        graph["decode"] = _node("VAEDecode", samples=["sample", 0], vae=vae)
        graph[_SAVE] = _node("SaveImage", images=["decode", 0], filename_prefix="diffagent")
        return graph

    def _wait(self, prompt_id: str) -> Mapping[str, Any]:
        """The finished entry of the history.

        Raises:
            RenderError: the server could not draw it.
            RenderServerError: it does not come to an end, or the server forgot it.
        """
        deadline = time.monotonic() + self.server.patience.read_timeout
        pause, _ = _POLL
        path = f"/history/{prompt_id}"
        while True:
            # Asking again costs nothing, drawing again does.
            history = self.server.get(path)
            entry = history.get(prompt_id) if isinstance(history, dict) else None
            if entry:
                _check_status(entry, path)
                return dict(entry)
            if prompt_id not in self._queued():
                if self.server.get(path):
                    continue  # it ended between the two looks
                raise RenderServerError(f"{self.server.url} forgot {prompt_id}: was it restarted?")
            if time.monotonic() > deadline:
                raise RenderServerError(
                    f"{self.server.url} did not draw it within "
                    f"{self.server.patience.read_timeout:.0f} s"
                )
            time.sleep(pause)
            pause = min(pause * 1.5, _POLL[1])

    def _queued(self, *, running: bool = False) -> set[str]:
        queue = self.server.get("/queue")
        waiting = [] if running else queue.get("queue_pending", [])
        return {str(item[1]) for item in (*queue.get("queue_running", []), *waiting)}

    def _abandon(self, prompt_id: str) -> None:
        """Take it out of the queue; stop the server when it is at it, and at nobody else's."""
        try:
            self.server.send("POST", "/queue", body={"delete": [prompt_id]})
            queue = parse(self.server.send("GET", "/queue"), "/queue")
            if prompt_id in {item[1] for item in queue.get("queue_running", [])}:
                self.server.send("POST", "/interrupt", body={"prompt_id": prompt_id})
        except Exception as error:  # on the way out of another error, which is the one to tell
            log.debug("could not ask %s to stop: %s", self.server.url, error)

    def _prove(self, graph: Graph, entry: Mapping[str, Any], texts: Mapping[str, str]) -> None:
        """Refuse a picture of another graph than the one that was sent.

        Raises:
            RenderError: reason 'wrong-answer'.
        """
        drawn = [entry["prompt"][2]] if len(entry.get("prompt") or ()) > 2 else []
        if "prompt" in texts:  # not with --disable-metadata
            drawn.append(parse(texts["prompt"].encode(), "the picture's graph"))
        for other in drawn:
            for name, node in graph.items():
                if (other.get(name) or {}).get("inputs") != node["inputs"]:
                    raise RenderError(
                        f"{self.server.url} drew with {other.get(name)} instead of {node}",
                        reason="wrong-answer",
                    )

    # What the server has

    def _find(self, files: Files) -> _Prepared:
        networks = {ref.sha256: self._looked_up("lora", ref) for ref in files.loras}
        return _Prepared(
            checkpoint=self._looked_up("checkpoint", files.checkpoint),
            vae=self._looked_up("vae", files.vae) if files.vae else None,
            networks=networks | {ref.sha256: self._embedding(ref) for ref in files.embeddings},
            # As in the WebUI: SDXL's encoders are trained at their own layer.
            skips_layers=ecosystem(files.checkpoint.base_model) != "sdxl",
        )

    def _looked_up(self, kind: str, ref: ModelRef) -> str:
        node, field, folder = _LISTED[kind]
        known = stems(ref, self._names)
        found = [name for name in self._list(node, field) if stem(name) in known]
        if not found and kind not in self._refreshed:  # it may have been put there since
            self._refreshed.add(kind)
            self._lists.pop((node, field))
            found = [name for name in self._list(node, field) if stem(name) in known]
        name = self._only(found, ref)
        self._compare(folder, name, ref)
        return name

    def _embedding(self, ref: ModelRef) -> str:
        known = stems(ref, self._names)
        if self._embeddings is None:
            self._embeddings = [str(name) for name in self.server.get("/embeddings")]
        return self._only([name for name in self._embeddings if stem(name) in known], ref)

    def _only(self, found: Sequence[str], ref: ModelRef) -> str:
        if len(found) == 1:
            return found[0]
        raise RenderError(
            f"{self.server.url} has {len(found) or 'no'} files of the name of {ref.name!r} "
            f"({ref.sha256[:10]}); say in runtime.render_server.models which one it is",
            reason="ambiguous-on-server" if found else "missing-on-server",
        )

    def _compare(self, folder: str, name: str, ref: ModelRef) -> None:
        """Compare what the headers of the server's and of the local file say.

        Raises:
            RenderError: they are not the same file; reason 'wrong-model'.
        """
        if (folder, name) in self._proven:
            return
        path = self._local(ref.sha256)
        mine = metadata_of(path) if path and path.stat().st_size else {}
        if not mine or len(json.dumps(mine)) > _MAX_HEADER // 2:
            log.warning("%s: %r is taken for %s by its name alone", self.server.url, name, ref.name)
        else:
            there = self.server.get_if_there(f"/view_metadata/{folder}", filename=name)
            if there != mine:
                raise RenderError(
                    f"{name!r} of {self.server.url} is not {ref.name!r} ({ref.sha256[:10]}): their "
                    "headers differ",
                    reason="wrong-model",
                )
        self._proven.add((folder, name))

    def _sampler(self, recipe: Recipe) -> tuple[str, str]:
        """Names of the sampler and the schedule on this server."""
        spec = SAMPLERS[recipe.sampler]
        listed = self._list("KSampler", "sampler_name")
        # "..._gpu" draws its noise on the GPU: other pictures than on the next machine.
        solvers = [
            name for name in listed if not name.endswith("_gpu") and normalise(name) == spec.solver
        ]
        schedule = _OWN_SCHEDULES.get(spec.solver, _SCHEDULES.get(spec.schedule))
        if not solvers or schedule is None or schedule not in self._list("KSampler", "scheduler"):
            raise RenderError(
                f"{self.server.url} has no sampler {recipe.sampler!r}", reason="unsupported-sampler"
            )
        return solvers[0], schedule

    def _list(self, node: str, field: str) -> list[str]:
        """The values that an input of a node may have."""
        if (node, field) not in self._lists:
            info = self.server.get(f"/object_info/{node}")
            values = info.get(node, {}).get("input", {}).get("required", {}).get(field, [[]])
            if values[0] == "COMBO":  # nodes of the newer kind
                values = [values[1].get("options", [])]
            self._lists[node, field] = [str(value) for value in values[0]]
        return self._lists[node, field]


def _node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def _check_status(entry: Mapping[str, Any], path: str) -> None:
    status = entry.get("status") or {}  # older servers have none
    if status.get("status_str", "success") == "success":
        return
    told = [data for event, data in status.get("messages", []) if event == "execution_error"]
    if not told:
        raise RenderError(f"{path}: somebody stopped it", reason="server-error")
    said = "{node_type}: {exception_type}: {exception_message}".format_map(
        {"node_type": "?", "exception_type": "?", "exception_message": "?", **told[0]}
    )
    raise failure(path, said)


def _picture_of(entry: Mapping[str, Any]) -> dict[str, str]:
    """The parameters of ``/view`` for the picture of an entry."""
    try:
        image = entry["outputs"][_SAVE]["images"][0]
        return {name: str(image[name]) for name in ("filename", "subfolder", "type")}
    except (KeyError, IndexError, TypeError):
        raise RenderError("the answer has no picture", reason="bad-picture") from None
