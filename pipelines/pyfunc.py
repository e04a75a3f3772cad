"""The script MLflow runs to answer for a registered Fewstep model ("models from code").

MLflow copies this file into every registered model and executes it in whatever process calls
`mlflow.pyfunc.load_model`; `set_model` at the end tells it which object answers. Nothing else imports it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
from pydantic import ValidationError

from fewstep.kernels.model.checkpoint import load_model, state_checksum
from fewstep.platform.errors import CheckpointError, RequestError
from fewstep.platform.mlflow_registry import referenced_folder
from fewstep.platform.records import DecodePolicy, WeightVersion


class FewstepModel(mlflow.pyfunc.PythonModel):  # type: ignore[name-defined,misc]
    """Prompts in, completions out, through the same engine that serves.

    The answer to a prompt is a function of the weights, the prompt and the parameters, never of the other prompts
    of the call: two equal prompts in one call get equal answers.
    """

    def load_context(self, context: Any) -> None:
        """Loads the weights. Raises CheckpointError when a file is missing, corrupt or another than was logged."""
        from fewstep.actors.engine.engine import Engine

        # A checkpoint's weights stay in its run's folder; a registered version has its own copy.
        if reference := context.model_config.get("weights"):
            folder = referenced_folder("checkpoint", reference)
        elif "model" in context.artifacts:
            folder = Path(context.artifacts["model"])
        else:  # while it is packed, MLflow runs the example
            raise CheckpointError("model", "code without weights", "a logged model", "load it from the store")
        model, tokenizer = load_model(folder)
        weights = WeightVersion("registry", 0, state_checksum(model.state_dict()))
        self._tokenizer = tokenizer
        self._engine = Engine(model, tokenizer, weight_version=weights)
        self._policy = DecodePolicy.model_validate(context.model_config["policy"])
        self._max_tokens = int(context.model_config["max_tokens"])

    def predict(
        self, context: Any, model_input: list[str], params: dict[str, Any] | None = None
    ) -> list[str]:
        """Completes each prompt.

        Args:
            context: MLflow's; not used.
            model_input: prompts; MLflow turns a data frame with one column (`prompt`) into this list.
            params: max_tokens, temperature, seed, and threshold or tokens_per_step, whichever the model's
                policy uses.
        Returns:
            One completion per prompt, in order, without the prompt.
        Raises:
            RequestError: a prompt or a parameter the engine cannot serve; names it.
        """
        from fewstep.actors.engine.request import Request

        settings = dict(params or {})
        max_tokens = int(settings.pop("max_tokens", self._max_tokens))
        try:
            policy = DecodePolicy.model_validate({**self._policy.model_dump(), **settings})
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            raise RequestError(name, first["input"], first["msg"], "change that parameter") from error
        requests = [
            Request(
                request_id=f"predict-{index}",
                prompt_ids=tuple(self._tokenizer.encode(prompt, add_special_tokens=False).ids),
                policy=policy,
                max_tokens=max_tokens,
            )
            for index, prompt in enumerate(model_input)
        ]
        return [self._engine.text_of(trajectory) for trajectory in self._engine.generate(requests)]


mlflow.models.set_model(FewstepModel())
