"""Options that several commands share, and how their values become records."""

from __future__ import annotations

import re
from collections.abc import Sequence

from turbo_gguf.inputs import models
from turbo_gguf.inputs.models import ModelFile


def model_of(spec: str | None) -> ModelFile:
    """Return the model that ``--model`` names, the embedded one without it."""
    return models.resolve(spec) if spec else models.embedded()


def split(values: Sequence[str]) -> tuple[str, ...]:
    """Flatten cache types that were repeated, separated by commas, or both.

    Types start with a letter. What follows a comma inside of them does not: ``turbo3 k=0,-1:q8_0,turbo3 decay=15,35,50`` is two.
    """
    return tuple(part.strip() for value in values for part in re.split(r",(?=\s*(?:[A-Za-z,]|$))", value) if part.strip())
