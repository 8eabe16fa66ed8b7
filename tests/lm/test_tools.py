"""Tools in prompts as the published chat templates write them, and calls in answers read and checked."""

import json
import re

import pytest

from visplice.lm.prompt import IGNORE, PromptBuilder, VisualTokens
from visplice.lm.templates import TEMPLATES
from visplice.lm.tools import Tool, ToolCall, parse_tool_call, read_tools

WEATHER = {
    "name": "get_weather",
    "description": "Weather of a city — today",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "Its name"},
            "days": {"type": ["integer", "null"]},
            "unit": {"type": "string", "enum": ["celsius", "kelvin"]},
            "places": {"type": "array", "items": {"type": "object", "properties": {"x": {"type": "number"}}}},
        },
        "required": ["city"],
    },
}
NOW = {"name": "now", "description": "The time", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": WEATHER}, NOW]


class Characters:
    """A tokenizer of one id a character, so that prompts can be read back."""

    vocab_size = 0x110000 + 100

    def __init__(self, *controls):
        self.controls = {name: 0x110000 + index for index, name in enumerate(controls)}

    def control(self, name):
        return self.controls[name]

    def encode_with_starts(self, text):
        return [ord(character) for character in text], list(range(len(text)))

    def read(self, ids):
        names = {index: name for name, index in self.controls.items()} | {
            self.vocab_size: "{",
            self.vocab_size + 1: "}",
        }
        return "".join(names.get(index) or chr(index) for index in ids if index != IGNORE)


def written(name, messages, **options):
    """The prompt as text, and what of it is supervised; an image reads {}."""
    tokenizer = Characters(*TEMPLATES[name].controls(with_tools=True))
    builder = PromptBuilder(tokenizer, TEMPLATES[name], VisualTokens(vocab_size=tokenizer.vocab_size, count=0))
    prompt = builder.build(messages, **options)
    return tokenizer.read(prompt.ids), tokenizer.read(prompt.labels)


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def call(name="get_weather", arguments=None, **more):
    inner = {"name": name, "arguments": {"city": "Zürich", "days": 2} if arguments is None else arguments}
    return {"role": "assistant", "tool_calls": [{"type": "function", "id": "1", "function": inner}], **more}


def result(content):
    return {"role": "tool", "content": content}


# --- prompts ---

REQUEST = (
    "Given the following functions, please respond with a JSON for a function call with its proper arguments that best "
    "answers the given prompt.\n\nRespond in the format "
    '{"name": function name, "parameters": dictionary of argument name and its value}.Do not use variables.\n\n'
)


def test_llama3_is_the_published_template_of_llama_3_1():
    messages = [user(" What now? "), call("now", {}), result({"h": 7}), assistant("Seven."), user("Thanks")]
    text, supervised = written("llama3", messages, tools=[NOW], add_generation_prompt=True)
    definition = """{
    "type": "function",
    "function": {
        "name": "now",
        "description": "The time",
        "parameters": {
            "type": "object",
            "properties": {}
        }
    }
}"""
    turns = [
        ("system", "Environment: ipython\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"),
        ("user", f"{REQUEST}{definition}\n\nWhat now?"),
        ("assistant", '{"name": "now", "parameters": {}}'),
        ("ipython", '{"h": 7}'),
        ("assistant", "Seven."),
        ("user", "Thanks"),
    ]
    parts = [f"<|start_header_id|>{role}<|end_header_id|>\n\n{said}<|eot_id|>" for role, said in turns]
    assert text == f"<|begin_of_text|>{''.join(parts)}<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert supervised == '{"name": "now", "parameters": {}}<|eot_id|>Seven.<|eot_id|>'


@pytest.mark.parametrize("system", [None, "Be kind."])
@pytest.mark.parametrize("output", [{"t": 25, "when": ["now", None]}, "25 °C"])
def test_llama4_is_the_template_that_transformers_has(system, output):
    from transformers.models.llama4.processing_llama4 import chat_template
    from transformers.utils.chat_template_utils import render_jinja_template

    tools = [{"type": "function", "function": WEATHER}, {"type": "function", "function": NOW}]
    messages = [] if system is None else [{"role": "system", "content": system}]
    several = call(content="Wait.")["tool_calls"] * 2
    messages += [user(" What is it in Zürich?\n"), {**call(content="Wait."), "tool_calls": several}]
    messages += [result(output), assistant("It is 25."), user("And now?"), call("now", {}, content=""), result("7:00")]
    for options in ({"tools": tools}, {}):
        (expected,), _ = render_jinja_template(
            [messages],
            chat_template=chat_template,
            add_generation_prompt=True,
            bos_token="<|begin_of_text|>",
            **options,
        )
        assert written("llama4", messages, add_generation_prompt=True, **options)[0] == expected


def test_all_of_a_call_is_supervised():
    messages = [user("?"), call("now", {}, content="Wait."), result(1)]
    expected = '<|python_start|>Wait.<|python_end|>{"name": "now", "parameters": {}}<|eot|>'
    assert written("llama4", messages)[1] == expected


def test_tokens_that_only_tools_need_are_missed_when_tools_are_used():
    tokenizer = Characters(*TEMPLATES["llama4"].controls())
    builder = PromptBuilder(tokenizer, TEMPLATES["llama4"], VisualTokens(vocab_size=tokenizer.vocab_size, count=0))
    assert builder.build([user("?")], add_generation_prompt=True).ids
    lacking = r"no control token '<\|python_start\|>', '<\|python_end\|>', which template 'llama4' needs"
    with pytest.raises(ValueError, match=lacking):
        builder.build([user("?"), call()])


def test_definitions_stand_in_front_of_an_image_too():
    text, _ = written("llama3", [user("<image> what?")], tools=TOOLS)
    assert "}\n\n{} what?<|eot_id|>" in text.replace("{}\n what", "{} what")
    assert text.count("Given the following functions") == 1


def test_both_forms_of_a_definition_are_written_alike():
    forms = [[{"type": "function", "function": NOW}], [NOW], [Tool(**NOW)]]
    assert len({written("llama3", [user("what?")], tools=form)[0] for form in forms}) == 1


def test_arguments_may_be_text_and_calls_may_be_bare():
    messages = [user("what?"), call(), result(1)]
    expected = written("llama3", messages)
    assert expected[1] == '{"name": "get_weather", "parameters": {"city": "Zürich", "days": 2}}<|eot_id|>'
    arguments = {"city": "Zürich", "days": 2}
    for one in (
        {"name": "get_weather", "arguments": json.dumps(arguments)},
        {"name": "get_weather", "parameters": arguments},
        ToolCall("get_weather", arguments),
    ):
        assert written("llama3", [messages[0], {"role": "assistant", "tool_calls": [one]}, messages[2]]) == expected


@pytest.mark.parametrize("name", ["turns", "plain", "alpaca", "vicuna", "llama2"])
def test_family_without_a_published_format_refuses_tools(name):
    message = f"template '{name}' has no published tool format; llama3, llama4 have one"
    with pytest.raises(ValueError, match=f"^tools were given, but {message}"):
        written(name, [user("<image>what?")], tools=TOOLS)
    with pytest.raises(ValueError, match=f"^message 2 has tool_calls, but {message}"):
        written(name, [user("<image>what?"), call()])
    assert written(name, [user("<image>what?")], tools=[]) == written(name, [user("<image>what?")])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([user("?"), call(), user("!")], "message 3 has role 'user' where 'tool' is due"),
        ([user("?"), assistant("!"), result(1)], "message 3 has role 'tool' where 'user' is due"),
        ([user("?"), call(), result(1), user("!")], "message 4 has role 'user' where 'assistant' or 'tool' is due"),
        ([user("?"), call(), result(None)], "message 3 has no content; it holds what the tool gave back"),
        ([user("?"), call(), result({1, 2})], "message 3 holds what cannot be written as JSON"),
        ([user("?"), call(content="Wait.")], "message 2 has text beside its tool_calls"),
        ([user("?"), {"role": "assistant", "tool_calls": ["now"]}], "message 2 has the tool call 'now'; a call has"),
        ([user("?"), {"role": "assistant", "tool_calls": "now"}], "message 2: tool_calls is 'now'; it is a list"),
        ([user("?"), call("no name")], "a call has a name and an object of arguments"),
        ([user("?"), call(arguments="[1]")], "a call has a name and an object of arguments"),
        ([user("?"), call(arguments='{"a": 1} b')], "a call has a name and an object of arguments"),
        ([user("?"), call() | {"tool_calls": call()["tool_calls"] * 2}], "message 2 has 2 tool calls; the format of"),
    ],
)
def test_call_or_result_that_cannot_be_is_refused(messages, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        written("llama3", messages)


# --- definitions ---


def schema(**changes):
    return {"name": "f", "description": "", "parameters": {"type": "object"} | changes}


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ({"name": "f"}, "they are a list of definitions"),
        ([{"name": "f", "parameters": {}}], "tool 1 has the fields ['name', 'parameters']; a definition has"),
        ([{**NOW, "strict": True}], "tool 1 has the fields ['description', 'name', 'parameters', 'strict']"),
        ([{"type": "tool", "function": NOW}], "around a function stands {'type': 'function'} and no more"),
        ([NOW, {"type": "function", "function": NOW}], "tool 2 is called 'now' as another one is; names differ"),
        ([{**NOW, "name": "two words"}], "tool name is 'two words'; it has 1 to 64 letters"),
        ([{**NOW, "description": None}], "tool now: description is None; it is text"),
        ([{**NOW, "parameters": {}}], "tool now: parameters have type None; arguments are an 'object'"),
        ([{**NOW, "parameters": []}], "tool now: parameters: the schema is []; it is an object"),
        ([schema(oneOf=[])], "tool f: parameters: 'oneOf' is not supported in a schema; there is additionalProperties"),
        ([schema(properties={"a": {"format": "date"}})], "tool f: parameters.a: 'format' is not supported"),
        ([schema(properties={"a": {"type": "dict"}})], "tool f: parameters.a: type is 'dict'; it is one of null"),
        ([schema(properties={"a": {"type": []}})], "tool f: parameters.a: type is []"),
        ([schema(properties={"a": {"items": {"type": 1}}})], "tool f: parameters.a[]: type is 1"),
        ([schema(properties={"a": {"enum": []}})], "tool f: parameters.a: enum is []; it is a list of at least one"),
        ([schema(properties=["a"])], "tool f: parameters: properties are ['a']; they are an object of schemas"),
        ([schema(additionalProperties={"not": {}})], "tool f: parameters.*: 'not' is not supported"),
        ([schema(required="a")], "tool f: parameters: required is 'a'; it is a list of names"),
        ([schema(properties={}, required=["a"])], "tool f: parameters: 'a' is required but no property of it"),
        ([schema(default={1})], "tool f holds what cannot be written as JSON"),
    ],
)
def test_definition_that_cannot_be_is_refused(tools, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_tools(tools)


# --- what the model says ---


def said(given, **more):
    return json.dumps({"name": "get_weather", "parameters": given} | more)


@pytest.mark.parametrize(
    "text",
    [
        said({"city": "Rome", "days": 2}),
        f"\n <|python_tag|>{said({'city': 'Rome', 'days': 2})}\n",
        f"<|python_start|><|python_end|>{said({'city': 'Rome', 'days': 2})}",
        '{"type": "function", "name": "get_weather", "parameters": {"city": "Rome", "days": 2}}',
        '{"arguments": {"days": 2, "city": "Rome"},\n "name": "get_weather"}',
    ],
)
def test_call_is_read(text):
    assert parse_tool_call(text, TOOLS) == ToolCall("get_weather", {"city": "Rome", "days": 2})


@pytest.mark.parametrize(
    "text",
    [
        "It is warm in Rome.",
        "",
        "{",
        '{"city": "Rome"}',
        '{"name": "Rome", "country": "Italy"}',
        '[{"name": "now", "parameters": {}}]',
        '{"name": "get_weather", "parameters": {"city": "Ro',
        '{"name": "now", "parameters": {"a": NaN}}',
        "<|python_tag|>print(7)",
        '{"a":' * 100_000,
        f'{{"name": "now", "parameters": {{"a": {"9" * 5000}}}}}',
    ],
)
def test_answer_that_is_no_call_is_none(text):
    assert parse_tool_call(text, TOOLS) is None


def test_tool_without_arguments_may_be_called_by_its_name_alone():
    assert parse_tool_call('{"name": "now"}', TOOLS) == ToolCall("now", {})
    assert parse_tool_call('{"name": "now"}', TOOLS[:1]) is None
    with pytest.raises(ValueError, match=r"parameters.city is missing where string is expected; found nothing"):
        parse_tool_call('{"name": "get_weather"}', TOOLS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"name": "later", "parameters": {}}', "tool call: name is 'later' where 'get_weather' or 'now' is expected"),
        ('{"name": 7, "parameters": {}}', "tool call: name is 7 (integer) where a string is expected"),
        (said({}), "tool call get_weather: parameters.city is missing where string is expected; found nothing"),
        (said({"city": "a", "on": 1}), "get_weather: parameters.on is unknown; found city, on, expected city, days"),
        (said({"city": 7}), "tool call get_weather: parameters.city is 7 (integer) where string is expected"),
        (said({"city": None}), "parameters.city is null (null) where string is expected"),
        (said({"city": "a", "days": "2"}), 'parameters.days is "2" (string) where integer or null is expected'),
        (said({"city": "a", "days": True}), "parameters.days is true (boolean) where integer or null is expected"),
        (said({"city": "a", "days": 1.5}), "parameters.days is 1.5 (number) where integer or null is expected"),
        (
            said({"city": "a", "places": [{"x": 9}]}).replace("9", "1e999"),
            "places[0].x is Infinity (float) where number",
        ),
        (said({"city": "a", "unit": "f"}), 'unit is "f" (string) where one of "celsius", "kelvin" is expected'),
        (said({"city": "a", "places": {}}), "parameters.places is {} (object) where array is expected"),
        (said({"city": "a", "places": [{}, {"x": ""}]}), 'parameters.places[1].x is "" (string) where number is'),
        (said({"city": "a", "places": [{"y": 1}]}), "parameters.places[0].y is unknown; found y, expected x"),
        (said("Rome"), 'tool call get_weather: parameters is "Rome" (string) where object is expected'),
        (said({}, arguments={}), "it has parameters and arguments where one of them is expected"),
        (said({"city": "a"}, id=1), "field 'id' is unknown; name and parameters are expected"),
        (said({"city": "a"}, type="tool"), "type is \"tool\" (string) where 'function' is expected"),
        (said({"city": "a"}) + "; " + said({"city": "b"}), "stands behind it where nothing is expected; one call at a"),
        (said({"city": "a"}) + " There!", "get_weather: 'There!' stands behind it where nothing is expected"),
    ],
)
def test_wrong_call_is_refused_by_field_found_and_expected(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_tool_call(text, TOOLS)


def test_free_objects_take_what_their_schema_allows():
    def parsed(parameters, arguments):
        tool = {"name": "f", "description": "", "parameters": {"type": "object"} | parameters}
        found = parse_tool_call(json.dumps({"name": "f", "parameters": arguments}), [tool])
        return found.arguments if found else None

    assert parsed({}, {"a": [1]}) == {"a": [1]}
    assert parsed({"properties": {}, "additionalProperties": True}, {"a": 1}) == {"a": 1}
    assert parsed({"additionalProperties": {"type": "number"}}, {"a": 1, "b": 0.5}) == {"a": 1, "b": 0.5}
    with pytest.raises(ValueError, match=r"parameters\.b is true"):
        parsed({"additionalProperties": {"type": "number"}}, {"a": 1, "b": True})
    assert parsed({"properties": {"a": {"enum": [1, None]}}}, {"a": None}) == {"a": None}
    with pytest.raises(ValueError, match=r"parameters.a is true \(boolean\) where one of 1, null is expected"):
        parsed({"properties": {"a": {"enum": [1, None]}}}, {"a": True})
