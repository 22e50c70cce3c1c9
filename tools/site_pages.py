"""Hooks of MkDocs that complete the documentation site (mkdocs.yml).

They add the home page, which is README.md, and the reference, which is made from the code: it can't go out of date.
docs/reference/ holds stand-ins of the pages to which other pages link, for readers of the repository.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import itertools
import json
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import agr_ray
from agr_ray import cli, labels, schema
from agr_ray.config import built_in_recipes
from agr_ray.config.command_line import CommandParser
from agr_ray.config.jobs import SECTIONS
from agr_ray.config.section import MAX_FLOAT, MAX_INT

ROOT = Path(__file__).parents[1]
FROM_ROOT = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
"""Pages of the site that are files of the repository's root."""


# Hooks


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages, some in place of their stand-ins in docs/reference/, and complete the navigation."""
    for path, text in pages().items():
        if stand_in := files.get_file_from_path(path):
            files.remove(stand_in)
        files.append(File.generated(config, path, content=text))
    config.nav = completed(config.nav or [], [file.src_uri for file in files.documentation_pages()])
    return files


def on_page_markdown(markdown: str, *, page: Page, files: Files, **_: Any) -> str:
    """Let links of the repository's files point to pages."""
    path = page.file.src_uri
    source = FROM_ROOT.get(path, f"docs/{path}")
    targets = {FROM_ROOT.get(each, f"docs/{each}"): each for each in files.src_uris}
    return with_page_links(markdown, source, path, targets)


# Links and navigation


_LINK = re.compile(
    r"""(?P<before>\[(?P<label>[^\]]*)\]\(|src=")(?P<path>(?!\w+:)[^)"#\s]+)(?P<rest>#[^)"\s]*)?(?P<after>[)"])"""
)


def with_page_links(markdown: str, source: str, page: str, targets: Mapping[str, str]) -> str:
    """Let the relative links of a text point to pages; those to other files of the repository become text.

    Args:
        markdown: the text.
        source: the file that it comes from, from the repository's root.
        page: the page that it becomes, from the site's root.
        targets: page or picture of the site, by file of the repository.
    """

    def rewritten(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link["path"]))
        target = targets.get(path)
        if target is None:  # MkDocs warns of what does not exist
            return link["label"] if link["label"] and (ROOT / path).exists() else link[0]
        return (
            f"{link['before']}{posixpath.relpath(target, posixpath.dirname(page))}{link['rest'] or ''}{link['after']}"
        )

    return _LINK.sub(rewritten, markdown)


def completed(nav: Sequence[Any], names: Sequence[str]) -> list[Any]:
    """Return the navigation without pages that do not exist; `folder/*` becomes all other pages of the folder.

    Args:
        nav: as in mkdocs.yml.
        names: of all pages.
    """
    named = set(re.findall(r"[^\s'\"]+\.md", str(nav)))

    def below(items: Sequence[Any]) -> Iterator[Any]:
        for item in items:
            if isinstance(item, dict):
                ((title, value),) = item.items()
                found = [*below([value] if isinstance(value, str) else value)]
                if found:
                    yield {title: found[0] if isinstance(value, str) else found}
            elif item.endswith("*"):
                folder = item.removesuffix("*").rstrip("/")
                yield from sorted(name for name in names if posixpath.dirname(name) == folder and name not in named)
            elif item in names:
                yield item

    return [*below(nav)]


# Pages


def pages() -> dict[str, str]:
    """Return the text of each page that is made from other files, by path."""
    return {
        **{page: (ROOT / source).read_text() for page, source in FROM_ROOT.items()},
        "reference/python.md": python_page(),
        "reference/commands/index.md": f"# Commands\n\n```text\n{cli._usage()}```\n",
        **{f"reference/commands/{name}.md": command_page(name) for name in cli.COMMANDS},
        "reference/settings.md": settings_page(),
        "reference/recipes.md": recipes_page(),
        "reference/label_spaces.md": label_spaces_page(),
        "reference/tables.md": tables_page(),
    }


def python_page() -> str:
    """Return the page of everything that `import agr_ray` offers."""
    lines = ["# Python", "", "```python\nimport agr_ray\n```", "", inspect.cleandoc(agr_ray.__doc__ or ""), ""]
    for name, module in agr_ray._MODULES.items():
        owner = "FaceModel.load" if name == "load" else name
        options = "\n    options: {members: false, show_bases: false}" if name.endswith("Job") else ""
        lines += [f"## agr_ray.{name}", "", f"::: agr_ray.{module}.{owner}{options}", ""]
        if name.endswith("Job"):
            command = next(key for key, each in cli.COMMANDS.items() if each.job.__name__ == name)
            lines += [f"Its fields are the sections of [`agr-ray {command}`](commands/{command}.md).", ""]
    return "\n".join(lines)


