"""Drift of decoding: what a cache type loses along the text that a model writes with an f16 cache, and where its own text parts from that.

An f16 server answers a few prompts of the text, greedily. Each prompt and its answer are one chunk, of which llama-perplexity scores the
second half: the answer. So the KL divergence along the path of f16 comes with all its quantiles and errors, in narrow batches, which is
near to how a token is decoded. Then a server of each type answers the same prompts, and the tokens before the first one that differs are
counted. A model may fall into a loop, which few bits of a cache can't break: look at the answers, they are kept.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import msgspec

from turbo_gguf import assets
from turbo_gguf.cache import spec
from turbo_gguf.cache.spec import PLAIN, CacheSpec
from turbo_gguf.errors import ToolFailed, UsageError
from turbo_gguf.files import write_whole
from turbo_gguf.inputs.models import TextFile
from turbo_gguf.measure import kld, server, sweep
from turbo_gguf.measure.kld import Job
from turbo_gguf.measure.metrics import Metric
from turbo_gguf.measure.result import Result
from turbo_gguf.measure.store import Store
from turbo_gguf.measure.sweep import Setup, Sweep, SweepRun

ANSWER = 256
"""Tokens of a prompt, and of its answer."""

CTX = 2 * ANSWER
PROMPTS = 4

BATCH = 16
"""Tokens of a llama_decode call along the path."""

CANDIDATES, STEP = 24, 512
"""Prompts that are tried, and tokens between their beginnings: the text of an answer does not always give its own tokens again."""

BYTES_PER_TOKEN = 8
ANSWER_SECONDS = 3600.0
SLOT = 768
"""Tokens of a slot: a multiple of 256, and more than a chunk."""


class Answers(msgspec.Struct, frozen=True):
    """Prompts, and what the model answers with f16."""

    prompts: tuple[tuple[int, ...], ...]
    answers: tuple[tuple[int, ...], ...]
    text: str  # of all of them


def plan(types: Sequence[str]) -> Sweep:
    """What is measured along the path."""
    return Sweep(run=(SweepRun(CTX, PROMPTS, tuple(types)),), batch=BATCH, noise_batch=BATCH // 2)


def measure(types: Sequence[str], job: Job, setup: Setup, store: Store, say: Callable[[str], None]) -> list[Result]:
    """Measure what is not in the store yet: f16, upstream's competitors and ``types`` along one path.

    Args:
        types: as in a sweep.
        job: build with llama-perplexity and llama-server, model and text.
        setup: what the cases share; its text is that of ``job``.
        store: where results are looked up and appended.
        say: where words about progress go.

    Raises:
        UsageError: a type does not fit the model, the text is too short, or no answer gives its tokens again.
        ToolFailed: a tool crashed, or ran something else than was asked for.
    """
    path, text = _path(job, setup, say)
    different = ", ".join(str(len(set(answer))) for answer in path.answers)
    say(f"answers of {PLAIN} have {different} different tokens of {ANSWER}: few are a loop")
    along = msgspec.structs.replace(setup, text_sha256=text.sha256)
    results = kld.measure(sweep.cases(plan(types), along), msgspec.structs.replace(job, text=text), store)
    return [_agreed(result, path, job, store, say) for result in results]


def is_drift(results: Sequence[Result]) -> bool:
    """Whether these were measured along a path."""
    return any(result.stats.agreed is not None for result in results)


def _agreed(result: Result, path: Answers, job: Job, store: Store, say: Callable[[str], None]) -> Result:
    """The result with the tokens that are f16's, counted now or before."""
    types = result.case.types
    if result.stats.agreed is not None or result.case.is_noise_floor:
        return result
    if types == PLAIN:
        counts = [len(answer) for answer in path.answers]
    else:
        with _server(types, job, result.case.backend) as running:
            counts = [same(_answer(running, p), answer) for p, answer in zip(path.prompts, path.answers, strict=True)]
    agreed = mean(counts)
    say(f"    {types}: the first token that differs is {', '.join(str(n + 1) if n < ANSWER else 'none' for n in counts)}")
    made = msgspec.structs.replace(result, stats=msgspec.structs.replace(result.stats, agreed=agreed))
    store.append([made])
    return made


