"""turbo-gguf: KV caches of 2.25 to 4.5 bits per value for llama.cpp, built, measured and gated.

The flow is one arrow per module, each value immutable::

    Upstream -> Tree -> Build -> Case -> Run -> Result -> store -> Verdict, report
"""

__version__ = "0.1.0"