def command_page(name: str) -> str:
    """Return the page of a command: how it is called, and all its options."""
    command = cli.COMMANDS[name]
    parser = CommandParser(command.job, prog=f"agr-ray {name}")
    formatter = parser._get_formatter()
    lines = [f"# agr-ray {name}", "", inspect.cleandoc(command.job.__doc__ or ""), ""]
    lines += ["```", parser.usage.replace("%(prog)s", parser.prog), "```", "", "For example:", ""]
    lines += ["```", command.job.example, "```", "", escaped(parser.epilog or "")]
    for group in sorted(parser._action_groups, key=lambda each: each.title != f"{command.job.own} options"):
        actions = [action for action in group._group_actions if action.help != argparse.SUPPRESS]
        if not actions:
            continue
        title = (group.title or "").removesuffix(" options")
        section = f"[`[{title}]`](../settings.md#{title})" if title in SECTIONS else ""
        lines += ["", f"## {title}", "", *([f"Settings of {section}."] if section else [])]
        for action in actions:
            invocation = formatter._format_action_invocation(action)
            text = (action.help or "").replace("%%", "%").removesuffix(" (default: )").removesuffix(" (default: None)")
            lines += ["", f"`{invocation}`", f":   {escaped(text)}"]
    return "\n".join(lines) + "\n"


def settings_page() -> str:
    """Return the page of all settings, by section."""
    lines = [
        "# Settings",
        "",
        "Every table that a [recipe](recipes.md) may hold. On the command line, `lr` of `[train]` is `--train.lr`, and",
        "`--lr` in `agr-ray train`. In the environment, it is `AGR_RAY_TRAIN__LR`. The command line overrides the",
        "environment, which overrides the recipe. Unknown keys are rejected.",
    ]
    for name, section in SECTIONS.items():
        commands = [key for key, command in cli.COMMANDS.items() if name in command.job.sections()]
        used = ", ".join(f"[{key}](commands/{key}.md)" for key in commands)
        lines += [
            "",
            f"## [{name}] {{: #{name} }}",
            "",
            inspect.cleandoc(section.__doc__ or ""),
            "",
            f"Used by: {used}.",
            "",
        ]
        table = section.model_json_schema()
        for key, field in table["properties"].items():
            given = "none" if field.get("default") is None else json.dumps(field["default"])
            lines += [
                f"`{key}` {{: #{name}.{key} }}",
                f":   *{escaped(value_words(field, table.get('$defs', {})))}, default* `{given}`",
                "",
                f"    {escaped(field['description'])}",
                "",
            ]
    return "\n".join(lines)


def recipes_page() -> str:
    """Return the page of the built-in recipes, each shown whole."""
    lines = ["# Recipes", "", "`agr-ray recipes NAME > mine.toml` prints one as a start for your own."]
    for name, file in built_in_recipes().items():
        lines += ["", f"## {name}", "", "```toml", file.read_text().rstrip(), "```"]
    return "\n".join(lines) + "\n"


def label_spaces_page() -> str:
    """Return the page of the built-in label spaces and the mappings between their races."""
    docs = docstrings(ast.parse(Path(labels.__file__).read_text()).body)
    lines = [
        "# Built-in label spaces",
        "",
        "How they are used, and how to define your own: [label spaces](../labels.md).",
    ]
    for name, space in labels.SPACES.items():
        lines += ["", f"## {name}", "", escaped(docs[name.upper()]), ""]
        lines += [
            f"- {attribute}: {', '.join(f'`{each}`' for each in classes)}"
            for attribute, classes in space.classes.items()
        ]
    lines += ["", "## Mappings of races", "", escaped(docs["RACE_MAPPINGS"])]
    for (source, target), mapping in labels.RACE_MAPPINGS.items():
        lines += ["", f"| {source} | {target} |", "| --- | --- |"]
        lines += [f"| {one} | {other} |" for one, other in mapping.items()]
    return "\n".join(lines) + "\n"


def tables_page() -> str:
    """Return the page of all tables: their columns, types and meanings."""
    meanings = Meanings(Path(schema.__file__).read_text())
    intro = (schema.__doc__ or "").partition("\n\n")[2]
    lines = [
        "# Tables",
        "",
        f"Schema version {schema.SCHEMA_VERSION}. {escaped(intro)}",
    ]
    tables = {name: table for name, table in vars(schema).items() if isinstance(table, pa.Schema)}
    for name, table in tables.items():
        lines += ["", f"## {name.lower()}", "", escaped(meanings.docs.get(name, "")), ""]
        lines += ["| column | type | meaning |", "| --- | --- | --- |", *meanings.rows(name, table)]
        if name == "IMAGES":
            lines += ["", "### faces of an image", "", "| field | type | meaning |", "| --- | --- | --- |"]
            lines += meanings.rows("FACE", list(schema.FACE))
    lines += ["", "## Words in these tables", "", "| name | words |", "| --- | --- |"]
    for name, words in vars(schema).items():
        if isinstance(words, tuple) and isinstance(words[0], str):
            lines.append(f"| `{name}` | {', '.join(f'`{each}`' for each in words)} |")
    lines += ["", "## Statuses {: #statuses }", ""]
    statuses = docstrings(meanings.bodies["Status"])
    lines += [f"`{each}`\n:   {escaped(statuses[each.name])}\n" for each in schema.Status]
    return "\n".join(lines) + "\n"


