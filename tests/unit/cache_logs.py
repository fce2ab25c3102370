"""Logs of caches with settings: lines from their format, put into the log of a real run."""

from __future__ import annotations

import re

from measuring import log

from turbo_gguf.measure.log import LogFacts, log_facts

SIZE = r"llama_kv_cache: size = .*"


def cache_line(spec: str, *parts: str, k: float, v: float, cells: int = 512, layers: int = 4, said: str = "", rotated: str = "") -> str:
    """What a cache says when it is made, with K and V of so many bits per value.

    Args:
        spec: notation in our line; "": a build without our patches.
        parts: of our line behind the bits.
        k, v: bits per value that its tensors take.
        cells, layers: of the cache.
        said: bits per value in our line, when they differ.
        rotated: K/V in our line.
    """
    mib = [bits * cells * layers * 256 / 8 / 2**20 for bits in (k, v)]
    names = spec.split(" ", maxsplit=1)[0].partition("/")
    base_k, base_v = names[0], names[2] or names[0]
    sizes = f"({cells:6} cells, {layers:3} layers,  1/1 seqs), K ({base_k}): {mib[0]:7.2f} MiB, V ({base_v}): {mib[1]:7.2f} MiB"
    flags = rotated or "/".join(str(int(base != "f16")) for base in (base_k, base_v))
    line = " | ".join([f"llama_turbo_cache: {spec}", f"rotated {flags}", f"bits {said or f'{k:.3f}/{v:.3f}'}", *parts])
    return f"llama_kv_cache: size = {sum(mib):7.2f} MiB {sizes}\n0.00.039.690 I {line}"


def facts_of(*caches: str, end: str = "") -> LogFacts:
    """Facts of a real log with these caches in place of its own, and an end."""
    err = re.sub(r"^.*(attn_rot_|llama_turbo_cache).*\n", "", log("kld-turbo4-turbo3")[1], flags=re.MULTILINE)
    buffer = "llama_kv_cache:        CPU KV buffer size =     0.50 MiB\n"
    return log_facts(re.sub(SIZE, f"\n{buffer}".join(caches), err) + end)
