"""What each leg gets: every field of a request is kept for both, or dropped for P by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kvserver.router import legs
from kvserver.router.errors import ProxyError

LONG = "x" * 4096

# What shapes the prompt, or is harmless to P; it must reach both legs.
KEPT: dict[str, Any] = {
    "model": "base",
    "messages": [{"role": "user", "content": LONG}],
    "prompt": [1, 2, 3],
    "prompt_embeds": "AAAA",
    "suffix": "end",
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "parallel_tool_calls": True,
    "documents": [{"title": "t", "text": "d"}],
    "chat_template": "{{ messages }}",
    "chat_template_kwargs": {"enable_thinking": False},
    "reasoning_effort": "low",
    "include_reasoning": True,
    "add_generation_prompt": True,
    "continue_final_message": False,
    "add_special_tokens": False,
    "truncate_prompt_tokens": 100,
    "truncation_side": "left",
    "mm_processor_kwargs": {"num_crops": 4},
    "media_io_kwargs": {"video": {"num_frames": 8}},
    "cache_salt": "salt",
    "lora_request": {"lora_name": "a"},
    "priority": 3,
    "request_id": "r1",
    "session_id": "s1",
    "user": "u",
    "seed": 7,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "logit_bias": {"5": 1.0},
    "vllm_xargs": {"a": 1},
    "some_future_field": {"shapes": "the prompt, for all we know"},
}
DROPPED: dict[str, Any] = {
    "stream_options": {"include_usage": True},
    "stream_interval": 4,
    "min_tokens": 8,
    "min_completion_tokens": 8,
    "logprobs": True,
    "top_logprobs": 5,
    "logprob_token_ids": [1],
    "return_tokens_as_token_ids": True,
    "stop": ["\n"],
    "stop_token_ids": [2],
    "include_stop_str_in_output": True,
    "response_format": {"type": "json_object"},
    "structured_outputs": {"regex": "a+"},
    "structural_tag": "x",
    "guided_json": {},
    "guided_regex": "a+",
    "guided_choice": ["a"],
    "guided_grammar": "g",
    "guided_decoding_backend": "xgrammar",
    "guided_whitespace_pattern": " ",
    "best_of": 4,
    "use_beam_search": True,
    "length_penalty": 1.0,
    "echo": True,
    "return_token_ids": True,
    "return_prompt_text": True,
}
OVERRIDDEN = {"stream": True, "n": 4, "max_tokens": 50, "max_completion_tokens": 60}
REQUEST = {**KEPT, **DROPPED, **OVERRIDDEN}


@pytest.mark.parametrize("name", KEPT)
def test_what_may_shape_the_prompt_is_kept_for_p(name: str) -> None:
    assert legs.prefill_request(REQUEST, legs.CHAT)[name] == KEPT[name]


@pytest.mark.parametrize("name", DROPPED)
def test_what_shapes_only_the_answer_is_dropped_for_p(name: str) -> None:
    assert name not in legs.prefill_request(REQUEST, legs.CHAT)


def test_every_dropped_field_is_tested() -> None:
    assert set(DROPPED) == legs.DROPPED


def test_p_computes_one_token_and_hands_over() -> None:
    leg = legs.prefill_request(REQUEST, legs.CHAT)
    assert leg.keys() - KEPT.keys() == {*OVERRIDDEN, "kv_transfer_params"}
    assert (leg["stream"], leg["n"], leg["max_tokens"]) == (False, 1, 1)
    assert leg["max_completion_tokens"] == 1
    assert leg["kv_transfer_params"] == {"do_remote_decode": True}


@pytest.mark.parametrize(
    ("path", "request_", "there"),
    [
        (legs.CHAT, {}, True),
        (legs.COMPLETIONS, {}, False),
        (legs.COMPLETIONS, {"max_completion_tokens": 5}, True),
    ],
)
def test_completions_get_no_field_that_they_do_not_know(
    path: str, request_: dict[str, Any], there: bool
) -> None:
    assert ("max_completion_tokens" in legs.prefill_request(request_, path)) == there


def test_d_gets_the_request_and_what_p_returned() -> None:
    params = {"do_remote_prefill": True, "do_remote_decode": False, "hash": "ab"}
    leg = legs.decode_request(REQUEST, params)
    assert leg == {**REQUEST, "kv_transfer_params": params}


def test_the_clients_request_is_not_changed() -> None:
    before = json.dumps(REQUEST)
    legs.prefill_request(REQUEST, legs.CHAT)
    legs.decode_request(REQUEST, {"a": 1})
    assert json.dumps(REQUEST) == before


@pytest.mark.parametrize(
    "text",
    [
        '{"seed": 18446744073709551617, "temperature": 0.1, "logit_bias": {"1": 1e400}}',
        '{"prompt": "\\ud800 lone, \\u0000 and \\ud83d\\ude00 paired", "empty": {}, "null": null}',
        '{"prompt": "ünïcödé \\n\\t\\"", "nested": [[[{"a": [1.5, -0.0, true]}]]]}',
    ],
)
def test_values_survive_the_way_to_an_engine(text: str) -> None:
    assert legs.parse(legs.encode(legs.parse(text.encode()))) == json.loads(text)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"nonsense", b'{"a": 1} trailing', b"\xff\xfe\x00", b"[1]", b'"a"', b"null", b"7"],
)
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(ProxyError, match="the body") as refused:
        legs.parse(body)
    assert (refused.value.status, refused.value.code) == (400, "invalid_json")


def test_a_body_nested_too_deeply_is_refused() -> None:
    with pytest.raises(ProxyError, match="nested too deeply"):
        legs.parse(b'{"a":' + b"[" * 200_000)


@pytest.mark.parametrize(
    ("reply", "params"),
    [
        (b'{"kv_transfer_params": {"do_remote_prefill": true}}', {"do_remote_prefill": True}),
        (b'{"kv_transfer_params": null}', {}),
        (b'{"kv_transfer_params": [1]}', {}),
        (b'{"kv_transfer_params": "x"}', {}),
        (b"{}", {}),
        (b"[]", {}),
        (b"<html>", {}),
        (b"", {}),
    ],
)
def test_params_of_p_are_an_object_or_nothing(reply: bytes, params: dict[str, Any]) -> None:
    assert legs.params_of(reply) == params


IMAGE = {"type": "image_url", "image_url": {"url": "http://h/i"}}
PART = {"type": "text", "text": "hello"}


@pytest.mark.parametrize(
    ("path", "request_", "reason"),
    [
        (legs.COMPLETIONS, {"prompt": "x" * 512}, ""),
        (legs.COMPLETIONS, {"prompt": "x" * 511}, "short"),
        (legs.COMPLETIONS, {"prompt": "日" * 171}, ""),  # bytes count, not characters
        (legs.COMPLETIONS, {"prompt": [5] * 128}, ""),
        (legs.COMPLETIONS, {"prompt": [5] * 127}, "short"),
        (legs.COMPLETIONS, {"prompt": [[5] * 64, [6] * 64]}, ""),
        (legs.COMPLETIONS, {"prompt": ["x" * 300, "y" * 300]}, ""),
        (legs.COMPLETIONS, {"prompt": None}, "short"),
        (legs.COMPLETIONS, {}, "short"),
        (legs.CHAT, {"messages": [{"role": "user", "content": LONG}]}, ""),
        (legs.CHAT, {"messages": [{"role": "user", "content": "hi"}]}, "short"),
        (legs.CHAT, {"messages": [{"role": "user", "content": [PART]}]}, "short"),
        (legs.CHAT, {"messages": [{"role": "user", "content": [PART, IMAGE]}]}, ""),
        (legs.CHAT, {"messages": [{"role": "user"}], "tools": [{"description": LONG}]}, ""),
        (legs.CHAT, {"messages": 7}, "short"),
        (legs.CHAT, {"messages": [{"content": LONG}], "kv_transfer_params": {}}, "own_params"),
        (legs.CHAT, {"messages": [{"content": LONG}], "kv_transfer_params": None}, ""),
        (legs.COMPLETIONS, {"prompt": LONG, "prompt_logprobs": 0}, "prompt_logprobs"),
        (legs.COMPLETIONS, {"prompt": LONG, "echo": True, "logprobs": 0}, "prompt_logprobs"),
        (legs.COMPLETIONS, {"prompt": LONG, "echo": True}, ""),
        (legs.COMPLETIONS, {"prompt": LONG, "logprobs": 1}, ""),
        (legs.CHAT, {"messages": [{"content": LONG}], "echo": True, "logprobs": True}, ""),
    ],
)
def test_who_goes_alone(path: str, request_: dict[str, Any], reason: str) -> None:
    assert legs.why_alone(request_, path, 128) == reason


def test_no_threshold_prefills_every_prompt() -> None:
    assert legs.why_alone({"prompt": "x"}, legs.COMPLETIONS, 0) == ""


HEADERS = [
    ("Host", "proxy"),
    ("Authorization", "Bearer key"),
    ("Content-Length", "10"),
    ("Content-Type", "application/json"),
    ("Connection", "keep-alive, X-Mine"),
    ("Keep-Alive", "timeout=5"),
    ("Transfer-Encoding", "chunked"),
    ("Expect", "100-continue"),
    ("X-Mine", "1"),
    ("X-Request-Id", "r1"),
    ("traceparent", "00-a"),
    ("X-Data-Parallel-Rank", "1"),
    ("Accept-Encoding", "gzip"),
    ("Cookie", "a=b"),
]


def test_headers_of_one_hop_stay_on_it() -> None:
    names = [name for name, _ in legs.forwarded(HEADERS, "keep-alive, X-Mine")]
    assert names == [
        "Authorization",
        "Content-Type",
        "X-Request-Id",
        "traceparent",
        "X-Data-Parallel-Rank",
        "Accept-Encoding",
        "Cookie",
    ]


def test_p_gets_who_asks_and_nothing_about_the_answer() -> None:
    assert legs.for_prefill(legs.forwarded(HEADERS)) == [
        ("Authorization", "Bearer key"),
        ("X-Request-Id", "r1"),
        ("traceparent", "00-a"),
        ("Content-Type", "application/json"),
        ("Accept-Encoding", "identity"),
    ]
