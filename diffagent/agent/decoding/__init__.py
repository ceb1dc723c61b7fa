"""Constrained decoding: the grammar of API calls and searches under it."""
