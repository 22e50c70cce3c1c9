"""The documentation site builds without a warning, is complete, and loads nothing from another host."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config

sys.path.append(str(Path(__file__).parents[2] / "tools"))
import site_pages

from agr_ray.cli import COMMANDS
from agr_ray.config.command_line import CommandParser
from agr_ray.config.jobs import SECTIONS
from agr_ray.models import card
from agr_ray.schema import CROPS, DEMOGRAPHICS, FACE, FACES, IMAGES, PREDICTIONS, REJECTS, Status

ROOT = Path(__file__).parents[2]
PAGES = site_pages.pages()
_LOADED = re.compile(
    r"""<(?:script|img|iframe|source|video|audio|embed)\b[^>]*\bsrc=["']?(?:https?:)?//[^\s>]*"""
    r"""|<link\b[^>]*\bhref=["']?(?:https?:)?//[^\s>]*|(?:@import|url\()\s*["']?(?:https?:)?//[^\s)]*"""
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    site = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(site)))  # strict: a warning ends it
    return site


def test_each_page_is_in_the_site(built: Path) -> None:
    written = [path.relative_to(ROOT / "docs") for path in sorted((ROOT / "docs").rglob("*.md"))]
    names = [path.with_name("index.md") if path.name == "README.md" else path for path in written]
    pages = {built / path.with_suffix(".html") for path in [*names, *map(Path, PAGES)]}

    assert sorted(page for page in pages if not page.is_file()) == []
    assert len(pages) > 80


def test_nothing_is_loaded_from_another_host(built: Path) -> None:
    files = [path for kind in ("html", "css") for path in sorted(built.rglob(f"*.{kind}"))]

    assert [(path.name, match[0]) for path in files for match in _LOADED.finditer(path.read_text())] == []
    assert len(files) > 80
    assert _LOADED.search('<script defer src="https://cdn.example/x.js">')
    assert _LOADED.search("<link rel=preconnect href=//fonts.example>")
    assert _LOADED.search("src: url('https://fonts.example/x.woff2')")
    # Diagrams of Mermaid would load its script from a CDN.
    assert [path.name for path in files if 'class="mermaid"' in path.read_text()] == []


def test_the_home_page_links_to_pages_and_shows_its_pictures(built: Path) -> None:
    home = (built / "index.html").read_text()

    assert 'href="operations.html#sweeps"' in home
    assert 'href="contributing.html"' in home
    for picture in ("photograph.jpg", "demographics.png"):
        assert f'src="pictures/{picture}"' in home
        assert (built / "pictures" / picture).is_file()


def test_the_stand_ins_of_the_repository_do_not_reach_the_site(built: Path) -> None:
    stand_ins = sorted((ROOT / "docs" / "reference").rglob("*.md"))
    names = [path.relative_to(ROOT / "docs") for path in stand_ins]

    assert [name for name in names if str(name) not in PAGES] == []
    assert [path.name for path in stand_ins if "This page is a stand-in." not in path.read_text()] == []
    texts = {name.stem: (built / name.with_suffix(".html")).read_text() for name in names}
    assert [name for name, text in texts.items() if "This page is a stand-in." in text] == []
    assert list(texts) == ["recipes", "settings", "tables"]


def test_every_link_of_the_repository_leads_to_a_file() -> None:
    pages = [*(ROOT / name for name in site_pages.FROM_ROOT.values()), *sorted((ROOT / "docs").rglob("*.md"))]
    links = [(page, link["path"]) for page in pages for link in site_pages._LINK.finditer(page.read_text())]

    assert [(page.name, path) for page, path in links if not (page.parent / path).exists()] == []
    assert len(links) > 200


