"""DABench: which records enter it, what they say, and how they become a dataset."""
