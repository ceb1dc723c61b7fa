"""``python -m diffagent``: the command line."""

from diffagent.cli.main import main

main()
