"""The parser accepts the commands in guides, recipes, help texts and messages."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from submit_lines import submit_lines

from agr_ray.cli import COMMANDS
from agr_ray.config import PrepareJob, TuneJob, parse
from agr_ray.schema import SCHEMA_VERSION
from agr_ray.tuning.space import check_space

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs" / "tutorials").glob("*.md")),
    *sorted((ROOT / "agr_ray" / "recipes").glob("*.toml")),
]
_NAMES = "|".join(COMMANDS).replace("-", "[-_]")  # cross-validate, cross_validate.py
_COMMAND = re.compile(rf"(?:agr-ray |python jobs/)({_NAMES})(?:\.py)?((?: [^`\n]*)?)")
_CODE = re.compile(r"```.*?\n(.*?)```|`([^`]+)`", re.DOTALL)


def commands(path: Path) -> list[tuple[str, list[str]]]:
    """Return the commands of a page that have an option: the name, and the words after it."""
    text = path.read_text()
    if path.suffix == ".toml":
        blocks = [line.removeprefix("#") for line in text.splitlines() if line.startswith("#")]
    else:
        blocks = [block or " ".join(inline.split()) for block, inline in _CODE.findall(text)]
    found = []
    for block in blocks:
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            for name, options in _COMMAND.findall(line):
                words = shlex.split(options, comments=True)
                if any(word.startswith("--") for word in words) and "..." not in words[-1:]:
                    found.append((name.replace("_", "-"), words))
    return found


EVERY = [(path, *command) for path in PAGES for command in commands(path)]


def test_the_changelog_names_the_schema_version_of_each_release() -> None:
    releases = (ROOT / "CHANGELOG.md").read_text().split("\n## ")[1:]
    versions = [re.findall(r"^`schema_version` (\d+)\.$", release, re.MULTILINE) for release in releases]
    assert versions[0] == [str(SCHEMA_VERSION)]
    assert [len(found) for found in versions] == [1] * len(releases)


def test_there_are_commands_on_most_pages() -> None:
    assert len(EVERY) > 25
    assert len({path for path, _, _ in EVERY}) > 6


def test_every_job_has_a_line_that_submits_it() -> None:
    scripts = sorted(path.stem for path in (ROOT / "jobs").glob("*.py"))

    assert sorted({line.job for line in submit_lines()}) == scripts
    assert {script.replace("_", "-") for script in scripts} <= COMMANDS.keys()


@pytest.mark.parametrize(("path", "name", "words"), EVERY, ids=lambda each: str(each)[-60:])
def test_the_parser_accepts_each_command(
    path: Path, name: str, words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job = COMMANDS[name].job
    monkeypatch.chdir(tmp_path)
    words = [word for word in words if word not in ("--help", "--help-all", "--dry-run")]
    if "--config" in words:
        recipe = words[words.index("--config") + 1]
        if recipe.endswith(".toml") or recipe.isupper():  # a recipe of the reader's own
            searched = '[tune.space]\n"train.lr" = { log_uniform = [1e-4, 1e-2] }\n'
            Path("recipe.toml").write_text(searched if job is TuneJob else "")
            words[words.index("--config") + 1] = "./recipe.toml"
    needed = () if "--compare" in words else job.required  # two models need no other option
    for key in needed:  # a sentence may show one option alone
        given = {job.option(key), f"--{key}"}
        if not given & {word.partition("=")[0] for word in words} and key not in ("tune.space", *job.positional):
            words += [job.option(key), "somewhere"]
    if name == "tune" and "--config" not in words:
        words += ["--config", "tune_lite"]
    parse(job, words, {})


RECIPES = [
    (path, text)
    for path in PAGES
    if path.suffix == ".md"
    for text in re.findall(r"^```toml\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)
]


@pytest.mark.parametrize(("path", "text"), RECIPES, ids=lambda each: str(each)[-20:])
def test_the_parser_accepts_each_recipe(path: Path, text: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(text)
    if "[tune" in text:
        check_space(parse(TuneJob, ["--config", str(recipe), "--data", "somewhere"], {}))
    else:
        parse(
            PrepareJob, ["--config", str(recipe), "--source.kind", "folder", "--source.uri", "here", "--out", "set"], {}
        )


def test_there_are_recipes_on_four_pages() -> None:
    names = ["labels.md", "operations.md", "better_settings.md", "nightly_scoring.md"]
    assert [path.name for path, _ in RECIPES] == names
