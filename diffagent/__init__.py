"""DiffAgent: from a prompt to the right text-to-image model and its parameters."""

from diffagent import extras

__version__ = "0.1.0"

extras.install()
