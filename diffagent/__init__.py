"""DiffAgent: from a prompt to the right text-to-image model and its parameters."""

__version__ = "0.1.0"
