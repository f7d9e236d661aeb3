"""Requests of every kind that OpenAI's API has for text, and what it takes for two answers to be
the same.

Every case has a prompt of its own, so that none finds what another left behind. Sampling is seeded
and hot, so that answers wander; whoever samples the first token anywhere but in the engine that
answers, or with other parameters, gets another answer.
"""

from __future__ import annotations

import json
import random
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tests.support.kv_oracle import DISTINCT_TOKENS_MIN, LOGPROB_TOLERANCE
from tests.support.tiny_models import prompt
from tests.support.vllm_server import MODEL_NAME

CALL_S = 120.0
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SAMPLING = {"model": MODEL_NAME, "max_tokens": 24, "temperature": 1.0, "seed": 11}
SCHEMA = {
    "type": "object",
    "properties": {
        "ok": {"type": "boolean"},
        "colour": {"enum": ["red", "green", "blue"]},
        "size": {"enum": ["small", "large"]},
    },
    "required": ["ok", "colour", "size"],
    "additionalProperties": False,
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "pick",
            "description": "Pick one",
            "parameters": SCHEMA,
            "strict": True,  # without it vLLM constrains the arguments to be JSON, no more
        },
    }
]


def text(seed: int, words: int = 180) -> str:
    """About two tokens a word."""
    source = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    return " ".join("".join(source.choices(letters, k=3)) for _ in range(words))


def chat(seed: int, **fields: object) -> tuple[str, dict[str, Any]]:
    messages = [
        {"role": "system", "content": "You answer."},
        {"role": "user", "content": text(seed)},
    ]
    return CHAT, {**SAMPLING, "messages": messages, **fields}


def completion(seed: int, **fields: object) -> tuple[str, dict[str, Any]]:
    return COMPLETIONS, {**SAMPLING, "prompt": text(seed), **fields}


def _format(kind: str) -> dict[str, Any]:
    return {"type": kind, "json_schema": {"name": "choice", "schema": SCHEMA}}


IDS = {"return_token_ids": True}
STREAM = {"stream": True, "stream_options": {"include_usage": True}}


def cases(first: int = 0) -> dict[str, tuple[str, dict[str, Any]]]:
    """Path and body of one request of each kind; `first` numbers their prompts."""
    return {
        "completion": completion(first + 1, logprobs=5, **IDS),
        "token ids": completion(first + 2, prompt=prompt(first + 2, 300), logprobs=5, **IDS),
        "greedy": completion(first + 3, temperature=0.0, logprobs=5),
        "stop strings": completion(
            first + 4, stop=["e", "o"], min_tokens=4, include_stop_str_in_output=True
        ),
        "n=4": completion(first + 5, n=4, logprobs=2, **IDS),
        "streamed completion": completion(first + 6, logprobs=3, **IDS, **STREAM),
        "streamed n=4": completion(first + 7, n=4, **IDS, **STREAM),
        "chat": chat(first + 8, logprobs=True, top_logprobs=5, **IDS),
        "max_completion_tokens": chat(first + 9, max_tokens=None, max_completion_tokens=20, **IDS),
        "streamed chat": chat(first + 10, logprobs=True, top_logprobs=3, **IDS, **STREAM),
        "JSON schema": chat(first + 11, max_tokens=80, response_format=_format("json_schema")),
        "streamed JSON schema": chat(
            first + 12, max_tokens=80, response_format=_format("json_schema"), **STREAM
        ),
        "structured outputs": completion(first + 13, structured_outputs={"regex": "(ab|cd){8}"}),
        "tools": chat(first + 14, tools=TOOLS, tool_choice="auto", **IDS),
        "named tool": chat(
            first + 15,
            max_tokens=200,
            tools=TOOLS,
            tool_choice={"type": "function", "function": {"name": "pick"}},
        ),
        "salted": completion(first + 16, cache_salt="pepper", **IDS),
    }


SETS = 100  # numbers of prompts that one set of cases is given
# One of each kind, for the runs that must be short.
SHORT = (
    "completion",
    "n=4",
    "streamed completion",
    "chat",
    "streamed chat",
    "JSON schema",
    "structured outputs",
    "tools",
    "named tool",
)


