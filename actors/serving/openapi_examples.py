"""A body for each endpoint that works as it stands, but for the model's name."""

from __future__ import annotations

from typing import Any

# Replaced by the name of a model that is served when the document is.
MODEL = "MODEL"

_APPLY = (
    "<|original_code|>\ndef area(w, h):\n    return w * h\n<|/original_code|>\n"
    "<|update_snippet|>\n# ... existing code ...\ndef volume(w, h, d):\n    return area(w, h) * d\n<|/update_snippet|>"
)
_EDIT = (
    "<|recently_viewed_code_snippets|>\n<|recently_viewed_code_snippet|>\ncode_snippet_file_path: shapes.py\n"
    "def area(w, h): ...\n<|/recently_viewed_code_snippet|>\n<|/recently_viewed_code_snippets|>\n\n"
    "<|current_file_content|>\ncurrent_file_path: main.py\nfrom shapes import area\n\n"
    "<|code_to_edit|>\nprint(<|cursor|>)\n<|/code_to_edit|>\n<|/current_file_content|>\n\n"
    "<|edit_diff_history|>\n--- main.py\n+++ main.py\n+from shapes import area\n<|/edit_diff_history|>"
)

EXAMPLES: dict[str, dict[str, dict[str, Any]]] = {
    "/v1/completions": {
        "plain": {"value": {"model": MODEL, "prompt": "def add(a, b):", "max_tokens": 24, "temperature": 0}},
        "infill": {
            "value": {
                "model": MODEL,
                "prompt": "def add(a, b):",
                "suffix": "\n    return c",
                "max_tokens": 12,
            }
        },
        "canvases": {
            "value": {
                "model": MODEL,
                "prompt": "def add(a, b):",
                "max_tokens": 24,
                "stream": True,
                "diffusing": True,
                "fewstep": {"kind": "static", "tokens_per_step": 2},
            }
        },
    },
    "/v1/chat/completions": {
        "plain": {
            "value": {
                "model": MODEL,
                "messages": [{"role": "user", "content": "def add(a, b):"}],
                "max_completion_tokens": 24,
            }
        }
    },
    "/v1/fim/completions": {
        "plain": {
            "value": {
                "model": MODEL,
                "prompt": "def add(a, b):\n",
                "suffix": "\n    return c",
                "max_tokens": 12,
            }
        }
    },
    "/v1/apply/completions": {
        "plain": {
            "value": {"model": MODEL, "messages": [{"role": "user", "content": _APPLY}], "max_tokens": 64}
        }
    },
    "/v1/edit/completions": {
        "plain": {
            "value": {"model": MODEL, "messages": [{"role": "user", "content": _EDIT}], "max_tokens": 16}
        }
    },
    "/tokenize": {"plain": {"value": {"model": MODEL, "prompt": "def add(a, b):"}}},
}
