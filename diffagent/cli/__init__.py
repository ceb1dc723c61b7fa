"""The command line: options and help, one module for each group of commands."""
