"""Civitai: the client and crawler of its API, and a local server that speaks the same API."""