def call(url: str, path: str, body: object, **headers: str) -> Any:
    """The JSON of an answer, or a stream's chunks."""
    answer = raw(url, path, body, **headers)
    streamed = isinstance(body, dict) and body.get("stream")
    return list(chunks(answer)) if streamed else json.loads(answer)


def raw(url: str, path: str, body: object, **headers: str) -> bytes:
    """An answer's bytes; AssertionError with the server's own words unless it is 200."""
    request = urllib.request.Request(
        url + path,
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json", **headers},
    )
    try:
        with urllib.request.urlopen(request, timeout=CALL_S) as response:
            got: bytes = response.read()
            return got
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{path}: {error.code} {error.read()[:2000]!r}") from None


def chunks(stream: bytes) -> Iterator[Any]:
    """The events of a stream of server-sent events; AssertionError unless it ends with [DONE]."""
    *events, last = [e for e in stream.decode().split("\n\n") if e]
    assert last == "data: [DONE]", last
    for event in events:
        assert event.startswith("data: "), event
        yield json.loads(event.removeprefix("data: "))


def usage(answer: Any) -> dict[str, Any]:
    """Of a whole answer, or of a stream's last chunk."""
    found = answer[-1]["usage"] if isinstance(answer, list) else answer["usage"]
    assert isinstance(found, dict)
    return found


def name_of(answer: Any) -> str:
    """The id that the engine gave to the request."""
    return str((answer[0] if isinstance(answer, list) else answer)["id"])


def scheduled(answer: Any, events: Iterable[Mapping[str, Any]]) -> list[int]:
    """How many prompt tokens the engine with this event log computed for an answer, once per
    sequence. (vLLM's own `cached_tokens` tells what the *prefill* engine had cached.)"""
    name = name_of(answer)
    mine = [e for e in events if e["event"] == "scheduled" and name in e["request"]]
    return [e["left"] for e in mine]


def complaints(got: Any, want: Any) -> list[str]:
    """Differences that a client could see, apart from names and times."""
    found = list(_differences(joined(got), joined(want), "answer"))
    if "token_ids" in json.dumps(joined(want)):
        for choice in joined(want)["choices"]:
            distinct = len(set(choice["token_ids"] or range(99)))
            if distinct < DISTINCT_TOKENS_MIN:
                found.append(f"only {distinct} distinct tokens: nothing is proven")
    return found


def joined(answer: Any) -> Any:
    """A stream as one answer: which tokens share a chunk is a matter of time."""
    if not isinstance(answer, list):
        return answer
    choices: dict[int, dict[str, Any]] = {}
    for chunk in answer:
        for choice in chunk["choices"]:
            _add(choices.setdefault(choice["index"], {}), choice)
    whole = {"choices": [choices[i] for i in sorted(choices)], "usage": usage(answer)}
    return {**answer[0], **whole}


def _add(whole: dict[str, Any], part: dict[str, Any]) -> None:
    for name, value in part.items():
        old = whole.get(name)
        if isinstance(old, dict) and isinstance(value, dict):
            _add(old, value)
        elif name != "index" and isinstance(old, str | list) and isinstance(value, str | list):
            whole[name] = old + value if name != "role" else old
        elif value is not None or name not in whole:
            whole[name] = value


# Of the request, of the engine and its configuration, and where the prompt's KV came from.
_NAMES = frozenset(
    {"id", "created", "system_fingerprint", "kv_transfer_params", "prompt_tokens_details"}
)


def _differences(got: Any, want: Any, where: str) -> Iterator[str]:
    if isinstance(got, dict) and isinstance(want, dict):
        for name in sorted(got.keys() | want.keys()):
            if name not in _NAMES:
                yield from _differences(got.get(name), want.get(name), f"{where}.{name}")
    elif isinstance(got, list) and isinstance(want, list) and len(got) == len(want):
        for number, (one, other) in enumerate(zip(got, want, strict=True)):
            yield from _differences(one, other, f"{where}[{number}]")
    elif isinstance(got, float) and isinstance(want, float):
        if abs(got - want) > LOGPROB_TOLERANCE:
            yield f"{where}: {got}, want {want}"
    elif got != want:
        yield f"{where}: {got!r}, want {want!r}"
