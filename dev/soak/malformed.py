"""Requests that no server should get: no JSON, wrong types, numbers out of range, paths that lead elsewhere."""

from __future__ import annotations

import json
from typing import Any

_BROKEN = (
    b"",
    b"{",
    b"null",
    b"[]",
    b'"prompt"',
    b"17",
    b'{"prompt": "a"',
    b'{"prompt": "\xff\xfe"}',
    b"[" * 50_000,
    b'{"prompt": "\\ud800"}',
)

_PROMPTS: tuple[Any, ...] = (
    *(5, None, True, {}, {"a": 1}, [[]], [[], [1]], [None], [{}], ["a", 1, None], [1.5]),
    *([-1], [10**9], [2**31], [2**63], [5, -7, 5]),
)

_OPTIONS: tuple[dict[str, Any], ...] = (
    *({"n_predict": value} for value in ("many", [], -5, -(2**31), 2**40, 2**64, 1e308)),
    *({"temperature": value} for value in ("hot", -1e30, 1e30)),
    *({"id_slot": value} for value in (-7, 2**40, "first")),
    *({"n_probs": value} for value in (-3, 10**9, "all")),
    *({"n_keep": value} for value in (-10, 10**9)),
    *({name: -(10**6)} for name in ("top_k", "repeat_last_n", "dry_penalty_last_n", "min_keep", "n_discard", "seed", "mirostat")),
    *({"top_p": -1}, {"min_p": 7}, {"typical_p": -2}, {"repeat_penalty": 0}, {"dynatemp_range": -5}, {"xtc_probability": -1}),
    *({"cache_prompt": "yes"}, {"stream": "yes"}, {"stop": 5}, {"stop": [5]}, {"samplers": 5}, {"samplers": ["nonsense"]}),
    *({"grammar": "root ::= ("}, {"grammar": 5}, {"json_schema": {"type": "nonsense"}}, {"json_schema": 7}),
    *({"logit_bias": 5}, {"logit_bias": [[10**9, 1]]}, {"logit_bias": [["a", {}]]}, {"lora": 5}, {"lora": [{"id": 99}]}),
    *({"n_cmpl": 0}, {"n_cmpl": -1}, {"n_cmpl": 10**6}, {"response_fields": 5}, {"t_max_predict_ms": -5}, {"n_indent": -9}),
)

_OTHER: tuple[tuple[str, Any], ...] = (
    *(("/v1/chat/completions", body) for body in ({}, {"messages": 5}, {"messages": []}, {"messages": [5]}, {"messages": [{"role": 5}]})),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "tools": 5}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "response_format": 5}),
    *(("/v1/embeddings", body) for body in ({}, {"input": None}, {"input": 5}, {"input": []}, {"input": [-1]}, {"input": [[]]})),
    *(("/tokenize", body) for body in ({}, {"content": 5})),
    *(("/detokenize", body) for body in ({}, {"tokens": 5}, {"tokens": [-1]}, {"tokens": [10**9]})),
    *(("/infill", body) for body in ({}, {"input_prefix": 5, "input_suffix": 5})),
    *(("/apply-template", body) for body in ({}, {"messages": 5})),
    *(("/rerank", body) for body in ({}, {"query": 5, "documents": 5})),
    *((f"/slots/{slot}?action=erase", {}) for slot in (-1, 99, "x", 10**30)),
    *(("/slots/0?action=restore", {"filename": name}) for name in ("missing", "", "../up", "/etc/passwd", ".", 5)),
    *(("/slots/0?action=save", {"filename": name}) for name in ("", "../up", "/dev/null/x", 5, "a" * 5000)),
    *((f"/slots/0{query}", {"filename": "one"}) for query in ("", "?action=", "?action=nonsense")),
    ("/lora-adapters", [{"id": 99, "scale": 1}]),
    ("/lora-adapters", 5),
    ("/nothing/here", {}),
)

MALFORMED: tuple[tuple[str, bytes], ...] = (
    *((path, data) for path in ("/completion", "/v1/chat/completions", "/v1/embeddings", "/slots/0?action=save") for data in _BROKEN),
    *(("/completion", json.dumps({"prompt": prompt, "n_predict": 2}).encode()) for prompt in _PROMPTS),
    *(("/completion", json.dumps({"prompt": "ab", "n_predict": 2} | options).encode()) for options in _OPTIONS),
    *((path, json.dumps(body).encode()) for path, body in _OTHER),
    ("/completion", json.dumps({"prompt": "long " * 4_000, "n_predict": 2}).encode()),
)
"""Path and body of each."""

WITHOUT_SLOTS = tuple((path, data) for path, data in MALFORMED if b'"id_slot"' not in data)
"""Those that name no slot. A number out of range is one, too: upstream wraps it around."""
