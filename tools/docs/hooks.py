"""MkDocs hooks: generated reference pages, and pages that lie at the top of the repository."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
#: Page of the site -> file at the top of the repository.
_TOP = {
    "explanation/security.md": "SECURITY.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
_LINK = re.compile(r"(?<=\]\()(?:\.\./)+(SECURITY|CONTRIBUTING|CHANGELOG)\.md")


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    """Add the generated pages, and the ones that lie outside of ``docs/``."""
    sys.path.insert(0, str(ROOT))
    from tools.docs import reference

    pages = {
        "reference/settings.md": reference.settings_page(),
        "reference/command-line.md": reference.command_line_page(),
    }
    for page, name in _TOP.items():
        depth = "../" * page.count("/")
        text = (ROOT / name).read_text(encoding="utf-8")
        pages[page] = re.sub(r"(?<=\]\()docs/", depth, text)
    for page, text in pages.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links to files at the top of the repository to their pages."""
    pages = {Path(name).stem: target for target, name in _TOP.items()}
    up = "../" * page.file.src_uri.count("/")
    return _LINK.sub(lambda match: up + pages[match[1]], markdown)
