"""Shared fixtures of the unit tests."""

from __future__ import annotations

import os

import pytest

# Before torch and OpenCV are imported: tiny arrays gain nothing from threads, and on busy cores lose much.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def blank_pngs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are drawn as SVG only: the same again as PNG would take as long."""
    from matplotlib.figure import Figure  # here, because it takes a while to import

    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)


@pytest.fixture
def blank_figures(blank_pngs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made, but not drawn: that takes most of the time of a page."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    monkeypatch.setattr(FigureCanvasSVG, "print_svg", lambda _, file, **__: file.write(b"<svg/>"))
