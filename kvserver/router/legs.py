"""What is sent to whom. Pure: bodies and headers in, bodies and headers out.

    client ── request ──▶ proxy ── the prompt, one token, do_remote_decode ──▶ prefill engine (P)
                               ◀── kv_transfer_params ────────────────────────
                               ── the request, those kv_transfer_params ─────▶ decode engine (D)
    client ◀── D's bytes ──────

Rule 1: P gets everything that shapes the prompt; fields that we do not know are kept, since they
might. It gets nothing that shapes the answer in a way that one token cannot have.
Rule 2: D gets every field of the client's with its value, and `kv_transfer_params` beside them.
P's token is thrown away: D samples the first one too, so seed, log-probabilities, grammar, `n`
and streaming are D's alone.
Rule 3: a request that would not use P's work goes to D alone, as it came.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from kvserver.router.errors import ProxyError

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TWO_LEGS = frozenset({COMPLETIONS, CHAT})
BYTES_PER_TOKEN = 4

# Fields of a request that P does not get: they shape the answer, not the prompt. Together with
# `PREFILL_FIELDS` this is the whole difference between the two legs.
DROPPED = frozenset(
    {"stream_options", "stream_interval"}
    | {"min_tokens", "min_completion_tokens"}
    | {"logprobs", "top_logprobs", "logprob_token_ids", "return_tokens_as_token_ids"}
    | {"stop", "stop_token_ids", "include_stop_str_in_output"}
    | {"response_format", "structured_outputs", "structural_tag"}
    | {"guided_json", "guided_regex", "guided_choice", "guided_grammar"}
    | {"guided_decoding_backend", "guided_whitespace_pattern"}
    | {"best_of", "use_beam_search", "length_penalty"}
    | {"echo", "return_token_ids", "return_prompt_text"}
)
PREFILL_FIELDS: Mapping[str, Any] = {
    "stream": False,
    "n": 1,
    "max_tokens": 1,
    "kv_transfer_params": {"do_remote_decode": True},
}
# Of a chat only: completions do not know the field.
CHAT_FIELDS: Mapping[str, Any] = {"max_completion_tokens": 1}

# Parts of a message whose prompt is longer than what names them here.
MEDIA = frozenset({"image_url", "video_url", "audio_url", "input_audio"})

# Headers that belong to one connection, or that the sender of a body makes anew.
HOP_BY_HOP = frozenset(
    {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection"}
    | {"te", "trailer", "transfer-encoding", "upgrade", "expect", "host", "content-length"}
)
# What P gets of the client's headers: who asks, how urgently, and what ties the logs together.
PREFILL_HEADERS = frozenset(
    {"authorization", "x-api-key", "x-request-id", "traceparent", "tracestate", "x-vllm-priority"}
)


def parse(body: bytes) -> dict[str, Any]:
    """The request in a body. ProxyError when it is not a JSON object."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ProxyError(400, "invalid_json", f"the body is not JSON: {reason}") from None
    if not isinstance(request, dict):
        kind = type(request).__name__
        raise ProxyError(400, "invalid_json", f"the body must be a JSON object, not a {kind}")
    return request


def prefill_request(request: Mapping[str, Any], path: str) -> dict[str, Any]:
    """P's leg of a request to `path`."""
    kept = {name: value for name, value in request.items() if name not in DROPPED}
    extra = CHAT_FIELDS if path == CHAT or "max_completion_tokens" in request else {}
    return {**kept, **PREFILL_FIELDS, **extra}


def decode_request(request: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """D's leg, after P returned `params`."""
    return {**request, "kv_transfer_params": dict(params)}


def encode(request: Mapping[str, Any]) -> bytes:
    """A body. Numbers and odd strings come back as they were parsed: `parse(encode(x)) == x`."""
    return json.dumps(request, separators=(",", ":")).encode()


def params_of(reply: bytes) -> dict[str, Any]:
    """The kv_transfer_params of P's answer; empty when it has none that are an object."""
    try:
        answer = json.loads(reply)
    except (ValueError, RecursionError):
        return {}
    params = answer.get("kv_transfer_params") if isinstance(answer, dict) else None
    return params if isinstance(params, dict) else {}


def why_alone(request: Mapping[str, Any], path: str, prompt_tokens_min: int) -> str:
    """Why P is of no use to this request; empty when it is."""
    if request.get("kv_transfer_params") is not None:
        return "own_params"  # the client arranges a hand-off itself
    echoed = path == COMPLETIONS and request.get("echo") and request.get("logprobs") is not None
    if request.get("prompt_logprobs") is not None or echoed:
        return "prompt_logprobs"  # D computes the whole prompt in any case
    if prompt_tokens_min and prompt_tokens(request) < prompt_tokens_min:
        return "short"
    return ""


def prompt_tokens(request: Mapping[str, Any]) -> int:
    """About how many tokens the prompt has, cheaply: ids are counted, text is taken for a token per
    BYTES_PER_TOKEN bytes, and what is neither (an image's address) for a prompt that is long."""
    total_bytes = ids = 0
    prompt = ("prompt", "prompt_embeds", "messages", "tools", "documents", "suffix")
    queue = [request[name] for name in prompt if request.get(name) is not None]
    while queue:
        item = queue.pop()
        if isinstance(item, str):
            total_bytes += len(item.encode(errors="surrogatepass"))
        elif isinstance(item, int):
            ids += 1
        elif isinstance(item, list):
            queue += item
        elif isinstance(item, dict):
            if not MEDIA.isdisjoint(item):
                return 1 << 30
            queue += item.values()
    return ids + total_bytes // BYTES_PER_TOKEN


def forwarded(headers: Iterable[tuple[str, str]], connection: str = "") -> list[tuple[str, str]]:
    """The headers that go on to the other side, in either direction. `connection` is the message's
    own Connection header: what it names belongs to this hop too."""
    named = {name.strip().lower() for name in connection.split(",")}
    return [(k, v) for k, v in headers if k.lower() not in HOP_BY_HOP | named]


def for_prefill(headers: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """P's headers, from what goes to D."""
    kept = [(k, v) for k, v in headers if k.lower() in PREFILL_HEADERS]
    return [*kept, ("Content-Type", "application/json"), ("Accept-Encoding", "identity")]
