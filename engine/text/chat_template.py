"""Renders chat messages into a prompt with the model's own Jinja template."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser

from sempre.engine.text.messages import ContentFormat, messages_for, tools_for
from sempre.engine.text.template_form import TemplateForm
from sempre.engine.text.template_limits import BoundedEnvironment
from sempre.ipc.errors import ConfigError, ModelError, RequestError
from sempre.ipc.model_files import read_json_object, read_text

RESERVED_VARIABLES = frozenset(
    {"messages", "conversation", "template", "chat_template", "tools", "bos_token", "eos_token", "tokenize"}
    | {"add_generation_prompt", "continue_final_message", "content_format", "chat_template_kwargs"}
    | {"return_dict", "strftime_now", "raise_exception"}
)
"""Names that a caller's template variables cannot have: the engine sets these variables itself."""

# Appended to the last message to find its end in the prompt; templates trim spaces, but never this.
_END_MARK = "\ue000sempre-end-of-final-message\ue000"


def load_chat_template(folder: Path | str, *, tools: Sequence[object] | None = None) -> str:
    """Return the chat template of a model folder.

    chat_template.jinja comes first (with `tools`: additional_chat_templates/tool_use.jinja), then `chat_template` in
    tokenizer_config.json or chat_template.json: a string, or a list of named templates, of which "tool_use" is taken
    when `tools` are given and the list has it, else "default".

    Raises ConfigError when the folder has no template, ModelError when it has one that cannot be read.
    """
    folder = Path(folder)
    files = [folder / "additional_chat_templates" / "tool_use.jinja"] if tools else []
    for path in [*files, folder / "chat_template.jinja"]:
        if path.exists():
            return read_text(path)
    for path in (folder / "tokenizer_config.json", folder / "chat_template.json"):
        template = _template_in(path, with_tools=bool(tools))
        if template is not None:
            return template
    raise ConfigError(
        f"{folder} has no chat template: neither chat_template.jinja nor chat_template in tokenizer_config.json. "
        "It may be a base model; use generate() with a plain prompt, or give the parameter chat_template.",
        parameter="chat_template",
    )


def _template_in(path: Path, *, with_tools: bool) -> str | None:
    if not path.exists():
        return None
    template = read_json_object(path).get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("tool_use") if with_tools and "tool_use" in named else named.get("default")
    if template is not None and not isinstance(template, str):
        raise ModelError(f"{path}: chat_template must be a string, found {type(template).__name__}.")
    return template


def checked_variables(variables: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Return a caller's template variables. Raises RequestError for a reserved name."""
    for name in variables or ():
        if name in RESERVED_VARIABLES:
            raise RequestError(
                f"chat_template_kwargs must not hold {name!r}.", parameter="chat_template_kwargs", value=name
            )
    return variables or {}


def render_chat(
    messages: Sequence[Mapping[str, Any]],
    template: str,
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    content_format: ContentFormat = "auto",
    **variables: Any,
) -> str:
    """Render `messages` into a prompt; the template gets `variables`, which include bos_token and eos_token.

    Messages may have any form that OpenAI's clients send; they are converted to the template's form (TemplateForm).

    The prompt depends on the arguments alone. If a template asks for today's date (`strftime_now`), it gets the
    argument `date_string`. Without it, templates with a fixed date of their own use that; others are refused.

    `continue_final_message` ends the prompt inside the last message, so that the model continues it; it
    excludes `add_generation_prompt`.

    Raises RequestError naming the message field, the argument, or the template's own error.
    """
    if continue_final_message and add_generation_prompt:
        raise RequestError(
            "continue_final_message and add_generation_prompt exclude each other; set add_generation_prompt=False.",
            parameter="continue_final_message",
            value=True,
        )
    formed = messages_for(messages, _form(template), content_format)
    if continue_final_message:
        _mark_end(formed[-1], len(formed) - 1)
    variables = {
        "messages": formed,
        "tools": tools_for(tools),
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
        **variables,
        **{name: variables.get(name) or "" for name in ("bos_token", "eos_token")},
    }
    if "date_string" in variables:
        variables["strftime_now"] = lambda _format: variables["date_string"]
    prompt = _render(template, variables)
    return _cut_at_mark(prompt) if continue_final_message else prompt


def _render(template: str, variables: Mapping[str, Any]) -> str:
    try:
        return _rendered(template, variables)
    except jinja2.UndefinedError as error:
        if "strftime_now" in str(error):
            raise RequestError(
                "chat_template asks for today's date (strftime_now), which would make the prompt depend on the "
                "day it is run. Give the date as a template argument, for example date_string='26 Jul 2024'.",
                parameter="chat_template",
            ) from error
        raise RequestError(f"chat_template cannot render these messages: {error}", parameter="messages") from error
    except jinja2.TemplateSyntaxError as error:
        raise RequestError(
            f"chat_template is not valid Jinja: line {error.lineno}: {error.message}", parameter="chat_template"
        ) from error
    # TypeError, ValueError: the template does not expect a value; the others: it is unbounded
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise RequestError(f"chat_template refused these messages: {error}", parameter="messages") from error


def _rendered(template: str, variables: Mapping[str, Any]) -> str:
    compiled = _compile(template)
    assert isinstance(compiled.environment, BoundedEnvironment)
    with compiled.environment.bounded():
        prompt = compiled.render(variables)
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        # JSON text in a message, like arguments of a call, may escape what the body itself cannot hold
        raise RequestError(
            f"the prompt that chat_template makes of these messages has no UTF-8 form: {error.reason} at character "
            f"{error.start}.",
            parameter="messages",
        ) from None
    return prompt


def _mark_end(message: dict[str, Any], index: int) -> None:
    content = message.get("content")
    if isinstance(content, list) and content and content[-1]["text"]:
        content[-1]["text"] += _END_MARK
    elif isinstance(content, str) and content:
        message["content"] += _END_MARK
    else:
        raise RequestError(
            f"continue_final_message needs a last message with text; messages[{index}].content is empty.",
            parameter="continue_final_message",
        )


def _cut_at_mark(prompt: str) -> str:
    end = prompt.rfind(_END_MARK)
    if end < 0:
        raise RequestError(
            "continue_final_message: this chat_template does not put the last message into the prompt.",
            parameter="continue_final_message",
        )
    return prompt[:end]


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks text to train on; in a prompt it renders its body."""

    tags = {"generation"}  # noqa: RUF012  the base class declares it as an attribute of the instance

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Like json.dumps; Jinja's own filter escapes HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=16)
def _form(template: str) -> TemplateForm:
    return TemplateForm(template, lambda variables: _rendered(template, variables))


@lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    environment = BoundedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    filters: dict[str, Callable[..., Any]] = environment.filters
    filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    # These use the process's random stream, which neither a prompt nor a library may touch.
    del filters["random"]
    del environment.globals["lipsum"]
    return environment.from_string(template)
