"""Tools: their definitions, and calls of them in what the model says.

This is the JSON-based tool calling of Llama 3.1 as the published chat templates of Llama 3.1 and Llama 4 write it: the
definitions stand in the first user message, a call is `{"name": ..., "parameters": {...}}`, a result comes back under
the role `ipython`. Which families know it, and in which words, stands in `visplice.lm.templates`. What Meta describes
beside it is left out: built-in tools, `<function=...>` tags and the calls in Python's syntax of Llama 3.2.

Schemas are a subset of JSON Schema, and what is not in it is refused when tools are given, not ignored when they are
called. Unlike there, an object that lists its properties takes no others, unless `additionalProperties` says so.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from visplice.lm.templates import ToolFormat

_CHECKED = {"type", "enum", "required", "properties", "items", "additionalProperties"}
_NOTES = {"description", "title", "default", "examples"}  # said to the model, not checked
_TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_PREFIXES = ("<|python_tag|>", "<|python_start|><|python_end|>")  # before a call, where controls were decoded as text


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A function that the model may call."""

    name: str
    description: str
    parameters: Mapping[str, Any]  # JSON schema of an object

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise ValueError(f"tool name is {self.name!r}; it has 1 to 64 letters, digits, and '_', '-' or '.'")
        if not isinstance(self.description, str):
            raise ValueError(f"tool {self.name}: description is {self.description!r}; it is text")
        _check_schema(self.parameters, f"tool {self.name}: parameters")
        if self.parameters.get("type") != "object":
            found = self.parameters.get("type")
            raise ValueError(f"tool {self.name}: parameters have type {found!r}; arguments are an 'object'")
        _json(self.definition(), f"tool {self.name}")

    def definition(self) -> dict[str, Any]:
        """The definition as the model is shown it."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class ToolCall:
    """A call that fits its tool."""

    name: str
    arguments: dict[str, Any]


def read_tools(tools: Sequence[Tool | Mapping[str, Any]]) -> list[Tool]:
    """Tools from their definitions: `{"name", "description", "parameters"}`, or `{"type": "function", "function":
    ...}` around it.

    Raises:
        ValueError: a definition lacks a field, has an unknown one, or its schema goes beyond the subset; a name comes
            twice. The message names the tool and the field.
    """
    if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence):
        raise ValueError(f"tools are {tools!r}; they are a list of definitions")
    read: dict[str, Tool] = {}
    for number, given in enumerate(tools, 1):
        tool = given if isinstance(given, Tool) else _read_tool(given, f"tool {number}")
        if tool.name in read:
            raise ValueError(f"tool {number} is called {tool.name!r} as another one is; names differ")
        read[tool.name] = tool
    return list(read.values())


def _read_tool(given: Any, where: str) -> Tool:
    fields = {"name", "description", "parameters"}
    if isinstance(given, Mapping) and "function" in given:
        if given.keys() != {"type", "function"} or given["type"] != "function":
            raise ValueError(f"{where} is {dict(given)!r}; around a function stands {{'type': 'function'}} and no more")
        given = given["function"]
    if not isinstance(given, Mapping) or given.keys() != fields:
        found = sorted(map(str, given)) if isinstance(given, Mapping) else repr(given)
        raise ValueError(f"{where} has the fields {found}; a definition has {sorted(fields)}")
    return Tool(**given)


def tool_request(tools: Sequence[Tool], form: ToolFormat) -> str:
    """What stands in front of the first thing the user says."""
    definitions = [json.dumps(tool.definition(), ensure_ascii=False, indent=4) + "\n\n" for tool in tools]
    return form.user + "".join(definitions)


# --- calls and results in a conversation ---


def written_calls(calls: Any, form: ToolFormat, where: str) -> str:
    """The `tool_calls` of an assistant's message as the model would have said them.

    A call is a `ToolCall`, `{"name", "arguments"}` or `{"function": {"name", "arguments"}}`; arguments are an object,
    or text that holds one.

    Raises:
        ValueError: a call is none of these, or there are more than the family allows.
    """
    if not isinstance(calls, Sequence) or isinstance(calls, str) or not calls:
        raise ValueError(f"{where}: tool_calls is {calls!r}; it is a list of at least one call")
    if len(calls) > 1 and not form.several:
        raise ValueError(f"{where} has {len(calls)} tool calls; the format of this family has one in a message")
    written = []
    for call in calls:
        name, arguments = (call.name, call.arguments) if isinstance(call, ToolCall) else _read_call(call, where)
        written.append(f'{{"name": {json.dumps(name)}, "parameters": {_json(arguments, where)}}}')
    return "".join(written)


def _read_call(call: Any, where: str) -> tuple[str, dict[str, Any]]:
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    name = inner.get("name") if isinstance(inner, Mapping) else None
    arguments = inner.get("arguments", inner.get("parameters")) if isinstance(inner, Mapping) else None
    if isinstance(arguments, str):
        arguments = _load(arguments)
    if not isinstance(name, str) or not _NAME.fullmatch(name) or not isinstance(arguments, dict):
        raise ValueError(f"{where} has the tool call {call!r}; a call has a name and an object of arguments")
    return name, arguments


def written_result(content: Any, where: str) -> str:
    """What a tool gave back, as JSON; text becomes a JSON string, so an object is better given as an object."""
    if content is None:
        raise ValueError(f"{where} has no content; it holds what the tool gave back")
    return _json(content, where)


def _json(value: Any, where: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} holds what cannot be written as JSON ({error})") from error


# --- what the model says ---


def parse_tool_call(text: str, tools: Sequence[Tool | Mapping[str, Any]]) -> ToolCall | None:
    """The tool call that an answer is, or None when it is not one.

    An answer is a call when it begins with a JSON object that has a `name` and `parameters` (or `arguments`), or only
    the name of one of the tools. `<|python_tag|>` may stand before it. Several calls in an answer are refused: Llama
    3.1 was taught one at a time, and calls parted by semicolons are published nowhere.

    Raises:
        ValueError: it is a call, but of an unknown tool, lacks an argument, has an unknown one or one of the wrong
            type, or something stands behind it. The message names the field, what was found and what was expected.
    """
    known = {tool.name: tool for tool in read_tools(tools)}
    text = text.strip()
    for prefix in _PREFIXES:
        text = text.removeprefix(prefix).lstrip()
    call, rest = _load_first(text)
    if not isinstance(call, dict) or "name" not in call:
        return None
    name, given = call["name"], [field for field in ("parameters", "arguments") if field in call]
    if not given and not (isinstance(name, str) and name in known):
        return None
    if not isinstance(name, str):
        raise ValueError(f"tool call: name is {_shown(name)} where a string is expected")
    if name not in known:
        raise ValueError(f"tool call: name is {name!r} where {' or '.join(map(repr, known)) or 'none'} is expected")
    where = f"tool call {name}"
    if rest := rest.strip():
        raise ValueError(f"{where}: {rest[:40]!r} stands behind it where nothing is expected; one call at a time")
    if len(given) > 1:
        raise ValueError(f"{where}: it has parameters and arguments where one of them is expected")
    if unknown := sorted(call.keys() - {"name", "type", *given}):
        raise ValueError(f"{where}: field {unknown[0]!r} is unknown; name and parameters are expected")
    if call.get("type", "function") != "function":
        raise ValueError(f"{where}: type is {_shown(call['type'])} where 'function' is expected")
    arguments = call[given[0]] if given else {}
    _check_value(arguments, known[name].parameters, f"{where}: {given[0] if given else 'parameters'}")
    return ToolCall(name, arguments)


def _load_first(text: str) -> tuple[Any, str]:
    """The JSON object that the text begins with, and what stands behind it; None when there is none."""
    if not text.startswith("{"):
        return None, text
    try:
        value, end = json.JSONDecoder(parse_constant=_refuse_constant).raw_decode(text)
    except (ValueError, RecursionError):
        return None, text
    return value, text[end:]


def _load(text: str) -> Any:
    value, rest = _load_first(text.strip())
    return None if rest.strip() else value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


# --- the subset of JSON Schema ---


def _check_schema(schema: Any, where: str) -> None:
    if not isinstance(schema, Mapping):
        raise ValueError(f"{where}: the schema is {schema!r}; it is an object")
    if unknown := sorted(set(map(str, schema)) - _CHECKED - _NOTES):
        known = ", ".join(sorted(_CHECKED | _NOTES))
        raise ValueError(f"{where}: {unknown[0]!r} is not supported in a schema; there is {known}")
    types = _types(schema)
    if not types or not all(kind in _TYPES for kind in types):
        raise ValueError(f"{where}: type is {schema['type']!r}; it is one of {', '.join(_TYPES)} or a list of them")
    if "enum" in schema and not (isinstance(schema["enum"], list | tuple) and schema["enum"]):
        raise ValueError(f"{where}: enum is {schema['enum']!r}; it is a list of at least one value")
    properties = schema.get("properties", {})
    if not isinstance(properties, Mapping):
        raise ValueError(f"{where}: properties are {properties!r}; they are an object of schemas")
    for name, inner in properties.items():
        _check_schema(inner, f"{where}.{name}")
    if "items" in schema:
        _check_schema(schema["items"], f"{where}[]")
    more = _more(schema)
    if not isinstance(more, bool):
        _check_schema(more, f"{where}.*")
    required = schema.get("required", ())
    if not isinstance(required, list | tuple) or not all(isinstance(name, str) for name in required):
        raise ValueError(f"{where}: required is {required!r}; it is a list of names")
    if more is False and (missing := [name for name in required if name not in properties]):
        raise ValueError(f"{where}: {missing[0]!r} is required but no property of it")


def _check_value(value: Any, schema: Mapping[str, Any], where: str) -> None:
    types = _types(schema)
    if not any(_is(value, kind) for kind in types):
        raise ValueError(f"{where} is {_shown(value)} where {' or '.join(types)} is expected")
    if "enum" in schema and not any(_same(value, choice) for choice in schema["enum"]):
        choices = ", ".join(json.dumps(choice, ensure_ascii=False) for choice in schema["enum"])
        raise ValueError(f"{where} is {_shown(value)} where one of {choices} is expected")
    if isinstance(value, list) and "items" in schema:
        for number, item in enumerate(value):
            _check_value(item, schema["items"], f"{where}[{number}]")
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        more = _more(schema)
        for name in schema.get("required", ()):
            if name not in value:
                due = " or ".join(_types(properties.get(name, {})))
                raise ValueError(f"{where}.{name} is missing where {due} is expected; found {_names(value)}")
        for name, inner in value.items():
            if name in properties:
                _check_value(inner, properties[name], f"{where}.{name}")
            elif more is False:
                raise ValueError(f"{where}.{name} is unknown; found {_names(value)}, expected {_names(properties)}")
            elif more is not True:
                _check_value(inner, more, f"{where}.{name}")


def _more(schema: Mapping[str, Any]) -> Any:
    """Whether an object may have properties that are not listed, or their schema."""
    return schema.get("additionalProperties", "properties" not in schema)


def _types(schema: Mapping[str, Any]) -> tuple[Any, ...]:
    kind = schema.get("type", _TYPES)
    return tuple(kind) if isinstance(kind, list | tuple) else (kind,)


def _is(value: Any, kind: str) -> bool:
    match kind:
        case "null":
            return value is None
        case "boolean":
            return isinstance(value, bool)
        case "integer":
            return isinstance(value, int) and not isinstance(value, bool)
        case "number":
            return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        case "string":
            return isinstance(value, str)
        case "array":
            return isinstance(value, list)
        case _:
            return isinstance(value, dict)


def _same(value: Any, choice: Any) -> bool:
    return value == choice and isinstance(value, bool) == isinstance(choice, bool)


def _names(fields: Mapping[str, Any]) -> str:
    return ", ".join(fields) or "nothing"


def _shown(value: Any) -> str:
    """A value and its type, for messages."""
    kind = next((kind for kind in _TYPES if _is(value, kind)), type(value).__name__)
    written = json.dumps(value, ensure_ascii=False)
    return f"{written if len(written) <= 60 else written[:60] + '…'} ({kind})"
