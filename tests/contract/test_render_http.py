"""The A1111 and ComfyUI backends against local servers over real sockets, with their faults."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save

from diffagent.errors import ConfigError, RenderError, RenderServerError
from diffagent.render.http.comfyui import ComfyUIRenderer
from diffagent.render.http.remote import AUTH_VARIABLE, Remote
from diffagent.render.http.webui import A1111Renderer
from diffagent.render.pnginfo import read_png
from diffagent.render.recipe import EmbeddingUse, LoRAUse, Recipe
from diffagent.render.render_stage import REASONS
from diffagent.render.renderer import Files, ModelRef, Renderer
from diffagent.retries import Patience
from diffagent.schemas.runtime import RenderServerSettings
from diffagent.t2i.samplers import SAMPLERS
from tests.contract.local_renderers import (
    Answer,
    LocalComfyUI,
    LocalWebUI,
    png,
    reply,
    serving,
)
from tests.render.test_render_stage import World, rows

QUICK = Patience(first=0.01, longest=0.05, budget=2.0, connect_timeout=1.0, read_timeout=1.0)
TXT2IMG = "/sdapi/v1/txt2img"


def model(number: int, **metadata: str) -> bytes:
    """A safetensors file of its own."""
    return save({"weight": np.full(4, number, np.float32)}, metadata or None)


FILES = {
    name: model(i, note=name)
    for i, name in enumerate(("base", "other", "ink", "oil", "vae", "fog"))
}
SHA = {name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()}


def ref(name: str, base_model: str = "SD 1.5") -> ModelRef:
    return ModelRef(SHA[name], name.title(), base_model, f"{name}.safetensors")


BASE = Files(ref("base"))
RECIPE = Recipe(
    prompt="a (red:1.2) cube",
    negative_prompt="blurry",
    checkpoint=SHA["base"],
    sampler="DPM++ 2M Karras",
    steps=20,
    cfg_scale=6.5,
    width=64,
    height=96,
    clip_skip=1,
    seed=2**33 + 1,
)
FULL = RECIPE.model_copy(
    update={
        "vae": SHA["vae"],
        "loras": (
            LoRAUse(sha256=SHA["ink"], weight=0.8),
            LoRAUse(sha256=SHA["oil"], weight=-0.25),
        ),
        "embeddings": (
            EmbeddingUse(sha256=SHA["fog"], weight=1, negative=True),
            EmbeddingUse(sha256=SHA["fog"], weight=1.5, negative=False),
        ),
        "clip_skip": 2,
    }
)
FULL_FILES = Files(ref("base"), ref("vae"), (ref("ink"), ref("oil")), (ref("fog"),))


def draw(renderer: Renderer, recipe: Recipe = RECIPE, files: Files = BASE) -> Image.Image:
    """One picture, or its error raised."""
    renderer.check(recipe, files)
    renderer.prepare(files)
    (made,) = renderer.render([recipe])
    if isinstance(made, RenderError):
        raise made
    return made


def fails(renderer: Renderer, reason: str, recipe: Recipe = RECIPE, files: Files = BASE) -> str:
    """The message of the error that a recipe fails with."""
    with pytest.raises(RenderError) as failed:
        draw(renderer, recipe, files)
    assert failed.value.reason == reason
    assert not failed.value.retryable
    return str(failed.value)


@pytest.fixture
def local(tmp_path: Path) -> Callable[[str], Path | None]:
    """The same files here, by SHA256."""
    for name, data in FILES.items():
        (tmp_path / f"{name}.safetensors").write_bytes(data)
    return {SHA[name]: tmp_path / f"{name}.safetensors" for name in FILES}.get


def fill(server: LocalWebUI) -> LocalWebUI:
    """Put the files into a WebUI's folders; one checkpoint has been hashed."""
    server.files = {f"{name}.safetensors": FILES[name] for name in ("other", "base")}
    server.hashed = {"base.safetensors"}
    server.loras = {name: FILES[name] for name in ("ink", "oil")}
    server.vaes = {"vae": FILES["vae"]}
    server.embeddings = {"fog": FILES["fog"]}
    return server


