"""How the networks of the sandbox were trained; not installed."""
