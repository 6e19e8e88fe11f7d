"""What a client may ask: the fields of OpenAI's two completion requests, and how a request that cannot be met is told.

Fields that would change the answer and are not done here are refused by name, unless they hold the value that means
nothing; fields that only describe the caller are taken and not used.
"""

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

MOST_FIELDS = 1000
"""Of one JSON object. Every unknown field is an error with its place, and a body holds a hundred thousand of them."""

Item = TypeVar("Item")
FastList = Annotated[list[Item], Field(fail_fast=True)]
"""A list of which the first bad item is told: to collect them all would hold up every other request for seconds."""


class Refusal(Exception):
    """A request that is not answered: the HTTP status, what is wrong, and the field at fault."""

    def __init__(self, status: int, message: str, *, field: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.status, self.field, self.code = message, status, field, code


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class TextPart(_Strict):
    """A part of a message; only text is understood."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | FastList[TextPart]
    name: str = ""

    def as_dict(self) -> dict[str, str]:
        """As chat templates want it: the content one string."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": content} | ({"name": self.name} if self.name else {})


class StreamOptions(_Strict):
    """What a stream of events tells beside the text."""

    include_usage: bool = False
    include_obfuscation: bool = False


class CompletionOptions(_Strict):
    """The fields that both requests have. A field that is null counts as not given."""

    prompt_field: ClassVar[str]
    unused: ClassVar = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "best_of": (1,), "echo": (False,),
        "suffix": ("",), "tools": ([],), "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False),
        "functions": ([],), "function_call": ("none", "auto"), "response_format": ({"type": "text"},),
        "modalities": (["text"],),
    }  # fmt: skip

    model: str = ""
    streams: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, ge=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    n: int = Field(default=1, ge=1)
    stop: Annotated[str, Field(min_length=1)] | Annotated[
        FastList[Annotated[str, Field(min_length=1)]], Field(max_length=16)
    ] = []  # fmt: skip
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @property
    def stops(self) -> list[str]:
        """The texts at which an answer ends."""
        return [self.stop] if isinstance(self.stop, str) else self.stop


class ChatRequest(CompletionOptions):
    """`POST /v1/chat/completions`."""

    prompt_field: ClassVar[str] = "messages"
    neutral: ClassVar = CompletionOptions.neutral | {"logprobs": (False,), "top_logprobs": (0,)}

    messages: FastList[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)


class TextRequest(CompletionOptions):
    """`POST /v1/completions`: a text, token ids, or several of either."""

    prompt_field: ClassVar[str] = "prompt"
    neutral: ClassVar = CompletionOptions.neutral | {"logprobs": ()}

    prompt: str | FastList[int] | FastList[str] | FastList[FastList[int]]
    max_tokens: int | None = Field(default=16, ge=1)


Kind = TypeVar("Kind", bound=CompletionOptions)


def read_request(kind: type[Kind], body: bytes, check: Callable[[dict[str, Any]], None] = lambda fields: None) -> Kind:
    """A request's body as one of the two kinds.

    Args:
        kind: of the request.
        body: JSON.
        check: sees the fields before they are looked at one by one, and may raise a `Refusal`.

    Raises:
        Refusal: 400 with the field that is missing, unknown, of the wrong type or not supported.
    """
    try:
        fields = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise Refusal(400, f"the body is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise Refusal(400, "the body must be a JSON object")
    check(fields)
    fields = _without_nulls(fields)
    for field in kind.unused & fields.keys():
        del fields[field]
    for field in kind.neutral.keys() & fields.keys():
        value = fields.pop(field)
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in kind.neutral[field]):
            raise Refusal(400, f"{field} is not supported by this server", field=field)
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        # Of a union every branch reports; the one that got furthest, or at least had the right type, was meant.
        faults = error.errors(include_url=False, include_input=False)
        fault = max(faults, key=lambda one: (len(one["loc"]), not one["type"].endswith("_type")))
        field = _path(fault["loc"])
        raise Refusal(400, f"{field}: {fault['msg']}", field=field) from None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        if len(value) > MOST_FIELDS:
            raise Refusal(400, f"an object in the body has {len(value)} fields; at most {MOST_FIELDS} are taken")
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _path(location: tuple[int | str, ...]) -> str:
    """`messages[0].content` from pydantic's location, which also names the branches of unions."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif path == "" or (part.isidentifier() and part not in ("str", "int")):
            path += f".{part}" if path else part
    return path