@pytest.fixture
def webui() -> Iterator[LocalWebUI]:
    with serving(fill(LocalWebUI())) as server:
        assert isinstance(server, LocalWebUI)
        yield server


@pytest.fixture
def comfyui() -> Iterator[LocalComfyUI]:
    server = LocalComfyUI()
    server.models = {
        "checkpoints": ["other.safetensors", "sd15\\base.safetensors"],
        "loras": ["styles/ink.safetensors", "oil.safetensors"],
        "vae": ["vae.safetensors"],
    }
    server.embeddings = ["fog"]
    names = (name for listed in server.models.values() for name in listed)
    server.metadata = {
        n: {"note": n.replace("\\", "/").rpartition("/")[2].partition(".")[0]} for n in names
    }
    with serving(server):
        yield server


def a1111(server: LocalWebUI, **options: Any) -> A1111Renderer:
    return A1111Renderer(Remote(server.url, patience=QUICK, secret=""), **options)


def comfy(server: LocalComfyUI, **options: Any) -> ComfyUIRenderer:
    return ComfyUIRenderer(Remote(server.url, patience=QUICK, secret=""), **options)


# --- AUTOMATIC1111 and Forge ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["webui", "old", "forge"])
def test_a1111_draws_the_recipe(kind: str, local: Callable[[str], Path | None]) -> None:
    with serving(fill(LocalWebUI(forge=kind == "forge", old=kind == "old"))) as server:
        assert isinstance(server, LocalWebUI)
        renderer = a1111(server, local=local)
        picture = draw(renderer, FULL, FULL_FILES)
        assert (picture.size, picture.mode) == ((64, 96), "RGB")
        assert draw(renderer, FULL, FULL_FILES).tobytes() == picture.tobytes()
        assert draw(renderer).tobytes() != picture.tobytes()
        first, _, plain = server.bodies(TXT2IMG)
    assert first["prompt"] == "(fog:1.5), a (red:1.2) cube <lora:ink:0.8> <lora:oil:-0.25>"
    assert first["negative_prompt"] == "fog, blurry"
    assert (first["seed"], first["width"], first["height"]) == (2**33 + 1, 64, 96)
    settings = first["override_settings"]
    assert settings["CLIP_stop_at_last_layers"] == 2
    assert (settings["randn_source"], settings["samples_format"]) == ("CPU", "png")
    if kind == "forge":
        assert settings["forge_additional_modules"] == ["vae.safetensors"]
        assert plain["override_settings"]["forge_additional_modules"] == []
    else:
        assert settings["sd_vae"] == "vae.safetensors"
        assert plain["override_settings"]["sd_vae"] == "None"  # and not what its owner chose
    if kind == "old":
        assert (first["sampler_name"], "scheduler" in first) == ("DPM++ 2M Karras", False)
    else:
        assert (first["sampler_name"], first["scheduler"]) == ("DPM++ 2M", "Karras")
    assert renderer.loads == 1


@pytest.mark.parametrize(
    ("sampler", "label"),
    [
        ("DPM++ 2M", "Uniform"),
        ("DPM++ 2M SGM Uniform", "SGM Uniform"),
        ("DPM++ 2M Simple", "Simple"),
        ("DPM++ 2M DDIM Uniform", "DDIM"),
        ("Euler a Beta", "Beta"),
        ("Euler a", "Uniform"),
        ("DDIM", "Automatic"),
    ],
)
def test_a1111_schedules(webui: LocalWebUI, sampler: str, label: str) -> None:
    draw(a1111(webui), RECIPE.model_copy(update={"sampler": sampler}))
    (body,) = webui.bodies(TXT2IMG)
    assert (body["sampler_name"], body["scheduler"]) == (SAMPLERS[sampler].solver, label)


def test_the_webui_lacks_the_schedules_of_comfyui(webui: LocalWebUI) -> None:
    recipe = RECIPE.model_copy(update={"sampler": "Euler a Beta (ComfyUI)"})
    fails(a1111(webui), "unsupported-sampler", recipe)


