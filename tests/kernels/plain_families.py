"""The logits of every format, computed in float64 straight from its files' tensors: no module, no map, no cache."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

Tensors = Mapping[str, torch.Tensor]


def plain_logits(
    config: Mapping[str, Any], tensors: Tensors, tokens: list[int], visible: torch.Tensor
) -> torch.Tensor:
    """float64 [R, V] of one sequence; `visible` bool [R, R]."""
    weights = {name: tensor.double() for name, tensor in tensors.items()}
    kinds = {"llada": _llada, "llada2_moe": _llada2}
    return kinds.get(config["model_type"], _decoder)(config, weights, tokens, visible)


def inverse_frequencies(dim: int, theta: float, scaling: Mapping[str, Any] | None) -> list[float]:
    """Radians a position, dimension by dimension; llama3's rule written case by case."""
    plain = [theta ** (-2 * i / dim) for i in range(dim // 2)]
    if not scaling:
        return plain
    assert scaling["rope_type"] == "llama3"
    trained, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    stretched = []
    for frequency in plain:
        wavelength = 2 * math.pi / frequency
        if wavelength < trained / scaling["high_freq_factor"]:
            stretched.append(frequency)
        elif wavelength > trained / scaling["low_freq_factor"]:
            stretched.append(frequency / factor)
        else:
            smooth = (trained / wavelength - scaling["low_freq_factor"]) / (
                scaling["high_freq_factor"] - scaling["low_freq_factor"]
            )
            stretched.append((1 - smooth) * frequency / factor + smooth * frequency)
    return stretched


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def _rotated(x: torch.Tensor, frequencies: list[float]) -> torch.Tensor:
    """x [R, heads, size]: the pair (i, i + half) of row p turned by p · frequency i; what is beyond stays."""
    out, half = x.clone(), len(frequencies)
    for p in range(x.shape[0]):
        for i, frequency in enumerate(frequencies):
            c, s = math.cos(p * frequency), math.sin(p * frequency)
            a, b = x[p, :, i], x[p, :, i + half]
            out[p, :, i], out[p, :, i + half] = a * c - b * s, b * c + a * s
    return out


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """[R, heads, size] each, keys and values with fewer heads; a query head reads the key head of its group."""
    group = q.shape[1] // k.shape[1]
    heads = []
    for head in range(q.shape[1]):
        score = q[:, head] @ k[:, head // group].T / math.sqrt(q.shape[2])
        heads.append(score.masked_fill(~visible, float("-inf")).softmax(-1) @ v[:, head // group])
    return torch.cat(heads, dim=-1)


def _silu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)


def _gated(x: torch.Tensor, w: Tensors, at: str) -> torch.Tensor:
    inner = _silu(x @ w[f"{at}.gate_proj.weight"].T) * (x @ w[f"{at}.up_proj.weight"].T)
    return inner @ w[f"{at}.down_proj.weight"].T


def _decoder(config: Mapping[str, Any], w: Tensors, tokens: list[int], visible: torch.Tensor) -> torch.Tensor:
    heads, eps = config["num_attention_heads"], config["rms_norm_eps"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    frequencies = inverse_frequencies(size, config["rope_theta"], config["rope_scaling"])
    x = w["model.embed_tokens.weight"][tokens]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        normed = _norm(x, w[f"{at}.input_layernorm.weight"], eps)
        states = []
        for name in "qkv":
            state = normed @ w[f"{at}.self_attn.{name}_proj.weight"].T
            state = state + w.get(f"{at}.self_attn.{name}_proj.bias", torch.zeros(()))
            state = state.view(len(tokens), -1, size)
            if f"{at}.self_attn.{name}_norm.weight" in w:
                state = _norm(state, w[f"{at}.self_attn.{name}_norm.weight"], eps)
            states.append(state if name == "v" else _rotated(state, frequencies))
        x = x + _attention(*states, visible) @ w[f"{at}.self_attn.o_proj.weight"].T
        x = x + _gated(_norm(x, w[f"{at}.post_attention_layernorm.weight"], eps), w, f"{at}.mlp")
    head = w["model.embed_tokens.weight"] if config["tie_word_embeddings"] else w["lm_head.weight"]
    return _norm(x, w["model.norm.weight"], eps) @ head.T


def _llada(config: Mapping[str, Any], w: Tensors, tokens: list[int], visible: torch.Tensor) -> torch.Tensor:
    size, eps = config["d_model"] // config["n_heads"], config["rms_norm_eps"]
    frequencies = inverse_frequencies(size, config["rope_theta"], None)
    x = w["model.transformer.wte.weight"][tokens]
    for layer in range(config["n_layers"]):
        at = f"model.transformer.blocks.{layer}"
        normed = _norm(x, w[f"{at}.attn_norm.weight"], eps)
        q, k, v = ((normed @ w[f"{at}.{n}_proj.weight"].T).view(len(tokens), -1, size) for n in "qkv")
        mixed = _attention(_rotated(q, frequencies), _rotated(k, frequencies), v, visible)
        x = x + mixed @ w[f"{at}.attn_out.weight"].T
        normed = _norm(x, w[f"{at}.ff_norm.weight"], eps)
        inner = _silu(normed @ w[f"{at}.ff_proj.weight"].T) * (normed @ w[f"{at}.up_proj.weight"].T)
        x = x + inner @ w[f"{at}.ff_out.weight"].T
    name = "model.transformer.wte.weight" if config["weight_tying"] else "model.transformer.ff_out.weight"
    return _norm(x, w["model.transformer.ln_f.weight"], eps) @ w[name].T


def _llada2(config: Mapping[str, Any], w: Tensors, tokens: list[int], visible: torch.Tensor) -> torch.Tensor:
    size, eps = config["head_dim"], config["rms_norm_eps"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    rotated = int(size * config["partial_rotary_factor"])
    frequencies = inverse_frequencies(rotated, config["rope_theta"], None)
    x = w["model.word_embeddings.weight"][tokens]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        normed = _norm(x, w[f"{at}.input_layernorm.weight"], eps)
        states = (normed @ w[f"{at}.attention.query_key_value.weight"].T).view(len(tokens), -1, size)
        q = _norm(states[:, :heads], w[f"{at}.attention.query_layernorm.weight"], eps)
        k = _norm(states[:, heads : heads + kv_heads], w[f"{at}.attention.key_layernorm.weight"], eps)
        mixed = _attention(
            _rotated(q, frequencies), _rotated(k, frequencies), states[:, heads + kv_heads :], visible
        )
        x = x + mixed @ w[f"{at}.attention.dense.weight"].T
        normed = _norm(x, w[f"{at}.post_attention_layernorm.weight"], eps)
        if layer < config["first_k_dense_replace"]:
            x = x + _gated(normed, w, f"{at}.mlp")
        else:
            x = x + torch.stack([_experts_of_one_token(config, w, f"{at}.mlp", row) for row in normed])
    return _norm(x, w["model.norm.weight"], eps) @ w["lm_head.weight"].T


def _experts_of_one_token(config: Mapping[str, Any], w: Tensors, at: str, x: torch.Tensor) -> torch.Tensor:
    """One token: the groups whose two best experts sum highest, the best experts of those, plus the shared one."""
    scores = torch.sigmoid(w[f"{at}.gate.weight"] @ x).tolist()
    biased = [score + bias for score, bias in zip(scores, w[f"{at}.gate.expert_bias"].tolist(), strict=True)]
    per_group = config["num_experts"] // config["n_group"]
    groups = [list(range(g * per_group, (g + 1) * per_group)) for g in range(config["n_group"])]
    groups.sort(key=lambda experts: -sum(sorted((biased[e] for e in experts), reverse=True)[:2]))
    allowed = [expert for group in groups[: config["topk_group"]] for expert in group]
    chosen = sorted(allowed, key=lambda expert: -biased[expert])[: config["num_experts_per_tok"]]
    total = sum(scores[expert] for expert in chosen)
    out = _gated(x, w, f"{at}.shared_experts")
    for expert in chosen:
        out = out + config["routed_scaling_factor"] * scores[expert] / total * _gated(
            x, w, f"{at}.experts.{expert}"
        )
    return out
