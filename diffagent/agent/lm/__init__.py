"""Causal language models: loading, tokens, likelihoods, cached keys and values."""
