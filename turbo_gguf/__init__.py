"""turbo-gguf: KV caches of 2.25 to 4.5 bits per value for llama.cpp, built, measured and gated.

One wing per step; a module imports from its own wing and from those before it::

    errors, files, tools, assets -> codec -> inputs, cache -> patchset -> make -> measure -> judge -> cli

The values that flow are immutable::

    Upstream -> Tree -> Build -> Case -> Run -> Result -> store -> Verdict, report
"""

__version__ = "0.1.0"