def test_a_file_that_the_webui_has_not_hashed_is_found_by_name_and_proven(
    webui: LocalWebUI,
) -> None:
    webui.hashed.clear()
    draw(a1111(webui))
    assert (
        webui.bodies(TXT2IMG)[0]["override_settings"]["sd_model_checkpoint"] == "base.safetensors"
    )
    webui.files["base.safetensors"] = model(9)  # another file of that name
    webui.hashed.clear()
    assert "instead of" in fails(a1111(webui), "wrong-model")
    webui.hashed.add("base.safetensors")  # now it says so itself
    fails(a1111(webui), "missing-on-server")
    renamed = {SHA["base"]: "other.safetensors"}
    webui.files["other.safetensors"], webui.hashed = FILES["base"], set()
    draw(a1111(webui, names=renamed))


def test_what_the_webui_lacks_is_missing_and_nothing_is_drawn(webui: LocalWebUI) -> None:
    del webui.files["base.safetensors"]
    renderer = a1111(webui)
    message = fails(renderer, "missing-on-server")
    assert "'Base'" in message
    assert SHA["base"][:10] in message
    assert TXT2IMG not in webui.paths()
    assert webui.paths().count("/sdapi/v1/refresh-checkpoints") == 1
    webui.files["base.safetensors"] = FILES["base"]
    draw(a1111(webui))
    for name, update in (
        ("loras", {"loras": FULL.loras}),
        ("vaes", {"vae": FULL.vae}),
        ("embeddings", {"embeddings": FULL.embeddings}),
    ):
        getattr(webui, name).clear()
        fails(a1111(webui), "missing-on-server", RECIPE.model_copy(update=update), FULL_FILES)
    fails(a1111(webui), "unsupported-sampler", RECIPE.model_copy(update={"sampler": "LMS"}))


def test_a_lora_whose_name_is_another_ones_alias_is_ambiguous(webui: LocalWebUI) -> None:
    webui.aliases["oil"] = "ink"
    recipe = RECIPE.model_copy(update={"loras": FULL.loras[:1]})
    fails(a1111(webui), "ambiguous-on-server", recipe, Files(ref("base"), loras=(ref("ink"),)))


def test_a_lora_of_another_content_is_refused(
    webui: LocalWebUI, local: Callable[[str], Path | None]
) -> None:
    webui.loras["ink"] = model(77)
    recipe = RECIPE.model_copy(update={"loras": FULL.loras[:1]})
    files = Files(ref("base"), loras=(ref("ink"),))
    fails(a1111(webui, local=local), "wrong-model", recipe, files)


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        (("Seed: 8589934593", "Seed: 5"), "wrong-answer"),
        (("Schedule type: Karras", "Schedule type: Exponential"), "wrong-answer"),
        (("Sampler: DPM++ 2M", "Sampler: Euler"), "wrong-answer"),
        (("Steps: 20", "Steps: 30"), "wrong-answer"),
        (("CFG scale: 6.5", "CFG scale: 7"), "wrong-answer"),
        (("Clip skip: 2, ", ""), "wrong-answer"),
        (("cube <lora:ink", "sphere <lora:ink"), "wrong-answer"),
        (("Negative prompt: fog, blurry", "Negative prompt: fog"), "wrong-answer"),
        (("ink: ", "pencil: "), "wrong-answer"),
        (("fog: ", "mist: "), "wrong-answer"),
        ((f"Model hash: {SHA['base'][:10]}", f"Model hash: {SHA['other'][:10]}"), "wrong-model"),
        ((f"Model hash: {SHA['base'][:10]}, ", ""), "unverified-model"),
        ((f"VAE hash: {SHA['vae'][:10]}", "VAE hash: 0123456789"), "wrong-model"),
        ((f"VAE hash: {SHA['vae'][:10]}, ", ""), "wrong-model"),
        ((SHA["fog"][:12], "0123456789ab"), "wrong-model"),
    ],
)  # fmt: skip
def test_an_answer_that_is_not_the_recipes_is_refused(
    webui: LocalWebUI, told: tuple[str, str], reason: str
) -> None:
    def says(text: str) -> str:
        assert told[0] in text
        return text.replace(*told)

    webui.says = says
    fails(a1111(webui), reason, FULL, FULL_FILES)
    assert len(webui.bodies(TXT2IMG)) == 1  # it would say the same again


