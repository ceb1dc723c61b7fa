"""Tools for a finished DABench: checks, comparison, export, summary."""
