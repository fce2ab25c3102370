"""Retrieval with exact answers: codes of five digits hidden in a long text, and how many of them a model finds with each cache type.

A prompt is sentences of ours, without a digit, with a code at a depth: "The pass code of the windmill is 48213." The question follows in
a chat, in the chat template of the model. Answers are greedy. One counts if the first number in it is the code, digit by digit: there is
no credit for nearly. First each code has a prompt of its own, then one prompt has them all: that is harder, and many a model fails it with
f16. Its f16 is what a type is held against. All types get the same prompts.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Sequence

import msgspec

from turbo_gguf import assets
from turbo_gguf.cache import spec
from turbo_gguf.measure import server
from turbo_gguf.measure.kld import Job
from turbo_gguf.measure.metrics import Metric
from turbo_gguf.measure.result import Result
from turbo_gguf.measure.store import Store

DEPTHS = (0.1, 0.35, 0.65, 0.9)
ANSWER_TOKENS = 16
ROOM = 128
"""Tokens of the context beside the text: chat template, question and answer."""

ANSWER_SECONDS = 3600.0
PAD = 256
"""llama.cpp rounds the tokens of a slot up to a multiple of this."""

PLACES = (
    "windmill", "harbour", "library", "bakery", "lighthouse", "orchard", "stable", "chapel", "theatre", "quarry", "tannery", "brewery",
    "museum", "ferry", "school", "castle", "mill pond", "market hall", "town hall", "boathouse",
)  # fmt: skip

WHO = ("The old gardener", "A tired courier", "My aunt", "The clockmaker", "A young teacher", "The fisherman", "Our neighbour", "The baker")
DID = ("walked past", "looked for", "talked about", "painted", "forgot", "measured", "drew a map of", "wrote a letter about")
WHAT = ("the frozen river", "a row of poplars", "the narrow bridge", "an empty barn", "the hills in the north", "a broken fence")
WHEN = (
    "before the rain came",
    "on a quiet morning",
    "while the bells rang",
    "after the harvest",
    "without saying a word",
    "in late autumn",
)


class Prompt(msgspec.Struct, frozen=True):
    """A text with codes in it."""

    ctx: int
    text: str
    keys: tuple[tuple[float, str, str], ...]  # depth, place, code


# --- prompts --------------------------------------------------------------------------------------------------------------


def filler(rng: random.Random, count: int) -> list[str]:
    """Sentences without a digit."""
    return [f"{rng.choice(WHO)} {rng.choice(DID)} {rng.choice(WHAT)} {rng.choice(WHEN)}." for _ in range(count)]


def compose(sentences: Sequence[str], keys: Sequence[tuple[float, str, str]]) -> str:
    """Put each code in front of the sentence at its depth."""
    parts, at = [], 0
    for depth, place, key in keys:
        end = round(depth * len(sentences))
        parts += [*sentences[at:end], f"The pass code of the {place} is {key}."]
        at = end
    return " ".join([*parts, *sentences[at:]])


def prompt(length: Callable[[str], int], ctx: int, depths: Sequence[float], seed: int) -> Prompt:
    """Make the prompt of a seed: as many sentences as fit into ``ctx`` tokens, which ``length`` counts."""
    rng = random.Random(f"{ctx} {seed}")
    places = rng.sample(PLACES, len(depths))
    keys = tuple((depth, place, str(rng.randrange(10_000, 100_000))) for depth, place in zip(sorted(depths), places, strict=True))
    sentences = filler(rng, ctx // 4)
    low, high = 1, len(sentences)
    while low < high:
        middle = (low + high + 1) // 2
        if length(compose(sentences[:middle], keys)) <= ctx - ROOM:
            low = middle
        else:
            high = middle - 1
    return Prompt(ctx, compose(sentences[:low], keys), keys)


def question(text: str, place: str) -> str:
    """Build what the user says. The question is all that differs between the chats of a prompt."""
    return (
        f"Read this text and remember the pass codes in it.\n\n{text}\n\n"
        f"What is the pass code of the {place}? Answer with the number and nothing else."
    )


def is_right(answer: str, key: str) -> bool:
    """Whether the first number of an answer is the code."""
    numbers = re.findall(r"\d+", answer)
    return bool(numbers) and numbers[0] == key


# --- measuring ------------------------------------------------------------------------------------------------------------


def measure(results: Sequence[Result], job: Job, store: Store, say: Callable[[str], None]) -> list[Result]:
    """Ask for the codes at the context of each result, where the store has no answer yet, and return the results with what was found.

    Raises:
        ToolFailed: the server crashed, or ran something else than was asked for.
    """
    return [_found(result, job, store, say) for result in results]


def _found(result: Result, job: Job, store: Store, say: Callable[[str], None]) -> Result:
    types, ctx = result.case.types, result.case.ctx
    if result.stats.found is not None or result.case.is_noise_floor or ctx < 4 * ROOM:
        return result
    shape = server.Shape(types, 1, math.ceil(ctx / PAD) * PAD, min(result.case.batch, ctx), job.threads, result.case.backend, 1)
    log = assets.home() / "logs" / "retrieval" / f"{ctx}-{spec.file_name(types)}.log"
    with server.started(shape, job.build, job.model, log) as running:
        right = [is_right(answer, key) for answer, key in _answers(running, ctx)]
    say(f"    {types} at context {ctx}: {sum(right)} of {len(right)} codes found")
    made = msgspec.structs.replace(result, stats=msgspec.structs.replace(result.stats, found=share(right)))
    store.append([made])
    return made


def _answers(running: server.Running, ctx: int) -> list[tuple[str, str]]:
    """Answers with the codes that were asked for."""

    def length(text: str) -> int:
        found = running.call("/tokenize", {"content": text}).get("tokens")
        return len(found) if isinstance(found, list) else 0

    prompts = [prompt(length, ctx, [depth], seed) for seed, depth in enumerate(DEPTHS)]
    prompts.append(prompt(length, ctx, DEPTHS, len(DEPTHS)))
    return [(ask(running, question(made.text, place)), key) for made in prompts for _, place, key in made.keys]


def ask(running: server.Running, words: str) -> str:
    """Answer of a new chat, greedily."""
    chat = {"messages": [{"role": "user", "content": words}], "temperature": 0, "top_k": 1, "max_tokens": ANSWER_TOKENS}
    answer = running.call("/v1/chat/completions", chat | {"cache_prompt": True}, ANSWER_SECONDS)
    return str(answer["choices"][0]["message"]["content"])


def share(right: Sequence[bool]) -> Metric:
    """Percent of right answers with its standard error, which is not 0 when all or none of a few are right (rule of succession)."""
    likely = (sum(right) + 1) / (len(right) + 2)
    return Metric(100 * sum(right) / len(right), 100 * math.sqrt(likely * (1 - likely) / len(right)))
