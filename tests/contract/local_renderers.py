"""A WebUI and a ComfyUI without models: the calls that the backends use, over real sockets.

They do what the real ones do where a client can be misled (docs/how-to/render-on-a-server.md says
where that
was read): the WebUI falls back to another checkpoint or sampler and leaves out LoRAs without a
word; ComfyUI answers a graph that it has drawn before without a picture. Pictures are one colour,
derived from what determines them.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from PIL import Image
from PIL.PngImagePlugin import PngInfo

Answer = tuple[int, bytes, dict[str, str]]
JSON = {"Content-Type": "application/json"}


def reply(value: Any, status: int = 200) -> Answer:
    """A JSON answer."""
    return status, json.dumps(value).encode(), JSON


def png(width: int, height: int, of: str, **texts: str) -> bytes:
    """A picture of one colour that depends on ``of``; 'black' is black."""
    info = PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    red, green, blue = hashlib.sha256(of.encode()).digest()[:3]
    colour = (0, 0, 0) if of == "black" else (red, green, blue | 1)
    data = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(data, format="PNG", pnginfo=info)
    return data.getvalue()


class LocalServer:
    """Answers by path; ``faults[path]`` are played once each, in order, before it works.

    A fault is a status, an answer, 'cut' (the connection breaks within the body) or a function
    that changes the answer.
    """

    def __init__(self) -> None:
        self.faults: dict[str, list[Any]] = {}
        self.asked: list[tuple[str, str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.auth = ""
        self.url = ""

    def paths(self) -> list[str]:
        """What was asked for, in order."""
        return [path for _, path, _ in self.asked]

    def bodies(self, path: str) -> list[Any]:
        """What was sent to a path."""
        return [body for _, asked, body in self.asked if asked == path]

    def answer(self, method: str, path: str, query: dict[str, str], body: Any) -> Answer:
        """The answer to one call."""
        raise NotImplementedError

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        """Answer a call, with the fault that is due."""
        parts = urlsplit(request.path)
        raw = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        body = json.loads(raw) if raw else None
        self.asked.append((request.command, parts.path, body))
        self.headers.append(dict(request.headers))
        if self.auth and request.headers.get("Authorization") != self.auth:
            return _send(request, reply({"detail": "Incorrect username or password"}, 401))
        fault = self.faults[parts.path].pop(0) if self.faults.get(parts.path) else None
        if isinstance(fault, int):
            return _send(request, reply({"error": "Fault", "errors": "out of luck"}, fault))
        if isinstance(fault, tuple):
            return _send(request, fault)
        answer = self.answer(request.command, parts.path, dict(parse_qsl(parts.query)), body)
        if callable(fault):
            answer = fault(answer)
        _send(request, answer, cut=fault == "cut")


def _send(request: BaseHTTPRequestHandler, answer: Answer, *, cut: bool = False) -> None:
    status, body, headers = answer
    request.send_response_only(status)
    for name, value in headers.items():
        request.send_header(name, value)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    request.wfile.write(body[: len(body) // 2] if cut else body)
    if cut:
        request.wfile.flush()
        request.connection.shutdown(socket.SHUT_RDWR)
        request.close_connection = True


@contextmanager
def serving(server: LocalServer) -> Iterator[LocalServer]:
    """Serve in threads as long as the block lasts."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            server.handle(self)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: Any) -> None:
            """Nothing on the terminal."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{http.server_port}"
    threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()


# --- AUTOMATIC1111 ----------------------------------------------------------------------------


class LocalWebUI(LocalServer):
    """The WebUI 1.10; ``forge`` and ``old`` (before 1.9) change what it has.

    ``files``: name -> content of checkpoints; ``loras``, ``vaes`` and ``embeddings`` as well.
    """

    def __init__(self, *, forge: bool = False, old: bool = False) -> None:
        super().__init__()
        self.forge, self.old = forge, old
        self.files: dict[str, bytes] = {}
        self.loras: dict[str, bytes] = {}
        self.aliases: dict[str, str] = {}
        self.vaes: dict[str, bytes] = {}
        self.embeddings: dict[str, bytes] = {}
        self.hashed: set[str] = set()
        self.loaded = ""
        self.options: dict[str, Any] = {
            "sd_model_checkpoint": "",
            "CLIP_stop_at_last_layers": 1,
            "add_model_hash_to_info": False,
            "add_vae_hash_to_info": False,
            "lora_add_hashes_to_infotext": False,
            "textual_inversion_add_hashes_to_infotext": False,
            "randn_source": "GPU",
            "samples_format": "jpg",
            **({"forge_additional_modules": []} if forge else {"sd_vae": "Automatic"}),
        }
        self.says: Callable[[str], str] = lambda text: text
        self.running = ""

    def answer(self, method: str, path: str, query: dict[str, str], body: Any) -> Answer:
        """The sdapi."""
        calls: dict[str, Callable[[], Any]] = {
            "options": lambda: self.options,
            "sd-models": lambda: [self._model(name) for name in self.files],
            "samplers": self._samplers,
            "loras": lambda: [
                {"name": name, "alias": self.aliases.get(name, name), "metadata": {},
                 "path": f"/srv/models/Lora/sub/{name}.safetensors"}
                for name in self.loras
            ],
            "embeddings": lambda: {
                "loaded": {name: {"vectors": 1} for name in self.embeddings}, "skipped": {},
            },
            "refresh-checkpoints": lambda: None,
            "refresh-loras": lambda: None,
            "refresh-vae": lambda: None,
            "interrupt": lambda: {},
            "progress": lambda: {"progress": 0.5, "state": {}},
        }  # fmt: skip
        vaes = [{"model_name": f"{n}.safetensors", "filename": f"/srv/models/VAE/{n}.safetensors"}
                for n in self.vaes]  # fmt: skip
        calls["sd-modules" if self.forge else "sd-vae"] = lambda: vaes
        if not self.old:
            labels = ("Automatic", "Uniform", "Karras", "Exponential", "SGM Uniform", "Beta")
            labels += ("Simple", "DDIM")
            calls["schedulers"] = lambda: [{"name": n.lower(), "label": n} for n in labels]
        if path == "/internal/progress":
            return reply({"active": body["id_task"] == self.running, "queued": False})
        name = path.removeprefix("/sdapi/v1/")
        if name == "txt2img" and method == "POST":
            return self._txt2img(body)
        return reply(calls[name]()) if name in calls else reply({"detail": "Not Found"}, 404)

    def _model(self, name: str) -> dict[str, Any]:
        digest = hashlib.sha256(self.files[name]).hexdigest() if name in self.hashed else None
        return {
            "title": f"{name} [{digest[:10]}]" if digest else name,
            "model_name": name.removesuffix(".safetensors"),
            "hash": digest and digest[:10],
            "sha256": digest,
            "filename": f"C:\\models\\Stable-diffusion\\{name}",
        }

    def _samplers(self) -> list[dict[str, Any]]:
        names = ["Euler a", "Euler", "DPM++ 2M", "DPM++ SDE", "DDIM"]
        if self.old:
            names += ["DPM++ 2M Karras", "DPM++ SDE Karras"]
        return [{"name": name, "aliases": [], "options": {}} for name in names]

    def _txt2img(self, body: dict[str, Any]) -> Answer:
        settings = body["override_settings"]
        if settings.keys() - self.options.keys():  # as older versions do
            return reply({"error": "KeyError", "errors": "an option that is not there"}, 500)
        titles = {self._model(name)["title"]: name for name in self.files} | {
            n: n for n in self.files
        }
        wanted = titles.get(settings.get("sd_model_checkpoint"))
        self.loaded = wanted or self.loaded or next(iter(self.files))  # without a word
        self.hashed.add(self.loaded)
        text = self.says(self._infotext(body, {**self.options, **settings}))
        data = png(body["width"], body["height"], f"{self.loaded}{text}", parameters=text)
        info = {"infotexts": [text], "seed": body["seed"]}
        return reply({"images": [base64.b64encode(data).decode()], "parameters": {},
                      "info": json.dumps(info)})  # fmt: skip

    def _infotext(self, body: dict[str, Any], settings: dict[str, Any]) -> str:
        listed = [sampler["name"] for sampler in self._samplers()]
        sampler = body["sampler_name"] if body["sampler_name"] in listed else listed[0]
        fields = {"Steps": body["steps"], "Sampler": sampler}
        if not self.old:
            fields["Schedule type"] = body.get("scheduler", "Automatic")
        fields |= {
            "CFG scale": body["cfg_scale"],
            "Seed": body["seed"],
            "Size": f"{body['width']}x{body['height']}",
        }
        if settings["add_model_hash_to_info"]:
            fields["Model hash"] = hashlib.sha256(self.files[self.loaded]).hexdigest()[:10]
        fields["Model"] = self.loaded.removesuffix(".safetensors")
        for number, module in enumerate(settings.get("forge_additional_modules", []), 1):
            fields[f"Module {number}"] = module.removesuffix(".safetensors")
        if settings.get("sd_vae", "None") != "None" and settings["add_vae_hash_to_info"]:
            name = settings["sd_vae"].removesuffix(".safetensors")
            fields["VAE hash"] = hashlib.sha256(self.vaes[name]).hexdigest()[:10]
        if settings["CLIP_stop_at_last_layers"] > 1:
            fields["Clip skip"] = settings["CLIP_stop_at_last_layers"]
        loras = [
            name for name in re.findall(r"<lora:([^:>]+):", body["prompt"]) if name in self.loras
        ]
        if loras and settings["lora_add_hashes_to_infotext"]:
            hashes = [f"{name}: {payload_of(self.loras[name])}" for name in loras]
            fields["Lora hashes"] = json.dumps(", ".join(hashes))
        both = f"{body['prompt']} {body['negative_prompt']}"
        used = [name for name in self.embeddings if re.search(rf"\b{name}\b", both)]
        if used and not self.forge and settings["textual_inversion_add_hashes_to_infotext"]:
            hashes = [f"{n}: {hashlib.sha256(self.embeddings[n]).hexdigest()[:12]}" for n in used]
            fields["TI hashes"] = json.dumps(", ".join(hashes))
        negative = (
            f"\nNegative prompt: {body['negative_prompt']}" if body["negative_prompt"] else ""
        )
        line = ", ".join(f"{name}: {value}" for name, value in fields.items())
        return (
            f"{body['prompt']}{negative}\n{line}, RNG: {settings['randn_source']}, Version: v1.10.1"
        )


def payload_of(data: bytes) -> str:
    """AutoV3 of a safetensors file's content."""
    return hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()[:12]


