"""The renderer that a run's settings name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from diffagent.errors import ConfigError

if TYPE_CHECKING:
    from diffagent.render.render_config import RenderConfig
    from diffagent.render.renderer import Renderer
    from diffagent.schemas.runtime import RuntimeConfig


def open_renderer(
    config: RenderConfig, runtime: RuntimeConfig, local: Callable[[str], Path | None]
) -> Renderer:
    """The backend of ``render.backend``; the caller closes it.

    Args:
        config: names it.
        runtime: where it draws: a device here, or a server.
        local: the local file of a SHA256, where there is one, to prove a server's with.

    Raises:
        ConfigError: a server is needed and none is given, or its address is none.
    """
    if config.backend == "diffusers":
        from diffagent.device import resolve_device
        from diffagent.render.diffusers.checkpoints import local_configs
        from diffagent.render.diffusers.pipelines import DiffusersRenderer

        directories = (runtime.models_directory / "configs", *map(Path, runtime.models.configs))
        return DiffusersRenderer(resolve_device(runtime.device), local_configs(directories))
    from diffagent.render.http.remote import Remote

    if not runtime.render_server.url:
        raise ConfigError(
            f"render.backend: {config.backend} needs the server's address: set "
            "runtime.render_server.url"
        )
    server = Remote(
        runtime.render_server.url, seconds_per_picture=runtime.render_server.timeout_seconds
    )
    if config.backend == "a1111":
        from diffagent.render.http.webui import A1111Renderer

        return A1111Renderer(server, names=runtime.render_server.models, local=local)
    from diffagent.render.http.comfyui import ComfyUIRenderer

    return ComfyUIRenderer(server, names=runtime.render_server.models, local=local)
