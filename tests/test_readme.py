"""The README is short, its example runs, and the pages' links lead somewhere."""

import re
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "reports/index.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_example_runs() -> None:
    """Seen failing with a loss of shape (T, B)."""
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(code.splitlines()) <= 16
    found: dict[str, torch.Tensor] = {}
    exec(code, found)  # noqa: S102  # the README's own
    params, grads, adapted = (found[name] for name in ("params", "grads", "adapted"))
    for name, value in params.items():
        assert grads[name].shape == value.shape and grads[name].isfinite().all() and grads[name].any()
        assert adapted[name].shape == (16, *value.shape)
    assert found["query_loss"].shape == (16,)


def test_it_has_at_most_700_words() -> None:
    """Tables and code included; a word has a letter or a digit."""
    assert sum(any(map(str.isalnum, word)) for word in README.split()) <= 700


def anchors(page: Path) -> set[str]:
    """The fragments of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    """Seen failing with a page that was renamed and a heading that was reworded."""
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith("http"):
            continue
        path, _, heading = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not heading or heading in anchors(target), f"{page.name}: {link}"
