"""Reward models behind one batched protocol, and the one score that they are combined into."""
