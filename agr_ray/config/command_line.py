"""A job's command line: its options, `--help` and `--help-all`, and one-line errors."""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, NoReturn

from pydantic_settings import CliSettingsSource

from agr_ray.config.jobs import Job
from agr_ray.config.section import ONE_OR_SEVERAL, FollowingWords
from agr_ray.json_log import print_result, print_to_stderr
from agr_ray.redact import printable, redacted


class CommandParser(argparse.ArgumentParser):
    """The options of a job. `--help` shows the most important ones, `--help-all` all of them.

    Options of the job's own section need no prefix: `--epochs` is `--train.epochs` in training.

    Args:
        job: the job's class.
        prog: how the user calls it, such as `agr-ray train`.
    """

    def __init__(self, job: type[Job], prog: str | None = None) -> None:
        super().__init__(
            prog=prog,
            usage=" ".join(["%(prog)s", *map(str.upper, job.positional), "[--config RECIPE] [--OPTION VALUE ...]"]),
            description=job.__doc__,
            epilog=f"{_LISTS} Tables are JSON. Environment variables: AGR_RAY_SECTION__KEY=VALUE.",
            allow_abbrev=False,
            add_help=False,
            formatter_class=_HelpFormatter,
        )
        self._job = job
        self._argv: Sequence[str] = ()
        general = self.add_argument_group("general")
        general.add_argument("--help", "-h", action=_ShowHelp, nargs=0, help="show the most important options")
        general.add_argument("--help_all", action=_ShowHelp, nargs=0, help="show every option")
        general.add_argument(
            "--config",
            metavar="RECIPE",
            help="TOML file of settings: the name of a built-in recipe (demo, paper, ...), or the path or URI of your "
            "own. The command line overrides it. `agr-ray recipes` lists the built-in ones",
        )
        self._source: CliSettingsSource[Any] = CliSettingsSource(
            job,
            root_parser=self,
            cli_hide_none_type=True,
            cli_avoid_json=True,
            cli_use_class_docs_for_groups=True,
            cli_implicit_flags=False,
            cli_shortcuts={key: name for name, key in job.shortcuts().items()},
        )
        for action in self._actions:
            action.help = _with_plain_default(action.help)

    def read(self, argv: Sequence[str]) -> tuple[str | None, dict[str, Any]]:
        """Return the recipe and the values that a command line sets.

        Exits with status 0 after `--help`, and with status 2 if an option does not exist or lacks its value.

        Raises:
            SettingsError: a list or table is malformed.
        """
        end = argv.index("--") if "--" in argv else len(argv)
        self._argv = argv[:end]
        options = self._with_true([_underscored(argument) for argument in argv[:end]])
        options = _joined(options, self._job)
        arguments = self.parse_intermixed_args([*options, *argv[end:]])
        # Not through pydantic-settings, which would parse file names as lists, numbers or JSON.
        words = {name: arguments.__dict__.pop(name) for name in self._job.positional}
        return arguments.config, self._source(parsed_args=arguments)() | words

    def recipe_of_help(self, argv: Sequence[str]) -> str | None:
        """Return the recipe of a command line that asks for help; None: it names none on this disk, or does not ask."""
        words = [word for each in argv for word in each.split("=", 1)]
        if not {"--help", "-h", "--help-all", "--help_all"} & {*words} or "--config" not in words[:-1]:
            return None
        recipe = words[words.index("--config") + 1]
        return None if "://" in recipe else recipe

    def show_recipe(self, values: Mapping[str, Any]) -> None:
        """Let the help show these values, by section, in place of the defaults."""
        for action in self._actions:
            section, _, key = action.dest.partition(".")
            own = values.get(section)
            if isinstance(own, Mapping) and key in own:
                text = _DEFAULT.sub("", action.help or "")
                value = own[key] if isinstance(own[key], str) else json.dumps(own[key])
                action.help = f"{text} (recipe: {redacted(value)})".replace("%", "%%")

    def _with_true(self, argv: Sequence[str]) -> list[str]:
        """Give a boolean option that stands alone the value true: `--use_gpu` is `--use_gpu true`."""
        flags = {flag for action in self._actions if action.metavar == "bool" for flag in action.option_strings}

        def is_alone(word: str, after: str) -> bool:
            is_positional = bool(self._job.positional) and after.lower() not in _BOOLEANS
            return word in flags and (not after or after.startswith("-") or is_positional)

        following = [*argv, ""][1:]
        return [f"{word}=true" if is_alone(word, after) else word for word, after in zip(argv, following, strict=True)]

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with status 2."""
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            message = self._describe_unknown((unknown.split() or ["''"])[0].partition("=")[0])
        message = re.sub(r"^argument (\S+): ", lambda match: f"{min(match[1].split('/'), key=len)}: ", message)
        fail(f"{message} (--help-all lists every option)")

    def _describe_unknown(self, word: str) -> str:
        """Return the message about the first word that is no option and no value of one."""
        if word.startswith("-"):
            flags = list(self._option_string_actions)
            same = [flag for flag in flags if flag.rpartition(".")[2] == word.lstrip("-")]
            meant = f"; did you mean {' or '.join(same[:_NUM_MEANT])}?" if same else did_you_mean(word, flags)
            return f"{word}: there is no such option{meant}"
        before = self._argv[: self._argv.index(word)] if word in self._argv else ()
        option = next((each for each in reversed(before) if each.startswith("--")), "").partition("=")[0]
        takes_several = _underscored(option) in _path_options(self._job)
        remedy = f"; repeat {option} for several: {option} A {option} B" if takes_several else ""
        return f"{word}: is no option{remedy}"

    def format_short_help(self) -> str:
        """Return the help of the most important options, one sentence each."""
        order = ["config", *self._job.essentials]
        groups: dict[str, list[argparse.Action]] = {}
        num_hidden = 0
        for action in self._actions:
            key = "config" if action.dest in ("help", "help_all") else action.dest
            if key not in order:
                num_hidden += action.help != argparse.SUPPRESS
                continue
            section = key.partition(".")[0] if "." in key else self._job.own
            groups.setdefault(section, []).append(action)
            action.help = _first_sentence(action.help or "")
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self._job.summary())
        formatter.add_text(f"example: {self._job.example}")
        for section in sorted(groups, key=lambda name: (name != self._job.own, name)):
            formatter.start_section("options" if section == self._job.own else f"[{section}]")
            place = {key: index for index, key in enumerate(self._job.essentials)}
            formatter.add_arguments(sorted(groups[section], key=lambda action: place.get(action.dest, len(place))))
            formatter.end_section()
        formatter.add_text(f"--help-all shows {num_hidden} more options and the full descriptions. {_LISTS}")
        return formatter.format_help()


_LISTS: Final = (
    "Give a list as --model.tasks age,gender, or repeat the option. In names of options, - and _ are the same. "
    "Paths are local, file:// or s3://."
)
_NUM_MEANT: Final = 3
"""Most options that an error suggests."""
_DEFAULT: Final = re.compile(r" \(((?:default|recipe): (.*))\)$", re.DOTALL)


def _with_plain_default(text: str | None) -> str | None:
    """Return an option's help with a tuple or list of words without its quotes: `a, b`."""
    match = _DEFAULT.search(text or "")
    if text is None or match is None or match[2][:1] not in "([":
        return text
    try:
        values = ast.literal_eval(match[2])
    except (ValueError, SyntaxError):
        return text
    plain = ", ".join(map(str, values)).replace("%", "%%")
    return f"{text[: match.start()]} (default: {plain})" if values else text


