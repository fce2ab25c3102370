"""What stands for the models of the hub that upstream's tests name."""

from __future__ import annotations

from pathlib import Path

from upstream_server import decisions, encoders, stories, vision
from upstream_server.hub import Repositories

PARTS = 3
PRESET = """[*]
c = 512

[tinygemma3-preset]
hf-repo = ggml-org/tinygemma3-GGUF:Q8_0

[stories260K-test]
hf-repo = ggml-org/test-model-stories260K
"""


def make(folder: Path) -> Repositories:
    """Write all models and images into a folder; returns which file stands for which."""
    folder.mkdir(parents=True, exist_ok=True)
    story = {kind.name: stories.write(kind, folder / f"{kind.name}.gguf") for kind in stories.MODELS}
    adapter = stories.write_adapter(folder / "adapter.gguf")
    model, projector = vision.write_model(folder / "vision.gguf"), vision.write_projector(folder / "projector.gguf")
    cat, truck = (vision.write_image(folder / f"{name}.png", red=red) for name, red in (("blue", False), ("red", True)))
    preset = folder / "preset.ini"
    preset.write_text(PRESET, "ascii")
    split = {
        f"tinyllamas/split/stories15M-q8_0-{part}-of-00003.gguf": folder / f"stories-split-{part}-of-00003.gguf"
        for part in (f"{i:05}" for i in range(1, PARTS + 1))
    }
    return {
        "ggml-org/test-model-stories260K": {"stories260K-F32.gguf": story["stories"]},
        "ggml-org/test-model-stories260K-infill": {"stories260K-infill-F32.gguf": story["stories-infill"]},
        "ggml-org/test-model-router-download": {"stories-F16.gguf": story["stories"]},
        "ggml-org/stories15M_MOE": {"stories15M_MOE-F16.gguf": story["stories-moe"], "moe_shakespeare15M.gguf": adapter},
        "ggml-org/tiny-llamas": {"stories15M-q4_0.gguf": story["stories-draft"]},
        "ggml-org/models": {
            "bert-bge-small/ggml-model-f16.gguf": encoders.write_embedder(folder / "embedder.gguf"),
            "jina-reranker-v1-tiny-en/ggml-model-f16.gguf": encoders.write_reranker(folder / "reranker.gguf"),
            **split,
        },
        "ggml-org/tinygemma3-GGUF": {
            "tinygemma3-Q8_0.gguf": model,
            "mmproj-tinygemma3.gguf": projector,
            "test/91_cat.png": cat,
            "test/11_truck.png": truck,
        },
        "ggml-org/tinylaya-for-testing-gguf": {"tinylaya-F32.gguf": decisions.write_encoder(folder / "decision-encoder.gguf")},
        "ggml-org/tinyopenjev-for-testing-gguf": {
            "tinyopenjev-Q8_0.gguf": decisions.write_decoder(folder / "decision-hybrid.gguf"),
            "mmproj-tinyopenjev.gguf": projector,
        },
        "ggml-org/test-preset-ci": {"preset.ini": preset},
    }
