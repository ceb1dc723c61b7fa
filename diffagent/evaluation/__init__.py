"""How good are the answers: metrics on held-out prompts, intervals, the report."""