def _first_sentence(text: str) -> str:
    """Return the first sentence of an option's help, and its default unless it is empty."""
    match = _DEFAULT.search(text)
    body = text[: match.start()] if match else text
    first = re.split(r"(?<!\.)\.\s", body, maxsplit=1)[0].rstrip(".")
    default = "" if match is None or match[2] in ("", "None", "()", "[]", "{}", "False") else f" ({match[1]})"
    return first + default


class _ShowHelp(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        assert isinstance(parser, CommandParser)
        print_result((parser.format_help() if self.dest == "help_all" else parser.format_short_help()).rstrip("\n"))
        raise SystemExit(0)


_BOOLEANS: Final = ("true", "false", "1", "0", "yes", "no", "on", "off", "t", "f", "y", "n")
"""What pydantic reads as a boolean, in lower case."""
_METAVARS: Final = {
    "str": "TEXT",
    "int": "N",
    "float": "X",
    "bool": "[true|false]",
    "{int,tuple[int,int]}": "N|MIN-MAX",
    "tuple[str,...]": "TEXT,...",
    "tuple[float,...]": "X,...",
    "tuple[int,...]": "N,...",
    "list[str]": "TEXT",
}


class _HelpFormatter(argparse.HelpFormatter):
    """Shows only the shortest name of each option."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        name = min((each for each in action.option_strings if each.startswith("--")), key=len)
        if action.nargs == 0:
            return name.replace("help_all", "help-all")
        metavar = self._format_args(action, action.dest.upper())
        plain = "KEY=VALUE,..." if metavar.startswith("dict[") and metavar.endswith("str]") else metavar
        return f"{name} {_METAVARS.get(plain, plain)}"


def _underscored(argument: str) -> str:
    """Return an option with underscores for dashes, so that `--new-run` and `--train.batch-size` work, too."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    negation = "no-" if name.startswith("no-") else ""  # argparse's own
    return f"--{negation}{name.removeprefix('no-').replace('-', '_')}{equals}{value}"


def _joined(argv: Sequence[str], job: type[Job]) -> list[str]:
    """Join the values of each path option into one JSON list, because pydantic-settings keeps only the last.

    A path option may be repeated, and some take several words (`FollowingWords`). Commas do not separate paths, because
    a path may contain one.
    """
    keys = _path_options(job)
    others: list[str] = []
    values: dict[str, list[str]] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        if flag not in keys or not (equals or words):
            others.append(word)
            continue
        own = values.setdefault(keys[flag], [])
        own.append(value if equals else words.pop(0))
        while _paths(job)[keys[flag]] and words and not words[0].startswith("-"):
            own.append(words.pop(0))
    joined = {key: each[0] if len(each) == 1 else json.dumps(each) for key, each in values.items()}
    return [*others, *(f"--{key}={value}" for key, value in joined.items())]


def _path_options(job: type[Job]) -> dict[str, str]:
    """Return the dotted key of each option that takes one or several paths."""
    return {flag: key for key in _paths(job) for flag in (f"--{key}", job.option(key))}


def _paths(job: type[Job]) -> dict[str, bool]:
    """Return the dotted keys of options that take one or several paths, and whether several words may follow one."""
    return {
        f"{name}.{key}": FollowingWords in field.metadata
        for name, section in job.sections().items()
        for key, field in section.model_fields.items()
        if ONE_OR_SEVERAL in field.metadata
    }


def one_line(text: str) -> str:
    """Return a message on one line, with passwords redacted and control characters escaped."""
    return printable(redacted(" ".join(text.split())))


def fail(message: str, status: int = 2) -> NoReturn:
    """Print an error on one line of stderr, and exit."""
    print_to_stderr(f"error: {one_line(message)}")
    raise SystemExit(status)


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """Return `; did you mean X?` if a known word is similar, else nothing."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""
