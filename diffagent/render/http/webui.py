"""The HTTP API of AUTOMATIC1111's WebUI and of Forge as a backend.

Models are those that the server lists: checkpoints by SHA256 where it has hashed them, else by the
file's name, and then the answer proves them: every picture comes back with a text that names the
checkpoint's hash, the seed, the sampler and the networks that were laid over it, and a picture
whose text is not the recipe's is refused. (The server itself falls back to another checkpoint or
sampler without a word, and leaves out LoRAs that it does not find.)

docs/how-to/render-on-a-server.md has what was read where, and what the two servers do differently.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from diffagent.errors import ConfigError, RenderError
from diffagent.render.http.remote import Remote, decode_picture, metadata_of, parse, stem, stems
from diffagent.render.http.server_renderer import ServerRenderer
from diffagent.render.pnginfo import payload_hash
from diffagent.render.recipe import Recipe
from diffagent.render.renderer import Files, ModelRef
from diffagent.store import canonical_json
from diffagent.t2i.metadata import Generation, read_parameters
from diffagent.t2i.metadata.a1111 import read_fields, shortest, split_parameters
from diffagent.t2i.samplers import SAMPLERS, WEBUI_LABELS, normalise

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

_Fields = Mapping[str, object]

_API = "/sdapi/v1"
_REQUIRED = ("options", "sd-models", "samplers")
_REFRESH = {
    "sd-models": "refresh-checkpoints",
    "loras": "refresh-loras",
    "sd-vae": "refresh-vae",
    "sd-modules": "refresh-vae",
}
#: Settings that every call overrides, where the server has them: what the text has to say, noise
#: from the CPU as everywhere in this project, and nothing of what its owner set for themselves.
_SETTINGS: Mapping[str, Any] = MappingProxyType(
    {
        "add_model_hash_to_info": True,
        "add_model_name_to_info": True,
        "add_vae_hash_to_info": True,
        "add_vae_name_to_info": True,
        "lora_add_hashes_to_infotext": True,
        "textual_inversion_add_hashes_to_infotext": True,
        "enable_prompt_comments": False,
        "eta_noise_seed_delta": 0,
        "randn_source": "CPU",
        "samples_format": "png",
        "sd_lora": "None",
        "sd_hypernetwork": "None",
        "token_merging_ratio": 0.0,
    }
)
#: Settings that stay the owner's and change pixels: part of the key of every picture.
_PIXELS = (
    *("emphasis", "upcast_attn", "auto_vae_precision", "cross_attention_optimization"),
    *("enable_batch_seeds", "comma_padding_backtrack", "sdxl_crop_left", "sdxl_crop_top"),
    *("sdxl_refiner_low_aesthetic_score", "s_churn", "s_tmin", "s_tmax", "s_noise", "s_min_uncond"),
    *("eta_ancestral", "eta_ddim", "ddim_discretize", "uni_pc_order", "uni_pc_variant"),
    *("uni_pc_skip_type", "uni_pc_lower_order_final", "sd_noise_schedule", "fp8_storage"),
    *("always_discard_next_to_last_sigma", "use_old_karras_scheduler_sigmas"),
    *("no_dpmpp_sde_batch_determinism", "sd_vae_decode_method"),
    *("use_downcasted_alpha_bar", "forge_unet_storage_dtype"),
)  # fmt: skip


@dataclass(frozen=True)
class _Prepared:
    """Names on the server of the files in use: networks by SHA256, the VAE as settings."""

    checkpoint: str
    networks: Mapping[str, str]
    vae: Mapping[str, Any]


class A1111Renderer(ServerRenderer[_Prepared]):
    """A `diffagent.render.renderer.Renderer` that asks a WebUI or Forge with ``--api``."""

    name = "a1111"

    def __init__(self, server: Remote, **options: Any) -> None:
        """As `ServerRenderer`: ``names``, ``local``."""
        super().__init__(server, **options)
        self._lists: dict[str, Any] = {}
        self._payloads: dict[str, frozenset[str]] = {}

    @property
    def version(self) -> str:
        """The server's address and those of its settings that change pixels, as a digest.

        The API does not tell the program's version.
        """
        options = {name: self._options[name] for name in _PIXELS if name in self._options}
        told = {"url": self.server.url, "options": options}
        return f"sdapi-{hashlib.sha256(canonical_json(told)).hexdigest()[:16]}"

    # One picture

    def _draw(self, recipe: Recipe, prepared: _Prepared) -> Image:
        task = f"task(diffagent-{uuid.uuid4().hex[:12]})"
        body = {**self._body(recipe, prepared), "force_task_id": task}

        def ask() -> Image:
            path = f"{_API}/txt2img"
            answer = parse(self.server.send("POST", path, body=body), path)
            data, text = _answer(answer)
            picture, _ = decode_picture(data, recipe.width, recipe.height)
            self._prove(recipe, body, text, prepared)
            return picture

        try:
            return self.server.patiently(ask, abandon=lambda: self._abandon(task))
        except BaseException:
            self._abandon(task)
            raise

    def _body(self, recipe: Recipe, prepared: _Prepared) -> dict[str, Any]:
        sampler, schedule = self._sampler(recipe)
        tags = [
            f"<lora:{prepared.networks[use.sha256]}:{shortest(round(use.weight, 4))}>"
            for use in recipe.loras
        ]
        prompt = recipe.text(prepared.networks, negative=False)
        settings = {
            **{name: value for name, value in _SETTINGS.items() if name in self._options},
            **prepared.vae,
            "sd_model_checkpoint": prepared.checkpoint,
            "CLIP_stop_at_last_layers": recipe.clip_skip,
        }
        return {
            "prompt": " ".join([*([prompt] if prompt else []), *tags]),
            "negative_prompt": recipe.text(prepared.networks, negative=True),
            "styles": [],
            **recipe.model_dump(include={"seed", "steps", "cfg_scale", "width", "height"}),
            "sampler_name": sampler,
            **({"scheduler": schedule} if schedule else {}),
            "subseed_strength": 0,
            "batch_size": 1,
            "n_iter": 1,
            "enable_hr": False,
            "restore_faces": False,
            "tiling": False,
            "send_images": True,
            "save_images": False,
            "override_settings": settings,
            "override_settings_restore_afterwards": True,
        }

    def _prove(
        self, recipe: Recipe, body: Mapping[str, Any], text: str, prepared: _Prepared
    ) -> None:
        """Refuse a picture whose text is not the recipe's.

        Raises:
            RenderError: 'wrong-model', 'unverified-model', 'wrong-answer'.
        """
        made = read_parameters(text)
        self._prove_checkpoint(recipe, made)
        expected = {
            "seed": (made.seed, recipe.seed),
            "sampler": (made.sampler, recipe.sampler),
            "steps": (made.steps, recipe.steps),
            "CFG scale": (made.cfg_scale, recipe.cfg_scale),
            "size": ((made.width, made.height), (recipe.width, recipe.height)),
            "clip skip": (made.clip_skip, recipe.clip_skip),
            "prompt": (_line(made.prompt_raw), _line(body["prompt"])),
            "negative prompt": (_line(made.negative_prompt_raw), _line(body["negative_prompt"])),
        }
        wrong = {name: pair for name, pair in expected.items() if pair[0] != pair[1]}
        if wrong:
            told = ", ".join(
                f"{name} {was!r} instead of {asked!r}" for name, (was, asked) in wrong.items()
            )
            raise RenderError(
                f"{self.server.url} drew something else: {told}", reason="wrong-answer"
            )
        fields = dict(read_fields(split_parameters(text)[2]))
        for prove in (self._prove_loras, self._prove_embeddings, self._prove_vae):
            prove(recipe, fields, prepared)

    def _prove_checkpoint(self, recipe: Recipe, made: Generation) -> None:
        reference = made.checkpoints[0] if made.checkpoints else None
        if reference is None or reference.hash is None:
            raise RenderError(
                f"{self.server.url} does not say which checkpoint it used; start it without "
                "--no-hashing",
                reason="unverified-model",
            )
        if not recipe.checkpoint.startswith(reference.hash.lower()):
            raise RenderError(
                f"{self.server.url} drew with {reference.name!r} ({reference.hash.lower()}) "
                f"instead of {recipe.checkpoint[:10]}; if it lists that one, its version does not "
                "change models when its API is asked to",
                reason="wrong-model",
            )

    def _prove_loras(self, recipe: Recipe, fields: _Fields, prepared: _Prepared) -> None:
        """Those that were asked for and no others, by AutoV3 of the local file."""
        laid = _hashes(fields.get("Lora hashes"))
        for use in recipe.loras:
            name = prepared.networks[use.sha256]
            found = laid.pop(name.replace(",", "").replace(":", ""), None)
            if found is None:
                raise RenderError(
                    f"{self.server.url} did not lay LoRA {name!r} over", reason="wrong-answer"
                )
            known = self._payload(use.sha256)
            if known and not any(digest.startswith(found[:12]) for digest in known):
                raise RenderError(
                    f"LoRA {name!r} of {self.server.url} ({found}) is not {use.sha256[:10]}",
                    reason="wrong-model",
                )
        if laid:
            raise RenderError(
                f"{self.server.url} laid LoRAs over that nobody asked for: {sorted(laid)}",
                reason="wrong-answer",
            )

    def _prove_embeddings(self, recipe: Recipe, fields: _Fields, prepared: _Prepared) -> None:
        """By SHA256; Forge does not tell. A LoRA may bring embeddings, under its own name."""
        if self._is_forge:
            return
        wanted = {prepared.networks[use.sha256]: use.sha256 for use in recipe.embeddings}
        loras = {prepared.networks[use.sha256] for use in recipe.loras}
        told = _hashes(fields.get("TI hashes"))
        used = {name: digest for name, digest in told.items() if name not in loras}
        if used.keys() ^ wanted.keys():
            raise RenderError(
                f"{self.server.url} used embeddings {sorted(used)} instead of {sorted(wanted)}; a "
                "word of the prompt that names one loads it",
                reason="wrong-answer",
            )
        if any(not wanted[name].startswith(digest) for name, digest in used.items()):
            raise RenderError(
                f"embeddings of {self.server.url} are other files: {used}", reason="wrong-model"
            )

    def _prove_vae(self, recipe: Recipe, fields: _Fields, prepared: _Prepared) -> None:
        """By SHA256; Forge tells names alone, and versions without the setting tell nothing."""
        if self._is_forge:
            told = {stem(value) for name, value in fields.items() if name.startswith("Module ")}
            if told != set(map(stem, prepared.vae["forge_additional_modules"])):
                raise RenderError(
                    f"{self.server.url} used the modules {sorted(told)}", reason="wrong-answer"
                )
            return
        digest = str(fields.get("VAE hash", ""))
        if not digest and "add_vae_hash_to_info" not in self._options:
            return
        if bool(digest) != bool(recipe.vae) or not (recipe.vae or "").startswith(digest):
            raise RenderError(
                f"{self.server.url} used VAE {digest or 'of the checkpoint'} instead of "
                f"{(recipe.vae or 'that of the checkpoint')[:10]}",
                reason="wrong-model",
            )

    def _abandon(self, task: str) -> None:
        """Stop the server when it is still at this task, and nobody else's."""
        try:
            path = "/internal/progress"
            asked = {"id_task": task, "live_preview": False}
            if parse(self.server.send("POST", path, body=asked), path).get("active"):
                self.server.send("POST", f"{_API}/interrupt")
        except Exception as error:  # on the way out of another error, which is the one to tell
            log.debug("could not ask %s to stop: %s", self.server.url, error)

    # What the server has

    @property
    def _options(self) -> Mapping[str, Any]:
        """Its settings; overriding one that it lacks is an error 500 in older versions."""
        options: Mapping[str, Any] = self._list("options")
        return options

    @property
    def _is_forge(self) -> bool:
        return "forge_additional_modules" in self._options

    def _list(self, name: str) -> Any:
        if name not in self._lists:
            listed = self.server.get_if_there(f"{_API}/{name}")
            if listed is None and name in _REQUIRED:
                raise ConfigError(
                    f"{self.server.url} has no {_API}/{name}; is it a WebUI that was started with "
                    "--api?"
                )
            self._lists[name] = listed or []
        return self._lists[name]

    def _find(self, files: Files) -> _Prepared:
        vaes = "sd-modules" if self._is_forge else "sd-vae"
        vae = self._looked_up(vaes, files.vae, self._vae) if files.vae else None
        networks = {ref.sha256: self._looked_up("loras", ref, self._lora) for ref in files.loras}
        networks |= {
            ref.sha256: self._looked_up("embeddings", ref, self._embedding)
            for ref in files.embeddings
        }
        checkpoint = self._looked_up("sd-models", files.checkpoint, self._checkpoint)
        if self._is_forge:
            return _Prepared(
                checkpoint, networks, {"forge_additional_modules": [vae] if vae else []}
            )
        return _Prepared(checkpoint, networks, {"sd_vae": vae or "None"})

    def _looked_up(
        self, kind: str, ref: ModelRef, find: Callable[[ModelRef], Sequence[str]]
    ) -> str:
        """The name of a model on the server; its lists are read anew once before it is missing."""
        found = find(ref)
        if not found and kind not in self._refreshed:
            self._refreshed.add(kind)
            if kind in _REFRESH:
                path = f"{_API}/{_REFRESH[kind]}"
                self.server.patiently(lambda: self.server.send("POST", path))
            self._lists.pop(kind, None)
            found = find(ref)
        if len(set(found)) == 1:
            return found[0]
        known = sorted(stems(ref, self._names))
        raise RenderError(
            f"{self.server.url} has {len(set(found)) or 'no'} files that may be {ref.name!r} "
            f"({ref.sha256[:10]}{', file ' + ' or '.join(known) if known else ''}); "
            + ("say which in runtime.render_server.models" if found else "put it into its folder"),
            reason="ambiguous-on-server" if found else "missing-on-server",
        )

    def _checkpoint(self, ref: ModelRef) -> list[str]:
        """By SHA256; a file that it has not hashed yet by name: the answer proves it."""
        models = self._list("sd-models")
        exact = [model for model in models if _lower(model.get("sha256")) == ref.sha256]
        if exact:
            return [str(exact[0]["title"])]
        names = stems(ref, self._names)
        return [
            str(model["title"])
            for model in models
            if not model.get("sha256") and stem(model.get("filename")) in names
        ]

    def _lora(self, ref: ModelRef) -> list[str]:
        """By name, where no other LoRA goes by the same one."""
        names = stems(ref, self._names)
        loras = self._list("loras")
        found = [str(lora["name"]) for lora in loras if stem(lora.get("path")) in names]
        taken = [
            lora for name in found for lora in loras
            if name in (lora.get("name"), lora.get("alias"))
        ]  # fmt: skip
        if len(taken) > len(found):  # the alias in one file's metadata is the other's name
            return [str(lora.get("path")) for lora in taken]
        return found

    def _vae(self, ref: ModelRef) -> list[str]:
        names = stems(ref, self._names)
        listed = self._list("sd-modules" if self._is_forge else "sd-vae")
        return [str(vae["model_name"]) for vae in listed if stem(vae.get("filename")) in names]

    def _embedding(self, ref: ModelRef) -> list[str]:
        names = stems(ref, self._names)
        listed = self._list("embeddings") or {}
        # Those of other architectures than the loaded checkpoint's are "skipped".
        every = {**listed.get("loaded", {}), **listed.get("skipped", {})}
        return [name for name in every if stem(name) in names]

    def _sampler(self, recipe: Recipe) -> tuple[str, str | None]:
        """Names of the sampler and the schedule on this server.

        Before version 1.9 a schedule is part of the sampler's name, and there are no others.
        """
        spec = SAMPLERS[recipe.sampler]
        listed = [str(item["name"]) for item in self._list("samplers")]
        labels = [str(item["label"]) for item in self._list("schedulers")]
        whole = [name for name in listed if normalise(name) == recipe.sampler]
        solvers = [name for name in listed if normalise(name) == spec.solver]
        if not labels and whole:
            return whole[0], None
        if labels and solvers:
            schedule = WEBUI_LABELS.get(spec.schedule, spec.schedule)
            if normalise(spec.solver, "Karras") == spec.solver:  # it ignores schedules
                return solvers[0], "Automatic"
            if schedule in labels:
                return solvers[0], schedule
        raise RenderError(
            f"{self.server.url} has no sampler {recipe.sampler!r}", reason="unsupported-sampler"
        )

    def _payload(self, sha256: str) -> frozenset[str]:
        """What the server may call the local file: AutoV3, and what the trainer wrote into it."""
        path = self._local(sha256)
        if path is None:
            return frozenset()
        if sha256 not in self._payloads:
            claimed = metadata_of(path).get("sshs_model_hash", "")
            self._payloads[sha256] = frozenset({payload_hash(path), claimed}) - {""}
        return self._payloads[sha256]


def _answer(answer: Any) -> tuple[bytes, str]:
    """The picture's file and its text."""
    try:
        info = json.loads(answer["info"])
        encoded = str(answer["images"][0]).rpartition(",")[2]  # some put 'data:image/png;base64,'
        return base64.b64decode(encoded, validate=True), str(info["infotexts"][0])
    except (TypeError, KeyError, IndexError, ValueError, binascii.Error) as error:
        raise RenderError(
            f"the answer has no picture with a text: {type(error).__name__}: {error}",
            reason="bad-picture",
        ) from None


def _hashes(value: object) -> dict[str, str]:
    """``NAME: HASH, ...``"""
    pairs = (part.rpartition(":") for part in str(value or "").split(","))
    return {name.strip(): digest.strip().lower() for name, colon, digest in pairs if colon}


def _line(text: str | None) -> str:
    return " ".join((text or "").split())


def _lower(value: object) -> str:
    return value.lower() if isinstance(value, str) else ""
