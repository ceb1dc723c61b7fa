"""Selectors that are fitted on pairs: experts, their mixture, parameters."""
