"""The head, the loss and the norms as an 8 B model asks for them: d = 4,096, LLaDA's vocabulary of 126,464."""

from __future__ import annotations

import torch
from cases import Case, Inputs, Outputs

from fewstep.kernels.head import head_confidence
from fewstep.kernels.loss import linear_logprob
from fewstep.kernels.norm import rms_norm

VOCABULARY, WIDTH = 126_464, 4096
MASK = 0
# Whole logits at once: what eager torch does without this project.
UNCHUNKED = 1 << 62


def cases(smoke: bool) -> list[Case]:
    if smoke:
        return [
            head_case(5, 300, 48),
            head_case(5, 300, 48, draw=True),
            loss_case(7, 300, 48),
            norm_case(6, 48),
            norm_case(6, 48, backward=True),
        ]
    return [
        head_case(32),
        head_case(128),
        head_case(512, compiled=True),
        head_case(32, draw=True),
        head_case(512, draw=True),
        loss_case(1024),
        loss_case(4096),
        norm_case(32, WIDTH),
        norm_case(512, WIDTH, compiled=True),
        norm_case(512 * 32, 128),
        norm_case(8192, WIDTH, backward=True),
    ]


def _normal(device: torch.device, dtype: torch.dtype | None, seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    kind = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    return torch.randn(*shape, generator=generator, device=device, dtype=kind)


def head_case(
    num_rows: int,
    vocabulary: int = VOCABULARY,
    width: int = WIDTH,
    draw: bool = False,
    dtype: torch.dtype | None = None,
    compiled: bool = False,
) -> Case:
    """Masked rows of a canvas twice as long; with `draw` each samples at temperature 1 and gives its entropy."""

    def make(device: torch.device, seed: int) -> Inputs:
        hidden = _normal(device, dtype, seed, 2 * num_rows, width)
        weight = _normal(device, dtype, seed + 1, vocabulary, width) * width**-0.5
        rows = torch.arange(0, 2 * num_rows, 2, device=device)
        temperature = torch.full((num_rows,), float(draw), device=device)
        uniform = torch.linspace(0.01, 0.99, num_rows, dtype=torch.float64, device=device) if draw else None
        return hidden, rows, weight, temperature, torch.ones_like(temperature), uniform

    def run(inputs: Inputs, impl: str, max_elements: int = 1 << 22) -> Outputs:
        hidden, rows, weight, temperature, top_p, uniform = inputs
        stats = head_confidence(
            hidden,
            rows,
            weight,
            mask_token_id=MASK,
            temperature=temperature,
            top_p=top_p,
            uniform=uniform,
            entropy=draw,
            nucleus=False,
            max_elements=max_elements,
            impl=impl,
        )
        # A token in 126,464 has a mass of 1e-5: eager's bfloat16 logits move the CDF by more, and with it every draw.
        # The tests hold the kernel's draws to float64.
        return (stats.entropy,) if draw else stats[:3]

    return Case(
        op="head_confidence",
        name=f"{num_rows} rows, {'draw and entropy' if draw else 'greedy'}",
        settings={"rows": num_rows, "vocabulary": vocabulary, "width": width, "draw": draw},
        make=make,
        run=run,
        eager=lambda inputs: run(inputs, "reference", UNCHUNKED),
        # In bfloat16 the weights, the rows and 20 bytes of statistics a row.
        num_bytes=2 * (vocabulary + num_rows) * width + 20 * num_rows,
        flop=2 * num_rows * vocabulary * width,
        # Eager rounds a logit of 4 to 8 by up to 2**-6, so a confidence is off by as much of itself, and the best of two
        # within 2**-5 of each other, one row in seven, may be the other.
        tolerance=2**-5,
        mismatches=0.4,
        compiled=compiled,
    )


def loss_case(
    num_rows: int, vocabulary: int = VOCABULARY, width: int = WIDTH, dtype: torch.dtype | None = None
) -> Case:
    """Forward and backward of target rows, gradients of both outputs."""

    def make(device: torch.device, seed: int) -> Inputs:
        hidden = _normal(device, dtype, seed, num_rows, width)
        weight = _normal(device, dtype, seed + 1, vocabulary, width) * width**-0.5
        targets = torch.arange(num_rows, device=device) * 7919 % (vocabulary - 1) + 1
        return hidden.requires_grad_(), weight.requires_grad_(), targets

    def run(inputs: Inputs, impl: str) -> Outputs:
        hidden, weight, targets = inputs
        logprob, entropy = linear_logprob(hidden, weight, targets, mask_token_id=MASK, impl=impl)
        gradients = torch.autograd.grad((logprob + 0.1 * entropy).sum(), (hidden, weight))
        return logprob.detach(), entropy.detach(), *gradients

    return Case(
        op="linear_logprob",
        name=f"{num_rows} rows, forward and backward",
        settings={"rows": num_rows, "vocabulary": vocabulary, "width": width},
        make=make,
        run=run,
        # Weight and rows are read forward and backward, and the gradient of each is written.
        num_bytes=2 * 3 * (vocabulary + num_rows) * width,
        # Three products. What does not keep [rows, vocabulary] projects twice, so its own floor is a third higher.
        flop=6 * num_rows * vocabulary * width,
        tolerance=2**-5,
    )


def norm_case(
    num_rows: int,
    width: int,
    backward: bool = False,
    dtype: torch.dtype | None = None,
    compiled: bool = False,
) -> Case:
    """Rows of the residual stream, or of queries with the width of a head."""

    def make(device: torch.device, seed: int) -> Inputs:
        x, grad = (_normal(device, dtype, seed + i, num_rows, width) for i in range(2))
        weight = _normal(device, dtype, seed + 2, width)
        return x.requires_grad_(backward), weight.requires_grad_(backward), grad

    def run(inputs: Inputs, impl: str) -> Outputs:
        x, weight, grad = inputs
        out = rms_norm(x, weight, 1e-6, impl=impl)
        if not backward:
            return (out,)
        return out.detach(), *torch.autograd.grad(out, (x, weight), grad)

    return Case(
        op="rms_norm",
        name=f"{num_rows} rows of {width}{', forward and backward' if backward else ''}",
        settings={"rows": num_rows, "width": width, "backward": backward},
        make=make,
        run=run,
        # Forward x and the result; backward x, the incoming gradient and x's.
        num_bytes=2 * (5 if backward else 2) * num_rows * width,
        flop=(12 if backward else 4) * num_rows * width,
        compiled=compiled,
    )
