"""What ELMo costs, by formula. Per word, with character vectors of width E, words of C characters, filters (w, n) of
F in all, H highway layers, projection P, and per direction L LSTMs of width D:

    convolutions   Σ 2·(C - w + 1)·w·E·n      highway   H · 2·F·2·F      projection   2·F·P
    LSTMs          2 · L · (2·P·4·D  (input) + 2·P·4·D  (recurrent) + 2·D·P  (projection))

in products, 204.3 MFLOP in the original size, whatever the length: nothing looks at all words at once. The rest:
a filter takes C - w maxima and adds its bias once; a highway value costs two biases, two activations and four
operations to join; a cell value four sums of input and recurrent product, the forget gate's 1, three sigmoids, two
tanh, and four operations; clips two each.

Masks that keep states and outputs at a row's own length select and compute nothing.
"""

from __future__ import annotations

from ctx_jax.flops.parts import Cost, Part, affine, elementwise, merge, table, times
from ctx_jax.flops.transformer import BYTES
from ctx_jax.models.elmo import ElmoConfig

CHUNK = 8192
"""Words of a vocabulary whose logits are made at once where the softmax is whole (objectives/bilm.py)."""


def elmo_cost(config: ElmoConfig, *, rows: int, length: int) -> Cost:
    """A forward pass by part over rows of `length` words, `<S>` and `</S>` counted where they stand."""
    words = rows * length
    return Cost(rows, length, (*_word_parts(config, words), *_recurrent_parts(config, words)))


def bilm_cost(config: ElmoConfig, *, rows: int, length: int, num_samples: int) -> Cost:
    """A training window of both directions, each over a stream of its own: rows of `length` words in either.

    The directions read other words, so the word parts run twice. Of the softmax the products with the sample count, or
    with the whole vocabulary; the latter's logits are made again in the backward pass instead of kept.
    """
    words, width = rows * length, config.projection_dim
    whole = num_samples >= config.vocab_size
    columns = -(-config.vocab_size // min(CHUNK, config.vocab_size)) * min(CHUNK, config.vocab_size)
    logits = 2 * 2 * words * width * (columns if whole else num_samples)
    softmax = Part(
        "softmax",
        matrix_flops=logits,
        parameters=config.vocab_size * (width + 1),
        bytes_moved=4 * 2 * (width + 1) * (config.vocab_size if whole else num_samples + words),
        again_flops=logits if whole else 0,
    )
    return Cost(rows, length, (*_word_parts(config, 2 * words), *_recurrent_parts(config, words), softmax))


def _word_parts(config: ElmoConfig, words: int) -> list[Part]:
    """From characters to word vectors."""
    size = BYTES[config.dtype]
    features = sum(count for _, count in config.filters)
    highway = [
        affine(words, features, 2 * features, size=size),
        # Sigmoid, relu, 1 - gate, two products and a sum.
        elementwise(words * features, 6),
    ]
    return [
        merge("embeddings", [table(words * config.max_characters, config.num_characters - 1, config.character_dim)]),
        merge("character CNN", [*_convolutions(config, words, size), elementwise(words * features)]),
        merge("highway", [times(merge("", highway), config.num_highway)]),
        merge("projection", [affine(words, features, config.projection_dim, size=size)]),
    ]


def _recurrent_parts(config: ElmoConfig, words: int) -> list[Part]:
    """LSTMs of both directions, each over so many words."""
    size, width, cells = BYTES[config.dtype], config.projection_dim, config.lstm_dim
    lstm = merge(
        "LSTMs",
        [
            affine(words, width, 4 * cells, size=size),
            affine(words, width, 4 * cells, size=size, bias=False),
            affine(words, cells, width, size=size, bias=False),
            # The sum of the two products; the forget gate's 1, three sigmoids, two tanh, four to join.
            elementwise(words * cells, 4),
            elementwise(words * cells, 1 + 3 + 2 + 4),
            elementwise(words * cells, 2 if config.cell_clip is not None else 0),
            elementwise(words * width, 2 if config.projection_clip is not None else 0),
        ],
    )
    skips = 2 * (config.num_layers - 1) if config.skip_connections else 0
    return [
        times(lstm, 2 * config.num_layers),
        merge("skip connections", [elementwise(skips * words * width)]),
    ]


def _convolutions(config: ElmoConfig, words: int, size: int) -> list[Part]:
    """A filter of w characters stands in C - w + 1 places of a word."""
    found = []
    for width, count in config.filters:
        places = config.max_characters - width + 1
        product = affine(words * places, width * config.character_dim, count, size=size, bias=False)
        # Written once as its maximum: the places themselves never leave the chip. Read as often as there are filters.
        moved = size * words * (config.max_characters * config.character_dim + count)
        parameters = product.parameters + count
        maxima = words * count * (places - 1)
        found.append(Part("", product.matrix_flops, maxima + words * count, parameters, moved + 4 * parameters))
    return found
