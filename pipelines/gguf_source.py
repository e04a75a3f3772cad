"""GGUF files, llama.cpp's one-file models, as folders of Hugging Face's layout.

`transformers` reads the file (with the packages `gguf` and `accelerate`: `pip install 'fewstep[gguf]'`): tensors are
dequantised, queries and keys are put back into Hugging Face's order, the tokenizer and its chat template come from the file.
"""

from __future__ import annotations

import json
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fewstep.platform.artifacts import atomic_folder, file_digest
from fewstep.platform.errors import CheckpointError, ResourceError

SUFFIX = ".gguf"
RECORD = "gguf.json"
NEEDED = ("transformers", "gguf", "accelerate")


def unpacked(file: Path, folder: Path) -> Path:
    """The file's model below `folder`, in bfloat16; a folder that came from the same file is taken as it is.

    Raises:
        ResourceError: a package that reads such files is missing.
        CheckpointError: not a GGUF file, or of an architecture that transformers does not read.
    """
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise ResourceError(
            str(file),
            f"no package {', '.join(missing)}",
            "what reads GGUF files",
            "pip install 'fewstep[gguf]'",
        )
    if not file.is_file():
        raise CheckpointError(str(file), "no such file", "a GGUF file", "check the path")
    record = {"file": file.name, "digest": file_digest(file)}
    done = folder / RECORD
    if done.is_file() and json.loads(done.read_text()) == record:
        return folder
    model, tokenizer = _read(file)
    with atomic_folder(folder) as written:
        model.save_pretrained(written)
        tokenizer.save_pretrained(written)
        (written / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    return folder


def _read(file: Path) -> tuple[Any, Any]:
    import torch

    transformers: Any = import_module("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    where: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(file.parent), dtype=torch.bfloat16, quantization_config=transformers.GgufConfig(dequantize=True), **where
        )  # fmt: skip
        return model, transformers.AutoTokenizer.from_pretrained(str(file.parent), **where)
    except (OSError, ValueError, KeyError, RuntimeError, IndexError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            str(file),
            reason[0][:300],
            "a GGUF file of an architecture that transformers reads",
            "use another file",
        ) from error
