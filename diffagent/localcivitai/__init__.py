"""Folders of records read as a Civitai, and a local server that speaks its API."""
