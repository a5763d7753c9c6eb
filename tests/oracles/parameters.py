"""The parameter tree of BertWithHeads: with random values, and under the names of google-research/bert."""

import jax
import numpy as np

LAYER = {
    "attention/output/dense": "attention/out",
    "attention/output/LayerNorm": "attention_norm",
    "intermediate/dense": "feed_forward/up",
    "output/dense": "feed_forward/down",
    "output/LayerNorm": "feed_forward_norm",
}
REST = {
    "bert/embeddings/LayerNorm": "encoder/embeddings/norm",
    "bert/embeddings_project": "encoder/embedding_projection",
    "bert/pooler/dense": "encoder/pooler/dense",
    "cls/predictions/transform/dense": "masked_lm/dense",
    "cls/predictions/transform/LayerNorm": "masked_lm/norm",
}
TABLES = {
    "bert/embeddings/word_embeddings": "encoder/embeddings/token/table",
    "bert/embeddings/position_embeddings": "encoder/embeddings/position/table",
    "bert/embeddings/token_type_embeddings": "encoder/embeddings/type/table",
    "cls/predictions/output_bias": "masked_lm/bias",
    "cls/predictions/output_table": "masked_lm/table",
    "cls/seq_relationship/output_bias": "next_sentence/bias",
}
LEAVES = {"kernel": "kernel", "bias": "bias", "gamma": "scale", "beta": "bias"}


def flat(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf, np.float64)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def nested(leaves):
    tree = {}
    for path, leaf in leaves.items():
        *folders, name = path.split("/")
        here = tree
        for folder in folders:
            here = here.setdefault(folder, {})
        here[name] = leaf
    return tree


def random_params(shapes, seed):
    """Every leaf random, biases and LayerNorms too, at sizes that keep activations near one and attention uneven."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        names = [k.key for k in path]
        values = rng.normal(size=leaf.shape)
        if names[-1] == "kernel":
            values /= np.sqrt(leaf.shape["layers" in names])
        else:
            values = values * 0.3 + (names[-1] == "scale")
        return values.astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def original_names(params, num_layers=None):
    """Our tree as google-research/bert's variables, float64; one stored layer may stand for all."""
    ours = flat(params)
    found = {name: ours[path] for name, path in TABLES.items() if path in ours}
    for name, path in REST.items():
        found |= {f"{name}/{leaf}": ours[f"{path}/{own}"] for leaf, own in LEAVES.items() if f"{path}/{own}" in ours}
    if "next_sentence/kernel" in ours:
        found["cls/seq_relationship/output_weights"] = ours["next_sentence/kernel"].T
    stored = len(ours["encoder/layers/attention/qkv/kernel"])
    for number in range(num_layers or stored):
        layer = number if stored > 1 else 0
        at = f"bert/encoder/layer_{number}"
        for name, path in LAYER.items():
            for leaf, own in LEAVES.items():
                if (values := ours.get(f"encoder/layers/{path}/{own}")) is not None:
                    found[f"{at}/{name}/{leaf}"] = values[layer]
        if "encoder/layers/feed_forward/gated_up/kernel" in ours:
            for which, name in enumerate(("dense", "gated")):
                for leaf in ("kernel", "bias"):
                    values = ours[f"encoder/layers/feed_forward/gated_up/{leaf}"]
                    found[f"{at}/intermediate/{name}/{leaf}"] = values[layer].take(which, axis=-2)
        for which, name in enumerate(("query", "key", "value")):
            found[f"{at}/attention/self/{name}/kernel"] = ours["encoder/layers/attention/qkv/kernel"][layer, :, which]
            found[f"{at}/attention/self/{name}/bias"] = ours["encoder/layers/attention/qkv/bias"][layer, which]
    return found
