"""Bodies of OpenAI's endpoints and of the reference API, with bounds and defaults.

Knows: names, types and bounds, as they stand in OpenAI's API reference and in the page of the reference API.
Must not know: how any of it is answered.

What a body holds beyond these keys is passed over, as other servers do; but what would change the answer and is not
done here is refused, and not passed over. A value that asks for nothing (null, an empty list, a bias of 0) is as if it
were not there.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from mpgpt.config import Seed, StrategyName
from mpgpt.core import MAX_LOGPROBS

MOST_CHOICES = 16
MOST_STOPS = 4
MOST_PROMPTS = 16
MOST_MESSAGES = 1000

Stop = Annotated[str, Field(max_length=200)]
Stops = Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None
NewTokens = Annotated[int, Field(ge=1, le=1_000_000)] | None
Temperature = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None
MinP = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None
TopK = Annotated[int, Field(ge=0, lt=2**31)] | None
Repetition = Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] | None
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] | None
Token = Annotated[int, Field(ge=0, lt=2**31)]
Top = Annotated[int, Field(ge=0, lt=MAX_LOGPROBS)]


def stops(given: str | list[str] | None) -> tuple[str, ...]:
    """What ends a text. An empty one ends none."""
    return tuple(stop for stop in ([given] if isinstance(given, str) else given or ()) if stop)


def _encodable(text: str) -> str:
    """Half a surrogate pair, which JSON can write, could not be given back."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair is no text") from None
    return text


class Body(BaseModel):
    """Types are taken strictly: 5 is no string, and "5" no number."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class Part(Body):
    """Of a message's content. Only text can be read."""

    type: Literal["text"]
    text: str


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(min_length=1)]

    @property
    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES)]


class StreamOptions(Body):
    include_usage: bool | None = None


class Sampled(Body):
    """How an answer is sampled; what is absent or null is as the server was started."""

    temperature: Temperature = None
    top_p: Share = None
    top_k: TopK = None
    min_p: MinP = None
    repetition_penalty: Repetition = None
    frequency_penalty: Penalty = None
    presence_penalty: Penalty = None
    seed: Seed | None = None

    @property
    def overrides(self) -> dict[str, float]:
        """The body's own sampling parameters, over the server's."""
        names = set(Sampled.model_fields) - {"seed"}
        return {name: value for name in names if (value := getattr(self, name)) is not None}


class OpenAIRequest(Sampled):
    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stop: Stops = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: NewTokens = None
    # What is refused if it asks for anything.
    logit_bias: dict[str, float] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return stops(self.stop)

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @model_validator(mode="after")
    def _streamed(self) -> Self:
        if self.stream_options and not self.stream:
            raise ValueError("stream_options is for streams: set stream to true")
        if any((self.logit_bias or {}).values()):
            raise ValueError("logit_bias is not supported by this server")
        return self


class ResponseFormat(Body):
    type: str


class ChatRequest(OpenAIRequest):
    """``POST /v1/chat/completions``"""

    messages: Messages
    max_completion_tokens: NewTokens = None
    logprobs: bool | None = None
    top_logprobs: Top | None = None
    # What is refused if it asks for anything.
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _supported(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        if self.tools or self.functions:
            raise ValueError("tools are not supported by this server")
        if self.response_format and self.response_format.type != "text":
            raise ValueError("response_format can only be text")
        return self

    @property
    def most_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def logprob_count(self) -> int:
        return 1 + (self.top_logprobs or 0) if self.logprobs else 0


Ids = Annotated[list[Token], Field(min_length=1)]


class CompletionRequest(OpenAIRequest):
    """``POST /v1/completions``"""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS)]
        | Ids
        | Annotated[list[Ids], Field(min_length=1, max_length=MOST_PROMPTS)]
    )
    logprobs: Annotated[Top | None, BeforeValidator(lambda value: None if value is False else value)] = None
    # What is refused if it asks for anything.
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None

    @model_validator(mode="after")
    def _supported(self) -> Self:
        if self.echo or self.suffix:
            raise ValueError(f"{'echo' if self.echo else 'suffix'} is not supported by this server")
        if self.best_of not in (None, 1, self.choices):
            raise ValueError("best_of is not supported by this server")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [one for one in self.prompt if not isinstance(one, int)]

    @property
    def logprob_count(self) -> int:
        return 0 if self.logprobs is None else 1 + self.logprobs


class QueryBody(Sampled):
    """``POST /chat`` and ``POST /query``: the reference API's body, with ``seed``, ``stop`` and ``raw`` besides."""

    text: str | None = None
    messages: Messages | None = None
    max_tokens: NewTokens = None
    decoding_strategy: StrategyName | None = None
    session_id: Annotated[str, Field(max_length=200), AfterValidator(_encodable)] | None = None
    """Given back as it came; conversations are the client's to keep."""
    stop: Stops = None
    raw: bool | None = None
    """``text`` is continued as it stands, without the chat template."""

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.text is None) == (self.messages is None):
            raise ValueError("give either text or messages")
        if self.raw and self.messages is not None:
            raise ValueError("raw is for text, not for messages")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return stops(self.stop)


# -- answers


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "mpgpt"
    context_length: int


class Models(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Likely(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(Likely):
    top_logprobs: list[Likely]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None


class Said(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


FinishReason = Literal["stop", "length"]


class ChatChoice(BaseModel):
    index: int
    message: Said
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class Completed(BaseModel):
    """What all completions have."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    """Of what decides about tokens besides the request: the version, the model, the dtype."""


class ChatCompletion(Completed):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage


class Logprobs(BaseModel):
    """Of ``/v1/completions``: lists that go together."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class Choice(BaseModel):
    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: FinishReason


class Completion(Completed):
    object: Literal["text_completion"] = "text_completion"
    choices: list[Choice]
    usage: Usage


class Answered(BaseModel):
    """Of ``/query``."""

    success: bool
    generated_text: str
    finish_reason: FinishReason
    total_time_ms: float
    time_to_first_token_ms: float
    tokens_per_second: float
    num_tokens: int
    prompt_tokens: int
    seed: int
    session_id: str | None
