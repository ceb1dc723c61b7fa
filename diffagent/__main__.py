"""``python -m diffagent``: the command line."""

from diffagent.cli import main

main()
