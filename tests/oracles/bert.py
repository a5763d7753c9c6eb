"""BERT in NumPy float64, head by head, written from the papers; nothing of ctx_jax is used.

Weights are a dict under the names of google-research/bert's checkpoints. Devlin et al. 2019; Vaswani et al. 2017,
section 3; Ba et al. 2016, equation 4; Hendrycks and Gimpel 2016.
"""

import numpy as np
from scipy import special

ACTIVATIONS = {
    "gelu": lambda x: x * 0.5 * (1 + special.erf(x / np.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.where(x > 0, x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


def dense(w, name, x):
    return x @ w[f"{name}/kernel"] + w[f"{name}/bias"]


def layer_norm(w, name, x, eps):
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + eps) * w[f"{name}/gamma"] + w[f"{name}/beta"]


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def attend(w, layer, x, num_heads, window=None):
    """One text alone, [N, D]; returns the context and the weights [H, N, N]. A token sees `window` tokens far."""
    q, k, v = (dense(w, f"{layer}/attention/self/{name}", x) for name in ("query", "key", "value"))
    size = x.shape[-1] // num_heads
    place = np.arange(len(x))
    seen = np.abs(place[:, None] - place) <= (len(x) if window is None else window)
    context, weights = np.zeros_like(x), []
    for head in range(num_heads):
        of_head = slice(head * size, (head + 1) * size)
        weights.append(softmax(np.where(seen, q[:, of_head] @ k[:, of_head].T / np.sqrt(size), -np.inf)))
        context[:, of_head] = weights[-1] @ v[:, of_head]
    return context, np.stack(weights)


def encode_text(
    w, ids, types, positions, *, num_layers, num_heads, activation, eps=1e-12, window=None, position_offset=0
):
    """All layers [L + 1, N, D] and attention weights [L, H, N, N] of one text that stands alone."""
    x = (
        w["bert/embeddings/word_embeddings"][ids]
        + w["bert/embeddings/position_embeddings"][positions + position_offset]
    )
    if "bert/embeddings/token_type_embeddings" in w:
        x = x + w["bert/embeddings/token_type_embeddings"][types]
    x = layer_norm(w, "bert/embeddings/LayerNorm", x, eps)
    if "bert/embeddings_project/kernel" in w:
        x = dense(w, "bert/embeddings_project", x)
    layers, attentions = [x], []
    for number in range(num_layers):
        layer = f"bert/encoder/layer_{number}"
        context, weights = attend(w, layer, x, num_heads, window)
        x = layer_norm(
            w,
            f"{layer}/attention/output/LayerNorm",
            x + dense(w, f"{layer}/attention/output/dense", context),
            eps,
        )
        inner = ACTIVATIONS[activation](dense(w, f"{layer}/intermediate/dense", x))
        if f"{layer}/intermediate/gated/kernel" in w:
            inner = inner * dense(w, f"{layer}/intermediate/gated", x)
        x = layer_norm(w, f"{layer}/output/LayerNorm", x + dense(w, f"{layer}/output/dense", inner), eps)
        layers.append(x)
        attentions.append(weights)
    return np.stack(layers), np.stack(attentions)


def encode(w, input_ids, token_type_ids, segment_ids, positions, **config):
    """All layers [L + 1, B, T, D] of rows that hold several texts; NaN at padding, which nobody may read."""
    width = w["bert/encoder/layer_0/output/LayerNorm/gamma"].size
    layers = np.full((config["num_layers"] + 1, *input_ids.shape, width), np.nan)
    for row, segments in enumerate(segment_ids):
        for segment in set(segments.tolist()) - {0}:
            at = np.flatnonzero(segments == segment)
            arrays = (x[row, at] for x in (input_ids, token_type_ids, positions))
            layers[:, row, at] = encode_text(w, *arrays, **config)[0]
    return layers


def pool(w, cls):
    return np.tanh(dense(w, "bert/pooler/dense", cls))


def masked_lm_logits(w, x, *, activation, eps=1e-12):
    x = ACTIVATIONS[activation](dense(w, "cls/predictions/transform/dense", x))
    x = layer_norm(w, "cls/predictions/transform/LayerNorm", x, eps)
    table = w.get("cls/predictions/output_table", w["bert/embeddings/word_embeddings"])
    return x @ table.T + w["cls/predictions/output_bias"]


def next_sentence_logits(w, cls):
    return pool(w, cls) @ w["cls/seq_relationship/output_weights"].T + w["cls/seq_relationship/output_bias"]


def cross_entropy(logits, targets):
    """-log softmax(logits)[target] of each row."""
    return special.logsumexp(logits, axis=-1) - logits[np.arange(len(targets)), targets]
