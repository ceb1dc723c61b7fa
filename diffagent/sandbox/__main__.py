"""Command that writes the sandbox's site, which `crawl.site: dump:DIR` of a config names.

    python -m diffagent.sandbox DIR

It is quick when DIR is up to date.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from diffagent.errors import DiffAgentError
from diffagent.sandbox.files import materialise


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m diffagent.sandbox", description=__doc__)
    parser.add_argument("directory", metavar="DIR", type=Path, help="Folder to write the site to.")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        materialise(parser.parse_args().directory)
    except DiffAgentError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
