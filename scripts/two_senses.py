"""One word in two senses: the cosines between its vectors, layer by layer.

python scripts/two_senses.py RUN
"""

import sys

import numpy as np

from ctx_jax import Encoder
from ctx_jax.encoder import cosine

WORD = "set"
SENSES = {
    "to give a value": [
        "The attribute is set to the value of the expression .",
        "The name is set to the module object in the local namespace .",
        "If the option is not specified , it is set to None .",
    ],
    "a collection": [
        "A set is an unordered collection of distinct objects .",
        "The items of a set must be hashable objects .",
        "The elements are evaluated and added to the set object .",
    ],
}


def main(model: str) -> None:
    sentences = [sentence.split() for group in SENSES.values() for sentence in group]
    encoded = Encoder.from_pretrained(model).encode(sentences)
    sense = np.repeat(np.arange(len(SENSES)), [len(group) for group in SENSES.values()])
    for number, (name, group) in enumerate(SENSES.items()):
        print(f"  {'AB'[number]}  {WORD}, {name}")
        for sentence in group:
            print(f"       {sentence}")
    print(f"\n  mean cosine between two vectors of {WORD!r}\n  layer   same sense   other sense   difference")
    other = sense[:, None] != sense[None, :]
    same = ~other & ~np.eye(len(sense), dtype=bool)
    for layer in range(len(encoded.layers)):
        words = encoded.words(layer=layer)
        vectors = np.array([row[sentence.index(WORD)] for row, sentence in zip(words, sentences, strict=True)])
        cosines = cosine(vectors[:, None], vectors[None, :])
        print(
            f"  {layer:5}   {cosines[same].mean():10.3f}   {cosines[other].mean():11.3f}"
            f"   {cosines[same].mean() - cosines[other].mean():10.3f}"
        )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
