"""``python -m turbo_gguf``: the same as ``turbo-gguf``."""

from turbo_gguf.cli import main

if __name__ == "__main__":
    main(prog_name="turbo-gguf")
