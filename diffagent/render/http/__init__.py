"""Renderers that are web servers: A1111 and its kin, ComfyUI."""