def test_links_to_files_that_are_no_pages_become_text() -> None:
    targets = {"README.md": "index.md", "docs/a.md": "a.md", "docs/b/c.md": "b/c.md", "docs/x.png": "x.png"}
    text = "[home](../README.md) [a](a.md#part) [c](b/c.md) [code](../Makefile) [w](https://w.org) [x](#x) [no](no.md)"
    expected = "[home](index.md) [a](a.md#part) [c](b/c.md) code [w](https://w.org) [x](#x) [no](no.md)"

    assert site_pages.with_page_links(text, "docs/d.md", "d.md", targets) == expected
    assert site_pages.with_page_links('<img src="x.png">', "docs/d.md", "e/d.md", targets) == '<img src="../x.png">'


def test_the_navigation_has_all_pages_that_exist() -> None:
    nav = [
        {"Home": "index.md"},
        {"A": ["a.md", "later.md", "b/index.md", "b/*", "*"]},
        {"B": ["later.md"]},
        {"C": "c.md"},
    ]
    names = ["index.md", "new.md", "a.md", "c.md", "b/index.md", "b/2.md", "b/1.md", "b/c/3.md"]

    assert site_pages.completed(nav, names) == [
        {"Home": "index.md"},
        {"A": ["a.md", "b/index.md", "b/1.md", "b/2.md", "new.md"]},
        {"C": "c.md"},
    ]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_all_its_options(name: str) -> None:
    page = PAGES[f"reference/commands/{name}.md"]
    actions = [each for each in CommandParser(COMMANDS[name].job)._actions if each.help != argparse.SUPPRESS]
    every = [[name for name in action.option_strings if name.startswith("--")] for action in actions]
    options = [min(names, key=len).replace("help_all", "help-all") for names in every if names]

    assert [option for option in options if not re.search(rf"^`{option}[ `]", page, re.MULTILINE)] == []
    assert len(options) > 4


def test_each_setting_has_its_values_default_and_meaning() -> None:
    settings = dict(re.findall(r"^`\w+` \{: #([\w.]+) \}\n(.*\n\n.*\n)", PAGES["reference/settings.md"], re.MULTILINE))

    assert list(settings) == [f"{name}.{key}" for name, section in SECTIONS.items() for key in section.model_fields]
    assert settings["split.val"].splitlines()[0] == ":   *number, at least 0 and at most 1, default* `0.1`"
    assert settings["source.kind"].startswith(':   *one of "utkface", "fairface"')
    assert [key for key, text in settings.items() if not text.splitlines()[2].strip()] == []


def test_each_column_of_the_main_tables_has_a_meaning() -> None:
    meanings = site_pages.Meanings((ROOT / "agr_ray" / "schema.py").read_text())
    tables = {"IMAGES": IMAGES, "FACES": FACES, "REJECTS": REJECTS, "FACE": FACE, "DEMOGRAPHICS": DEMOGRAPHICS}
    tables |= {"CROPS": CROPS, "PREDICTIONS": PREDICTIONS}

    columns = [(name, field.name) for name, table in tables.items() for field in table]
    assert [(name, column) for name, column in columns if not meanings.of(column, name)] == []
    assert meanings.of("age_high", "FACES") == "years; null, like age_low, if the model is not calibrated in age"
    assert meanings.of("age_high", "CROPS") == "years, included; labels.AGE_MAX_YEARS where the range is open"
    assert meanings.of("box", "CROPS").startswith("x0, y0, x1, y1 in pixels")


def test_the_stand_in_of_the_tables_has_all_statuses() -> None:
    page = (ROOT / "docs" / "reference" / "tables.md").read_text()

    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == [*Status]


def test_recipes_and_label_spaces_are_shown_whole() -> None:
    assert 'schedule = "one_cycle"' in PAGES["reference/recipes.md"]
    assert "- race: `white`, `black`, `latino_hispanic`" in PAGES["reference/label_spaces.md"]


def test_responsible_use_agrees_with_the_model_card() -> None:
    page = " ".join((ROOT / "docs" / "responsible_use.md").read_text().split())
    articles = ("5(1)(g)", "Annex III, 1(b)", "50(3)", "Article 9", "740 ILCS 14", "Regulation 2024/1689")

    assert [each for each in articles if each not in card._LAW or each not in page] == []
    assert " ".join(card._EXCLUDED.split()) in page
