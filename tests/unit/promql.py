"""A parser for the part of PromQL that our dashboard and alerts use. It rejects what it does not know.

expression: operand (operator [on|ignoring (labels)] operand)*
operand:    number, string, selector, function(expressions), aggregation [by|without (labels)] (expressions), (...)
selector:   metric{label="value", ...}[duration]
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_TOKEN = re.compile(
    r"\s*(?:(?P<duration>\[\d+[smhdw]\])|(?P<number>\d+(?:\.\d+)?)|(?P<string>\"(?:[^\"\\]|\\.)*\")"
    r"|(?P<name>[a-zA-Z_:][\w:]*)|(?P<symbol>=~|!~|!=|==|>=|<=|[-+*/%^(){},=<>]))"
)
_AGGREGATIONS = {"sum", "max", "min", "avg", "count"}
_RANGE_FUNCTIONS = {"rate", "increase", "max_over_time", "min_over_time"}
_FUNCTIONS = {"time": 0, "histogram_quantile": 2, "abs": 1}
_OPERATORS = {"+", "-", "*", "/", "%", "^", "==", "!=", ">", "<", ">=", "<=", "and", "or", "unless"}


@dataclass
class Query:
    """The metrics of an expression, with the labels that it matches, and the labels that it aggregates by."""

    selectors: list[tuple[str, list[str], bool]] = field(default_factory=list)
    """Metric, labels, and whether it has a duration."""
    by: list[str] = field(default_factory=list)


def parse(text: str) -> Query:
    """Return the query; raises ValueError if it is malformed."""
    parser = _Parser(text)
    parser.expression()
    if parser.token != ("end", ""):
        raise ValueError(f"{text}: unexpected {parser.token[1]!r}")
    return parser.query


class _Parser:
    def __init__(self, text: str) -> None:
        self.text, self.place, self.query = text, 0, Query()
        self.token = ("", "")
        self.next()

    def next(self) -> str:
        """Return the present token and read the next."""
        before = self.token[1]
        rest = self.text[self.place :]
        match = _TOKEN.match(rest)
        if not rest.strip():
            self.token = ("end", "")
        elif match is None:
            raise ValueError(f"{self.text}: can't be read from {rest.strip()!r}")
        else:
            self.place += match.end()
            assert match.lastgroup is not None
            self.token = (match.lastgroup, match[match.lastgroup])
        return before

    def expect(self, value: str) -> None:
        if self.token[1] != value:
            raise ValueError(f"{self.text}: expected {value!r}, found {self.token[1]!r}")
        self.next()

    def expression(self) -> None:
        self.operand()
        while self.token[1] in _OPERATORS and self.token[0] != "string":
            self.next()
            if self.token[1] in ("on", "ignoring"):
                self.next()
                self.query.by += self.labels()
            self.operand()

    def operand(self) -> None:
        kind, value = self.token
        if kind in ("number", "string"):
            self.next()
        elif value == "(":
            self.next()
            self.expression()
            self.expect(")")
        elif value in _AGGREGATIONS:
            self.next()
            if self.token[1] in ("by", "without"):
                self.next()
                self.query.by += self.labels()
            if self.arguments() != 1:
                raise ValueError(f"{self.text}: {value} takes one argument")
        elif value in _RANGE_FUNCTIONS:
            self.next()
            num_selectors = len(self.query.selectors)
            if self.arguments() != 1 or not self.query.selectors[num_selectors:][0][2]:
                raise ValueError(f"{self.text}: {value} takes a selector with a duration")
        elif value in _FUNCTIONS:
            self.next()
            if self.arguments() != _FUNCTIONS[value]:
                raise ValueError(f"{self.text}: {value} takes {_FUNCTIONS[value]} arguments")
        elif kind == "name":
            self.selector()
        else:
            raise ValueError(f"{self.text}: unexpected {value!r}")

    def arguments(self) -> int:
        self.expect("(")
        number = 0
        while self.token[1] != ")":
            if number:
                self.expect(",")
            self.expression()
            number += 1
        self.next()
        return number

    def labels(self) -> list[str]:
        self.expect("(")
        names = []
        while self.token[1] != ")":
            if names:
                self.expect(",")
            names.append(self.name())
        self.next()
        return names

    def name(self) -> str:
        if self.token[0] != "name":
            raise ValueError(f"{self.text}: expected a name, found {self.token[1]!r}")
        return self.next()

    def selector(self) -> None:
        metric, labels = self.name(), []
        if self.token[1] == "{":
            self.next()
            while self.token[1] != "}":
                if labels:
                    self.expect(",")
                labels.append(self.name())
                if self.token[1] not in ("=", "!=", "=~", "!~"):
                    raise ValueError(f"{self.text}: expected a matcher, found {self.token[1]!r}")
                operator = self.next()
                kind, value = self.token
                if kind != "string":
                    raise ValueError(f"{self.text}: expected a string, found {value!r}")
                if operator in ("=~", "!~"):
                    re.compile(value[1:-1])
                self.next()
            self.next()
        has_duration = self.token[0] == "duration"
        if has_duration:
            self.next()
        self.query.selectors.append((metric, labels, has_duration))
