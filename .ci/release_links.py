"""release_links.py URL TAG: README's links and pyproject's project.urls for the page on PyPI.

Links in the repository are relative, so that they work in every clone, fork and branch. PyPI has no
repository beside the text: there each must name the server and the tag. The release runs this in its own
checkout.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(!?)(\[[^\]]*\])\((?!\w+:|#)([^)\s]+)\)")


def absolute(text: str, url: str, tag: str) -> str:
    """`text` (Markdown) with its links to files of the repository made absolute."""
    return LINK.sub(lambda m: f"{m[1]}{m[2]}({url}/{'raw' if m[1] else 'blob'}/{tag}/{m[3]})", text)


def project_urls(url: str, tag: str) -> str:
    return f"""
[project.urls]
Homepage = "{url}"
Documentation = "{url}/blob/{tag}/docs/index.md"
Changelog = "{url}/blob/{tag}/CHANGELOG.md"
Issues = "{url}/issues"
"""


if __name__ == "__main__":
    url, tag = sys.argv[1:]
    readme, project = ROOT / "README.md", ROOT / "pyproject.toml"
    readme.write_text(absolute(readme.read_text(), url, tag))
    project.write_text(project.read_text() + project_urls(url, tag))
