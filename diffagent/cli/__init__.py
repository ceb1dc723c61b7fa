"""Commands with their options and help, one module for each group."""