class Meanings:
    """What the comments and docstrings of `schema.py` say about each column of each table."""

    def __init__(self, source: str) -> None:
        tree, lines = ast.parse(source), source.splitlines()
        self.docs = docstrings(tree.body)
        self.bodies = {node.name: node.body for node in tree.body if isinstance(node, ast.ClassDef)}
        self._own: dict[str, dict[str, str]] = {}
        self._parts: dict[str, list[str]] = {}
        for node in tree.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
                name = node.target.id
                text = lines[node.lineno - 1 : node.end_lineno]
                self._own[name] = dict(found for line in text for found in _COLUMN_COMMENT.findall(line))
                for column, kind in re.findall(r'pa\.field\("(\w+)", ([A-Z_]+)\)', "\n".join(text)):
                    self._own[name].setdefault(column, self.docs.get(kind, ""))
                if match := re.match(r'pa\.field\("(\w+)"', ast.get_source_segment(source, node.value) or ""):
                    self._own[name][match[1]] = self.docs[name]
                self._parts[name] = [each.id for each in ast.walk(node.value) if isinstance(each, ast.Name)]

    def of(self, column: str, table: str) -> str:
        """Return the meaning of a table's column; empty: the name says it."""
        own = self._own.get(table, {}).get(column, "")
        return own or next(filter(None, (self.of(column, part) for part in self._parts.get(table, ()))), "")

    def rows(self, name: str, fields: Sequence[pa.Field] | pa.Schema) -> Iterator[str]:
        """Yield a row for each column."""
        for field in fields:
            needed = "" if field.nullable else ", never null"
            kind, meaning = escaped(type_words(field.type)), escaped(self.of(field.name, name))
            yield f"| `{field.name}` | {kind}{needed} | {meaning} |"


def type_words(kind: pa.DataType) -> str:
    """Return an Arrow type in words."""
    if pa.types.is_fixed_size_list(kind):
        return f"{kind.list_size} x {kind.value_type}"
    if pa.types.is_map(kind):
        return f"map from {kind.key_type} to {kind.item_type}"
    if pa.types.is_list(kind):
        return f"list of {type_words(kind.value_type)}"
    return "struct" if pa.types.is_struct(kind) else str(kind)


_COLUMN_COMMENT = re.compile(r'^[^"#]*"(\w+)".*?  # (.*)$')


def docstrings(body: Sequence[ast.stmt]) -> dict[str, str]:
    """Return the docstrings below the assignments of a module or class, each as one paragraph."""
    found = {}
    for node, after in itertools.pairwise(body):
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            found[target.id] = " ".join(str(after.value.value).split())
    return found


def value_words(field: Mapping[str, Any], defs: Mapping[str, Any]) -> str:
    """Return which values a JSON schema allows, in words."""
    if "anyOf" in field:
        kinds = [value_words(each, defs) for each in field["anyOf"]]
        return " or ".join(dict.fromkeys(kinds))
    if "$ref" in field:
        return f"{{{', '.join(defs[field['$ref'].rpartition('/')[2]]['properties'])}}}"
    if "enum" in field:
        return "one of " + ", ".join(json.dumps(each) for each in field["enum"])
    if "prefixItems" in field:
        return "[" + ", ".join(value_words(each, defs) for each in field["prefixItems"]) + "]"
    if field["type"] == "array":
        return "list of: " + value_words(field["items"], defs)
    if field["type"] == "object":
        keys = field.get("propertyNames", {}).get("enum", [])
        return (
            "table of: "
            + value_words(field["additionalProperties"], defs)
            + (f", keys {', '.join(keys)}" if keys else "")
        )
    kind = {"null": "none", "boolean": "true or false"}.get(field["type"], field["type"])
    bounds = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    limits = [
        f"{word} {_plain(field[key])}"
        for key, word in bounds.items()
        if abs(field.get(key, MAX_INT)) not in (MAX_INT, MAX_FLOAT)
    ]
    return ", ".join([kind, " and ".join(limits)] if limits else [kind])


def _plain(number: float) -> str:
    return f"{int(number):,}" if number == int(number) else str(number)


def escaped(text: str) -> str:
    """Escape what Markdown would interpret, except code."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(part if part.startswith("`") else re.sub(r"([\\*_<>\[\]|{}#])", r"\\\1", part) for part in parts)
