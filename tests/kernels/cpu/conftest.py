"""The blocks that encoders are tested with are those of tests/codec."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "codec"))
