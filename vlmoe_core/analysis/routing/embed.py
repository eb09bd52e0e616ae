"""Values of any kind as JSON that lies inside an HTML page."""

import json
import math
from typing import Any


def plain(value: Any) -> Any:
    """Numbers of six digits; null for what is no number, which JSON can't say."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: plain(found) for key, found in value.items()}
    if isinstance(value, list | tuple):
        return [plain(found) for found in value]
    return value


def embedded(value: Any) -> str:
    """JSON that no text inside can end: it holds no `<`, `>` or `&`."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