def picture(data: bytes) -> Callable[[Answer], Answer]:
    """A fault: another file for the picture."""

    def change(answer: Answer) -> Answer:
        body = json.loads(answer[1])
        return reply({**body, "images": [base64.b64encode(data).decode()]})

    return change


WHOLE = png(64, 96, "x")
FAULTS: list[Any] = [
    500,
    502,
    503,
    (429, b"queue full", {"Retry-After": "0"}),
    "cut",
    (200, b"<html>a proxy", {"Content-Type": "text/html"}),
    (200, b'{"images": [', {}),
    picture(WHOLE[:-40]),
    picture(b""),
]


@pytest.mark.parametrize("fault", FAULTS)
def test_what_passes_is_tried_again(webui: LocalWebUI, fault: Any) -> None:
    renderer = a1111(webui)
    picture = draw(renderer)
    webui.faults[TXT2IMG] = [fault, fault]
    assert draw(renderer).tobytes() == picture.tobytes()
    assert len(webui.bodies(TXT2IMG)) == 4


@pytest.mark.parametrize(
    ("fault", "reason", "tries"),
    [
        (500, "server-error", 3),
        (picture(WHOLE[:-40]), "bad-picture", 3),
        (reply({"error": "OutOfMemoryError", "errors": "CUDA out of memory. Tried"}, 500),
         "out-of-memory", 1),
        (reply({"error": "NansException", "errors": "A tensor with all NaNs"}, 500), "nan", 1),
        (reply({"detail": [{"loc": ["body", "steps"], "msg": "wrong"}]}, 422), "server-refused", 1),
        (picture(png(64, 96, "black")), "black", 1),
        (picture(png(64, 64, "x")), "wrong-answer", 1),
    ],
)  # fmt: skip
def test_a_picture_fails_and_the_next_one_is_drawn(
    webui: LocalWebUI, fault: Any, reason: str, tries: int
) -> None:
    renderer = a1111(webui)
    renderer.prepare(BASE)
    webui.faults[TXT2IMG] = [fault] * tries
    first, second = renderer.render([RECIPE, RECIPE])
    assert isinstance(first, RenderError)
    assert first.reason == reason
    assert isinstance(second, Image.Image)
    assert len(webui.bodies(TXT2IMG)) == tries + 1


def test_a_server_that_is_away_ends_the_run(webui: LocalWebUI) -> None:
    renderer = a1111(webui)
    renderer.prepare(BASE)
    webui.faults[TXT2IMG] = [503] * 1000
    started = time.monotonic()
    with pytest.raises(RenderServerError, match="gave up after") as gone:
        list(renderer.render([RECIPE]))
    assert gone.value.retryable
    assert time.monotonic() - started < 2 * QUICK.budget
    webui.faults.clear()
    nobody = A1111Renderer(Remote("http://127.0.0.1:9", patience=QUICK, secret=""))
    with pytest.raises(RenderServerError):
        nobody.check(RECIPE, BASE)


def test_a_task_that_takes_too_long_is_interrupted_and_nobody_elses(webui: LocalWebUI) -> None:
    release = threading.Event()

    def slow(answer: Answer) -> Answer:
        webui.running = webui.bodies(TXT2IMG)[-1]["force_task_id"]
        release.wait(5)
        return answer

    webui.faults[TXT2IMG] = [slow]
    patience = Patience(first=0.01, longest=0.05, budget=3.0, connect_timeout=1, read_timeout=0.2)
    renderer = A1111Renderer(Remote(webui.url, patience=patience, secret=""))
    draw(renderer)
    release.set()
    assert webui.paths().count("/sdapi/v1/interrupt") == 1
    webui.running = "task(somebody-else)"
    webui.faults[TXT2IMG] = [500]
    draw(renderer)
    assert webui.paths().count("/sdapi/v1/interrupt") == 1


def test_the_version_changes_with_settings_that_change_pixels(webui: LocalWebUI) -> None:
    webui.options["s_churn"] = 0.0
    before = a1111(webui).version
    webui.options["some_colour_of_the_page"] = "blue"
    assert a1111(webui).version == before
    webui.options["s_churn"] = 0.5
    assert a1111(webui).version != before


