"""Forms of answers: the JSON schema a model is given, and the reading of what it wrote.

Servers differ in what they understand, so a `Dialect` says how a request is put; where a server
refuses it, `after_refusal` gives the next one to try. What a model wrote is never trusted: it is
read as JSON and checked against the answer's class here, whatever the server promised.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from types import MappingProxyType
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from society.errors import BadAnswer

Answer = TypeVar("Answer", bound=BaseModel)

PROBLEMS_TOLD = 4
"""Problems of one answer that the model is told about."""
FEEDBACK_CHARS = 600
_ALLOWED = "allowed_"
_UNNEEDED = ("default", "title", "discriminator")
_BOUNDS = ("minLength", "maxLength", "pattern", "format", "minItems", "maxItems", "uniqueItems")
"""Keywords that servers with a strict mode may refuse; the bounds are checked here anyway."""
MOST_WORDS = 250
"""Words that a schema may name for one field; of more, OpenAI's strict mode bounds the length."""
_THOUGHT_END = "</think>"


class Form(StrEnum):
    """How an answer's form is asked for, the most binding first."""

    BOUNDED = "bounded"
    """By a strict schema with the bounds of strings and lists."""
    STRICT = "strict"
    """By a strict schema without them."""
    OBJECT = "object"
    """As some JSON object; the schema stands in the prompt."""
    TEXT = "text"
    """In words only; the schema stands in the prompt."""

    @property
    def by_schema(self) -> bool:
        """Whether the server is given the schema."""
        return self in (Form.BOUNDED, Form.STRICT)


@dataclass(frozen=True, slots=True)
class Dialect:
    """How requests to one server are put."""

    form: Form = Form.BOUNDED
    limit: str = "max_tokens"
    """What the parameter with the most tokens of an answer is called."""
    temperature: bool = True
    """Whether a temperature may be given."""
    renamed: bool = False
    """Whether the limit has had both names."""

    def after_refusal(self, words: str) -> Dialect | None:
        """What to try after a server refused a request with these words; None if all was tried."""
        other = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}
        if self.temperature and "temperature" in words:
            return replace(self, temperature=False)
        if self.limit in words and not self.renamed:
            return replace(self, limit=other[self.limit], renamed=True)
        forms = list(Form)
        at = forms.index(self.form) + 1
        return replace(self, form=forms[at]) if at < len(forms) else None

    def parameters(self, name: str, schema: dict[str, Any]) -> dict[str, Any]:
        """The part of a request that asks for the form."""
        if self.form is Form.TEXT:
            return {}
        if self.form is Form.OBJECT:
            return {"response_format": {"type": "json_object"}}
        bounded = schema if self.form is Form.BOUNDED else without_bounds(schema)
        told = {"name": name, "schema": bounded, "strict": True}
        return {"response_format": {"type": "json_schema", "json_schema": told}}


def strict_schema(
    answer: type[BaseModel], words: Mapping[str, Sequence[str]] = MappingProxyType({})
) -> dict[str, Any]:
    """The JSON schema of a class in the form that strict modes want.

    Every field is required, none may be added, alternatives are `anyOf`.

    Args:
        answer: The class.
        words: Name of a text field, at any level -> all that it may say. No words, or more than
            strict modes take, leave the field as it is.
    """
    schema = copy.deepcopy(answer.model_json_schema())
    _visit(schema, _make_strict)
    for name, allowed in words.items():
        if 0 < len(allowed) <= MOST_WORDS:
            _visit(schema, partial(_refer, name))
            schema.setdefault("$defs", {})[_ALLOWED + name] = {
                "type": "string",
                "enum": list(allowed),
            }
    return schema


def without_bounds(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema without the keywords that some strict modes refuse."""
    bare = copy.deepcopy(schema)
    _visit(bare, lambda part: [part.pop(name, None) for name in _BOUNDS])
    return bare


def instruction(schema: dict[str, Any]) -> str:
    """How a prompt asks for the form, for servers that cannot be given it."""
    told = json.dumps(schema, separators=(",", ":"), ensure_ascii=False)
    return (
        "\n\nAnswer with one JSON object and nothing else: no explanation, no code fence. It must "
        f"fit this JSON schema:\n{told}"
    )


def read(text: str, answer: type[Answer]) -> Answer:
    """What a model wrote, as an object of the answer's class.

    A code fence, thoughts or words around the object are tolerated.

    Raises:
        BadAnswer: There is no JSON object (`no_json`), or not one of that form (`schema`).
    """
    found = _first_object(text)
    try:
        return answer.model_validate(found)
    except ValidationError as error:
        told = [
            f"{'.'.join(map(str, one['loc'])) or 'answer'}: {one['msg']}"
            for one in error.errors(include_url=False, include_input=False)
        ]
        more = f" (and {len(told) - PROBLEMS_TOLD} more)" if len(told) > PROBLEMS_TOLD else ""
        words = "; ".join(told[:PROBLEMS_TOLD]) + more
        raise BadAnswer("schema", f"The JSON does not fit: {words}"[:FEEDBACK_CHARS]) from None


def _first_object(text: str) -> dict[str, Any]:
    """The object that begins at the first brace; the first one after the model's thoughts, if any.

    Whatever follows the object is ignored.
    """
    if not text.lstrip().startswith("{"):
        text = text.rpartition(_THOUGHT_END)[2]
    start, problem = text.find("{"), "there is none"
    if start >= 0:
        try:
            found = json.JSONDecoder(parse_constant=_no_number).raw_decode(text, start)[0]
            return dict(found)
        except (ValueError, RecursionError) as error:
            problem = str(error)
    raise BadAnswer("no_json", f"The answer must be one JSON object: {problem}"[:FEEDBACK_CHARS])


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _visit(part: Any, change: Any) -> None:
    """Apply `change` to every schema within a schema; names of fields are no schemas."""
    if not isinstance(part, dict):
        return
    change(part)
    for group in ("properties", "$defs"):
        for inner in part.get(group, {}).values():
            _visit(inner, change)
    for inner in (*part.get("anyOf", ()), *part.get("allOf", ()), *part.get("prefixItems", ())):
        _visit(inner, change)
    _visit(part.get("items"), change)


def _refer(name: str, part: dict[str, Any]) -> None:
    if name in part.get("properties", {}):
        part["properties"][name] = {"$ref": f"#/$defs/{_ALLOWED}{name}"}


def _make_strict(part: dict[str, Any]) -> None:
    for name in _UNNEEDED:
        part.pop(name, None)
    if "oneOf" in part:
        part["anyOf"] = part.pop("oneOf")
    if "properties" in part:
        part["required"] = list(part["properties"])
        part["additionalProperties"] = False