def same(tokens: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens are equal before the first that differs."""
    return next((i for i, (a, b) in enumerate(zip(tokens, others, strict=False)) if a != b), min(len(tokens), len(others)))


def mean(counts: Sequence[int]) -> Metric:
    """Mean over the prompts with its standard error."""
    spread = statistics.stdev(counts) / math.sqrt(len(counts)) if len(counts) > 1 else math.inf
    return Metric(statistics.fmean(counts), spread)


# --- the path -------------------------------------------------------------------------------------------------------------


def _path(job: Job, setup: Setup, say: Callable[[str], None]) -> tuple[Answers, TextFile]:
    """Find or make the answers of f16, and their text."""
    parts = (job.build.id, setup, PROMPTS, ANSWER, SLOT)
    name = hashlib.sha256(msgspec.json.encode(parts)).hexdigest()[:20]
    record = assets.home() / "drift" / f"{name}.json"
    try:
        path = msgspec.json.decode(record.read_bytes(), type=Answers)
    except (FileNotFoundError, msgspec.DecodeError):
        say(f"{PLAIN} answers {PROMPTS} prompts of {ANSWER} tokens with {ANSWER} each")
        with _server(PLAIN, job, setup.backend) as running:
            path = make(running, job.text)
        write_whole(record, msgspec.json.encode(path))
    data = path.text.encode()
    file = record.with_suffix(".txt")
    write_whole(file, data)
    return path, TextFile(path=file, sha256=hashlib.sha256(data).hexdigest(), name=f"greedy answers to {job.text.name}", size=len(data))


def make(running: server.Running, text: TextFile) -> Answers:
    """Ask for answers until enough of them give their tokens again when their text is read.

    llama-perplexity begins each chunk with the token that begins a text, if the model has one: in the first it comes in front of the
    text, in others it takes the place of a token. Prompts are made so.

    Raises:
        UsageError: the text is too short, or too few do.
    """
    part = text.path.read_bytes()[: CANDIDATES * STEP * BYTES_PER_TOKEN].decode("utf-8", errors="ignore")
    tokens = _tokens(running, part)
    begin = _tokens(running, "a", special=True)[: -len(_tokens(running, "a"))]
    found, read = Answers((), (), ""), begin
    for start in range(0, len(tokens) - ANSWER, STEP):
        missing = len(begin) if found.prompts else 0
        own = tokens[start : start + ANSWER - len(begin) + missing]
        prompt = (*begin, *own[missing:])
        answer = _answer(running, prompt)
        whole, wanted = found.text + _text(running, (*own, *answer)), [*read, *own, *answer]
        if _tokens(running, whole, special=True) == wanted:
            found, read = Answers((*found.prompts, prompt), (*found.answers, answer), whole), wanted
        if len(found.prompts) == PROMPTS:
            return found
    raise UsageError(
        f"drift: only {len(found.prompts)} answers give their tokens again when their text is read, and {PROMPTS} are needed",
        "name a longer text with --text FILE, or leave --drift out: the tokenizer of this model may not allow it",
    )


def _answer(running: server.Running, prompt: Sequence[int]) -> tuple[int, ...]:
    """What is most probable, token by token."""
    body = {"prompt": list(prompt), "n_predict": ANSWER, "temperature": 0, "top_k": 1, "ignore_eos": True, "return_tokens": True}
    return tuple(_list(running, running.call("/completion", body | {"cache_prompt": False}, ANSWER_SECONDS), ANSWER))


def _tokens(running: server.Running, text: str, *, special: bool = False) -> list[int]:
    """Tokens of a text as llama-perplexity reads it; ``special``: with what begins a text."""
    return _list(running, running.call("/tokenize", {"content": text, "add_special": special, "parse_special": False}))


def _list(running: server.Running, answer: dict[str, object], count: int | None = None) -> list[int]:
    found = answer.get("tokens")
    if not isinstance(found, list) or not all(isinstance(token, int) for token in found) or count not in (None, len(found)):
        raise ToolFailed(f"llama-server gave no tokens where {count or 'some'} were asked for; log: {running.service.stderr}")
    return found


def _text(running: server.Running, tokens: Sequence[int]) -> str:
    return str(running.call("/detokenize", {"tokens": list(tokens)}).get("content", ""))


@contextmanager
def _server(types: CacheSpec, job: Job, backend: str) -> Iterator[server.Running]:
    """A server with one slot that has these types."""
    shape = server.Shape(types, 1, SLOT, ANSWER, job.threads, backend, 1)
    with server.started(shape, job.build, job.model, assets.home() / "logs" / "drift" / f"{spec.file_name(types)}.log") as running:
        yield running