# --- both -------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["a cat <lora:ink:1>", "<hypernet:x:1>", "embedding:fog, a cat"])
def test_a_prompt_cannot_load_networks(
    webui: LocalWebUI, comfyui: LocalComfyUI, prompt: str
) -> None:
    for update in ({"prompt": prompt}, {"negative_prompt": prompt}):
        recipe = RECIPE.model_copy(update=update)
        fails(a1111(webui), "prompt-network", recipe)
        fails(comfy(comfyui), "prompt-network", recipe)


@pytest.mark.parametrize("secret", ["someone:pass:word", "Bearer abc.def"])
def test_credentials_are_sent_and_never_told(
    webui: LocalWebUI,
    secret: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    basic = f"Basic {base64.b64encode(secret.encode()).decode()}"
    webui.auth = secret if secret.startswith("Bearer") else basic
    with pytest.raises(ConfigError, match=AUTH_VARIABLE):
        draw(a1111(webui))
    monkeypatch.setenv(AUTH_VARIABLE, secret)
    renderer = A1111Renderer(Remote(webui.url, patience=QUICK))
    draw(renderer)
    webui.faults[TXT2IMG] = [500, "cut", (307, b"", {"Location": "http://127.0.0.1:9/"})]
    with pytest.raises(ConfigError, match="leads elsewhere") as failed:
        draw(renderer)
    for text in (caplog.text, str(failed.value), renderer.version, repr(renderer.server)):
        assert secret not in text
        assert webui.auth not in text


def test_addresses_with_credentials_or_of_something_else_are_refused(webui: LocalWebUI) -> None:
    for url in ("ftp://x", "localhost:7860", "http://me:secret@127.0.0.1:7860"):
        with pytest.raises(ConfigError) as refused:
            Remote(url)
        assert "secret" not in str(refused.value).replace("credentials", "")
    with pytest.raises(ConfigError, match="--api"):
        A1111Renderer(Remote(f"{webui.url}/elsewhere", patience=QUICK)).check(RECIPE, BASE)


# --- ComfyUI ----------------------------------------------------------------------------------


def test_comfyui_draws_the_recipe(
    comfyui: LocalComfyUI, local: Callable[[str], Path | None]
) -> None:
    renderer = comfy(comfyui, local=local)
    picture = draw(renderer, FULL, FULL_FILES)
    assert (picture.size, picture.mode) == ((64, 96), "RGB")
    # The same graph again: a real server has every node cached and would save nothing.
    assert draw(renderer, FULL, FULL_FILES).tobytes() == picture.tobytes()
    graph = comfyui.bodies("/prompt")[0]["prompt"]
    kinds = [node["class_type"] for node in graph.values()]
    assert kinds == [
        *("CheckpointLoaderSimple", "LoraLoader", "LoraLoader", "CLIPSetLastLayer", "VAELoader"),
        *("CLIPTextEncode", "CLIPTextEncode", "EmptyLatentImage", "KSampler", "VAEDecode"),
        "SaveImage",
    ]
    assert graph["checkpoint"]["inputs"] == {"ckpt_name": "sd15\\base.safetensors"}
    assert graph["lora1"]["inputs"] == {
        "model": ["lora0", 0], "clip": ["lora0", 1], "lora_name": "oil.safetensors",
        "strength_model": -0.25, "strength_clip": -0.25,
    }  # fmt: skip
    assert graph["skip"]["inputs"] == {"clip": ["lora1", 1], "stop_at_clip_layer": -2}
    assert graph["prompt"]["inputs"]["text"] == "(embedding:fog:1.5), a (red:1.2) cube"
    assert graph["negative_prompt"]["inputs"]["text"] == "embedding:fog, blurry"
    sampling = graph["sample"]["inputs"]
    assert (sampling["sampler_name"], sampling["scheduler"]) == ("dpmpp_2m", "karras")
    assert (sampling["seed"], sampling["steps"], sampling["cfg"]) == (2**33 + 1, 20, 6.5)
    assert graph["decode"]["inputs"]["vae"] == ["vae", 0]


def test_comfyui_ignores_clip_skip_for_sdxl(comfyui: LocalComfyUI) -> None:
    draw(comfy(comfyui), FULL.model_copy(update={"loras": (), "embeddings": (), "vae": None}),
         Files(ref("base", "SDXL 1.0")))  # fmt: skip
    graph = comfyui.bodies("/prompt")[0]["prompt"]
    assert "skip" not in graph
    assert graph["prompt"]["inputs"]["clip"] == ["checkpoint", 1]
    assert graph["decode"]["inputs"]["vae"] == ["checkpoint", 2]


@pytest.mark.parametrize(
    ("sampler", "names"),
    [("DPM++ SDE", ("dpmpp_sde", "normal")), ("DDIM", ("ddim", "ddim_uniform")),
     ("Euler a SGM Uniform", ("euler_ancestral", "sgm_uniform")),
     ("Euler Simple", ("euler", "simple")), ("Euler DDIM Uniform", ("euler", "ddim_uniform")),
     ("Euler Beta (ComfyUI)", ("euler", "beta")),
     ("Euler KL Optimal (ComfyUI)", ("euler", "kl_optimal"))],
)  # fmt: skip
def test_comfyui_samplers(comfyui: LocalComfyUI, sampler: str, names: tuple[str, str]) -> None:
    draw(comfy(comfyui), RECIPE.model_copy(update={"sampler": sampler}))
    inputs = comfyui.bodies("/prompt")[0]["prompt"]["sample"]["inputs"]
    assert (inputs["sampler_name"], inputs["scheduler"]) == names


@pytest.mark.parametrize("sampler", ["Euler Beta", "Euler KL Optimal", "Euler Turbo"])
def test_comfyui_lacks_the_schedules_of_the_webui(comfyui: LocalComfyUI, sampler: str) -> None:
    """Its beta and kl_optimal are other formulae: never another schedule in silence."""
    recipe = RECIPE.model_copy(update={"sampler": sampler})
    fails(comfy(comfyui), "unsupported-sampler", recipe)


def test_what_comfyui_lacks_is_missing(
    comfyui: LocalComfyUI, local: Callable[[str], Path | None], caplog: pytest.LogCaptureFixture
) -> None:
    renderer = comfy(comfyui)
    draw(renderer)
    assert "by its name alone" in caplog.text  # nothing here to compare it with
    comfyui.metadata["sd15\\base.safetensors"] = {"note": "another"}
    fails(comfy(comfyui, local=local), "wrong-model")
    comfyui.models["checkpoints"].append("more/base.safetensors")
    fails(comfy(comfyui), "ambiguous-on-server")
    names = {SHA["base"]: "other.safetensors"}
    draw(comfy(comfyui, names=names))
    comfyui.models["checkpoints"] = ["other.safetensors"]
    assert "render_server.models" in fails(comfy(comfyui), "missing-on-server")
    assert len(comfyui.bodies("/prompt")) == 2
    for update in ({"loras": FULL.loras}, {"vae": FULL.vae}, {"embeddings": FULL.embeddings}):
        comfyui.models |= {"loras": [], "vae": []}
        comfyui.embeddings = []
        wrong = RECIPE.model_copy(update=update)
        fails(comfy(comfyui, names=names), "missing-on-server", wrong, FULL_FILES)
    fails(comfy(comfyui), "unsupported-sampler", RECIPE.model_copy(update={"sampler": "LMS"}))


@pytest.mark.parametrize("path", ["/prompt", "/view"])
@pytest.mark.parametrize("fault", [500, 503, (429, b"queue full", {"Retry-After": "0"}), "cut"])
def test_comfyui_is_tried_again(comfyui: LocalComfyUI, path: str, fault: Any) -> None:
    picture = draw(comfy(comfyui))
    comfyui.faults[path] = [fault, fault]
    assert draw(comfy(comfyui)).tobytes() == picture.tobytes()


def test_a_truncated_picture_of_comfyui_is_drawn_again(comfyui: LocalComfyUI) -> None:
    def cut(answer: Answer) -> Answer:
        return (200, answer[1][:-30], {})

    comfyui.faults["/view"] = [cut, (200, b"", {})]
    draw(comfy(comfyui))
    comfyui.faults["/view"] = [cut] * 3
    fails(comfy(comfyui), "bad-picture")


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("Allocation on device 0 would exceed allowed memory. (out of memory)", "out-of-memory"),
        ("mat1 and mat2 shapes cannot be multiplied", "server-error"),
    ],
)
def test_comfyui_tells_why_it_could_not_draw(comfyui: LocalComfyUI, said: str, reason: str) -> None:
    comfyui.error = {"node_type": "KSampler", "exception_type": "E", "exception_message": said}
    assert "KSampler: E" in fails(comfy(comfyui), reason)


