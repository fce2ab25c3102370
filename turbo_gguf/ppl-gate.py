"""``python -m turbo_gguf.ppl-gate``: the same as ``turbo-gguf ppl-gate``."""

import sys

from turbo_gguf.cli import main

if __name__ == "__main__":
    main(["ppl-gate", *sys.argv[1:]], prog_name="turbo-gguf")
