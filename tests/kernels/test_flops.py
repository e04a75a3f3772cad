"""Counted operations against torch's own counter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fewstep.kernels.model.config import ModelConfig, MoeConfig
from fewstep.kernels.model.flops import matmul_rate, products, training_flops
from fewstep.kernels.model.lora import Lora
from fewstep.kernels.model.lora_settings import LoraSettings
from fewstep.kernels.model.training import RowTensors, TrainingModel
from fewstep.kernels.model.transformer import Transformer
from fewstep.kernels.rows import RowBatch, SampleRows

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "intermediate_size": 48, "max_position_embeddings": 64, "block_size": 4, "mask_token_id": 2,
    "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
MOE = MoeConfig(
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    num_shared_experts=1,
    first_k_dense_replace=1,
)


def batch() -> RowBatch:
    samples = [SampleRows.clean(np.arange(3, 15)) for _ in range(2)]
    for sample in samples:
        sample.add_state(
            np.full(8, 2), np.arange(4, 12), np.arange(7, 15), np.ones(8, np.float32)
        )  # two blocks of masks
    return RowBatch.collate(samples)


def test_a_forward_has_the_operations_that_torch_counts() -> None:
    config, rows = ModelConfig(**SIZES), batch()
    model = TrainingModel(Transformer(config))
    tensors = RowTensors.of(rows)
    # The fused attention of a CPU is not in the counter's table, its products one by one are.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tensors.tokens, tensors.positions, tensors.copies, tensors.target_rows, tensors.targets, 4)
    counted = training_flops(config, rows.num_rows, len(tensors.targets), rows.num_pairs) / 3
    assert rows.num_pairs == 2 * 20**2
    assert counted == counter.get_total_flops()


@pytest.mark.parametrize("frozen", [False, True])
def test_a_step_has_the_operations_that_torch_counts_but_those_of_an_adapter(frozen: bool) -> None:
    config, rows = ModelConfig(**SIZES), batch()
    transformer = Transformer(config)
    lora = Lora(config, LoraSettings(rank=1)) if frozen else None
    if lora is not None:
        lora.attach(transformer)
    model, tensors = TrainingModel(transformer, adapter=lora), RowTensors.of(rows)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logprob, _ = model(
            tensors.tokens, tensors.positions, tensors.copies, tensors.target_rows, tensors.targets, 4
        )
        logprob.sum().backward()
    counted = training_flops(config, rows.num_rows, len(tensors.targets), rows.num_pairs, frozen)
    if lora is None:
        assert counted == counter.get_total_flops()
        return
    pairs = sum(
        sum(parameter.shape) - 1 for parameter in lora.parameters()
    )  # inputs of A, outputs of B, at rank 1
    # The inputs of the first layer have no gradient: nothing before them is trained.
    queries, keys = 4 * 8, 2 * 8
    unneeded = 2.0 * rows.num_rows * 32 * (queries + 2 * keys + 3)
    adapter = 3 * 2.0 * rows.num_rows * pairs
    assert counter.get_total_flops() == counted + adapter - unneeded


def test_a_mixture_counts_what_a_row_is_routed_to() -> None:
    dense, mixed = products(ModelConfig(**SIZES), 10, 5), products(ModelConfig(**SIZES, moe=MOE), 10, 5)
    saved = 2 * 2.0 * 10 * 32 * 48 * 3  # two of three layers lose their MLP
    added = 2 * (2.0 * 30 * 32 * 16 * 3 + 2.0 * 10 * 32 * 4)  # two experts and the shared one, and the router
    assert sum(p.flops for p in mixed) - sum(p.flops for p in dense) == pytest.approx(added - saved)


def test_the_rate_is_that_of_a_product() -> None:
    torch.set_num_threads(1)
    assert 1e8 < matmul_rate(torch.float32) < 1e16