def test_comfyui_that_draws_another_graph_is_refused(comfyui: LocalComfyUI) -> None:
    def reseed(graph: dict[str, Any]) -> dict[str, Any]:
        sample = {**graph["sample"], "inputs": {**graph["sample"]["inputs"], "seed": 5}}
        return {**graph, "sample": sample}

    comfyui.changes = reseed
    fails(comfy(comfyui), "wrong-answer")


def test_comfyui_that_does_not_come_to_an_end_is_stopped(comfyui: LocalComfyUI) -> None:
    comfyui.patience = 10**9
    patience = Patience(first=0.01, longest=0.05, budget=0.5, connect_timeout=1, read_timeout=0.2)
    renderer = ComfyUIRenderer(Remote(comfyui.url, patience=patience, secret=""))
    with pytest.raises(RenderServerError, match="did not draw it within"):
        draw(renderer)
    assert comfyui.queue == {}
    comfyui.patience = 2

    def forget(answer: Answer) -> Answer:
        comfyui.queue.clear()  # restarted
        return answer

    comfyui.faults["/prompt"] = [forget]
    draw(renderer)


def test_the_version_of_comfyui_is_its_own(comfyui: LocalComfyUI) -> None:
    assert comfy(comfyui).version == comfy(comfyui).version != ""