# --- ComfyUI ----------------------------------------------------------------------------------


class LocalComfyUI(LocalServer):
    """ComfyUI's queue; a prompt is drawn at the ``patience``-th look at its history."""

    def __init__(self) -> None:
        super().__init__()
        self.models: dict[str, list[str]] = {"checkpoints": [], "loras": [], "vae": []}
        self.metadata: dict[str, dict[str, str]] = {}
        self.embeddings: list[str] = []
        self.patience = 2
        self.error: dict[str, str] | None = None
        self.changes: Callable[[dict[str, Any]], dict[str, Any]] = lambda graph: graph
        self.queue: dict[str, list[Any]] = {}
        self.history: dict[str, Any] = {}
        self.saved: dict[str, bytes] = {}
        self.drawn: set[str] = set()

    def answer(self, method: str, path: str, query: dict[str, str], body: Any) -> Answer:
        """The routes of server.py."""
        match method, path.split("/")[1:]:
            case "POST", ["prompt"]:
                return self._queue(body)
            case "GET", ["history", prompt_id]:
                self._work(prompt_id)
                entry = self.history.get(prompt_id)
                return reply({prompt_id: entry} if entry else {})
            case "GET", ["queue"]:
                running = [[0, prompt_id, *rest] for prompt_id, (_, *rest) in self.queue.items()]
                return reply({"queue_running": running[:1], "queue_pending": running[1:]})
            case "POST", ["queue"]:
                for prompt_id in [*self.queue][1:]:
                    if prompt_id in body["delete"]:
                        del self.queue[prompt_id]
                return 200, b"", {}
            case "POST", ["interrupt"]:
                self.queue.pop(body["prompt_id"], None)
                return 200, b"", {}
            case "GET", ["view"]:
                data = self.saved.get(f"{query['subfolder']}/{query['filename']}")
                return (200, data, {"Content-Type": "image/png"}) if data else (404, b"", {})
            case "GET", ["object_info", node]:
                return reply({node: {"input": {"required": self._inputs(node)}}})
            case "GET", ["embeddings"]:
                return reply(self.embeddings)
            case "GET", ["system_stats"]:
                return reply({"system": {"comfyui_version": "0.3.60", "argv": ["main.py"]},
                              "devices": [{"name": "cpu", "free": len(self.asked)}]})  # fmt: skip
            case "GET", ["view_metadata", _]:
                found = self.metadata.get(query["filename"])
                return reply(found) if found else (404, b"", {})
        return 404, b"", {}

    def _inputs(self, node: str) -> dict[str, Any]:
        samplers = ["euler", "euler_ancestral", "dpmpp_2m", "dpmpp_sde_gpu", "dpmpp_sde", "ddim"]
        schedulers = ["normal", "karras", "exponential", "sgm_uniform", "ddim_uniform", "beta"]
        schedulers += ["simple", "kl_optimal"]
        return {
            "CheckpointLoaderSimple": {"ckpt_name": [self.models["checkpoints"], {}]},
            "LoraLoader": {"model": ["MODEL"], "clip": ["CLIP"],
                           "lora_name": [self.models["loras"], {}]},
            "VAELoader": {"vae_name": ["COMBO", {"options": self.models["vae"]}]},
            "KSampler": {"model": ["MODEL"], "sampler_name": [samplers], "scheduler": [schedulers],
                         "positive": ["CONDITIONING"], "negative": ["CONDITIONING"],
                         "latent_image": ["LATENT"]},
            "CLIPTextEncode": {"clip": ["CLIP"], "text": ["STRING", {}]},
            "CLIPSetLastLayer": {"clip": ["CLIP"], "stop_at_clip_layer": ["INT", {}]},
            "EmptyLatentImage": {"width": ["INT", {}], "height": ["INT", {}]},
            "VAEDecode": {"samples": ["LATENT"], "vae": ["VAE"]},
            "SaveImage": {"images": ["IMAGE"], "filename_prefix": ["STRING", {}]},
        }[node]  # fmt: skip

    OUTPUTS: dict[str, tuple[str, ...]] = {  # noqa: RUF012
        "CheckpointLoaderSimple": ("MODEL", "CLIP", "VAE"),
        "LoraLoader": ("MODEL", "CLIP"),
        "VAELoader": ("VAE",),
        "KSampler": ("LATENT",),
        "CLIPTextEncode": ("CONDITIONING",),
        "CLIPSetLastLayer": ("CLIP",),
        "EmptyLatentImage": ("LATENT",),
        "VAEDecode": ("IMAGE",),
    }

    def _queue(self, body: dict[str, Any]) -> Answer:
        errors = {name: error for name, node in body["prompt"].items()
                  if (error := self._invalid(body["prompt"], node))}  # fmt: skip
        if errors:
            told = {"type": "prompt_outputs_failed_validation", "message": "failed validation"}
            return reply(
                {"error": told, "node_errors": {n: {"errors": [e]} for n, e in errors.items()}}, 400
            )
        self.queue[body["prompt_id"]] = [0, self.changes(body["prompt"])]
        return reply({"prompt_id": body["prompt_id"], "number": 1, "node_errors": {}})

    def _invalid(self, graph: dict[str, Any], node: dict[str, Any]) -> str:
        for name, spec in self._inputs(node["class_type"]).items():
            if name not in node["inputs"]:
                return f"{name}: required input is missing"
            value, kind = node["inputs"][name], spec[0]
            kind = spec[1]["options"] if kind == "COMBO" else kind
            if isinstance(value, list):
                outputs = self.OUTPUTS[graph[value[0]]["class_type"]]
                if outputs[value[1]] != kind:
                    return f"{name}: {outputs[value[1]]} != {kind}"
            elif isinstance(kind, list) and value not in kind:
                return f"{name}: {value!r} not in {kind}"
        return ""

    def _work(self, prompt_id: str) -> None:
        job = self.queue.get(prompt_id)
        if job is None:
            return
        job[0] += 1
        if job[0] < self.patience:
            return
        del self.queue[prompt_id]
        graph, outputs = job[1], {}
        if self.error:
            messages = [["execution_start", {}], ["execution_error", self.error]]
            status = {"status_str": "error", "completed": False, "messages": messages}
        else:
            status = {"status_str": "success", "completed": True, "messages": []}
            if json.dumps(graph) not in self.drawn:  # else every node is cached
                outputs = {"save": {"images": [self._save(graph)]}}
            self.drawn.add(json.dumps(graph))
        self.history[prompt_id] = {"prompt": [0, prompt_id, graph, {}, ["save"]],
                                   "outputs": outputs, "status": status}  # fmt: skip

    def _save(self, graph: dict[str, Any]) -> dict[str, str]:
        folder, _, name = graph["save"]["inputs"]["filename_prefix"].partition("/")
        size = graph["size"]["inputs"]
        what = {key: node for key, node in graph.items() if key != "save"}
        data = png(size["width"], size["height"], json.dumps(what), prompt=json.dumps(graph))
        self.saved[f"{folder}/{name}_00001_.png"] = data
        return {"filename": f"{name}_00001_.png", "subfolder": folder, "type": "output"}
