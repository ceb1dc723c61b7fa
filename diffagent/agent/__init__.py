"""Prompt in, API out: the form of an answer, its verification, and who gives it."""