# --- the stage --------------------------------------------------------------------------------


def test_the_stage_draws_on_a_server(webui: LocalWebUI, tmp_path: Path) -> None:
    """A model that the server lacks is a failed row; nothing is fetched from the site."""
    world = World(tmp_path)
    for name, kind in (("base", "Checkpoint"), ("ink", "LORA"), ("gone", "Checkpoint")):
        digest = SHA.get(name, "e" * 64)
        world.add_model(name.title(), type=kind, sha256=digest, file_name=f"{name}.safetensors",
                        cached=False)  # fmt: skip
    world.answer("Base", "Ink")
    world.answer("Gone")
    world.runtime = world.runtime.model_copy(
        update={"render_server": RenderServerSettings(url=webui.url)}
    )
    artifact = world.render(backend="a1111")
    told = [(row["status"], row["reason"]) for row in rows(artifact)]
    assert told == [("ok", None), ("failed", "missing-on-server")]
    assert {reason for _, reason in told if reason} <= set(REASONS)
    (path,) = artifact.glob("images/*.png")
    recipe, text = read_png(path)
    assert recipe.checkpoint == SHA["base"]
    assert "<lora:Ink:1>" in text
    metrics = artifact.manifest.metrics
    assert str(metrics["backend"]).startswith("a1111 sdapi-")
    assert webui.url not in (artifact.path / "manifest.json").read_text()
    world.answer("Base", steps=7)
    webui.faults[TXT2IMG] = [503] * 1000
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffagent.render.http.remote.LOOPBACK_PATIENCE", Patience(0.01, 0.05, 0.2))
        world.runtime = world.runtime.model_copy(
            update={"render_server": RenderServerSettings(url=webui.url, timeout_seconds=0.5)}
        )
        with pytest.raises(RenderServerError):
            world.render(backend="a1111")
    webui.faults.clear()
    artifact = world.render(backend="a1111")  # it goes on
    assert artifact.manifest.metrics["pictures_cached"] == 1
    assert artifact.manifest.metrics["pictures_drawn"] == 1
