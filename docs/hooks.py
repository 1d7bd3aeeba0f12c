"""What the site generates while it is built."""

from __future__ import annotations

from typing import Any

from flashbias.biases import registry

BIASES = "<!-- biases:table -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the table of bias families where a page asks for it."""
    return markdown.replace(BIASES, bias_table()) if BIASES in markdown else markdown


def bias_table() -> str:
    """One line for each family of the registry, as it describes itself."""
    lines = ["| family | bias | rank | exactness | paper |", "|---|---|---|---|---|"]
    for name, family in sorted(registry().items()):
        about = family.about
        link = f"[`{name}`][{family.__module__}.{name}]"
        formula = about.formula.replace("|", "\\|")
        lines.append(f"| {link} | `{formula}` | {about.rank} | {about.exactness} | [{about.title}]({about.url}) |")
    return "\n".join(lines)
