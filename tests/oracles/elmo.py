"""ELMo in NumPy float64: word by word, row by row, step by step; nothing of ctx_jax is used.

Weights are a dict under the names of bilm-tf's files. Peters et al. 2018; Kim et al. 2016, section 2; Srivastava et
al. 2015, equation 3; Sak et al. 2014, section 2; and rules that only TensorFlow's numbers tell. Each rule can be broken
by its name in `mistakes`, so that a test can show that it would be seen.
"""

import numpy as np

WORD_MISTAKES = {
    "ids not shifted": "bytes as they are, where the table begins one later",
    "padding not convolved": "windows that reach behind the word's last mark are left out of the maximum",
    "tanh": "the other activation",
    "no activation": "the largest value as it is",
    "highway gate swapped": "what the files call carry weighs x instead of relu(transform)",
}
STEP_MISTAKES = {
    "gates i f j o": "the order of most other LSTMs",
    "no forget bias": "the stored bias alone",
    "no cell clip": "only the projection is clipped",
    "cell clipped late": "the output reads the cell before it is clipped",
    "no projection clip": "only the cell is clipped",
    "recurrent state not clipped": "the output is clipped, what recurs is not",
}
ROW_MISTAKES = {
    "no ends": "sentences without <S> and </S>",
    "no skip": "layers simply stacked",
    "skip from the first layer": "the word's vector is added to the first layer's output too",
    "skip inside the cell": "what recurs is the sum",
    "backward over padding": "rows begin at the end of the longest, and shorter ones at its padding",
    "backward turned whole": "rows are turned over the longest and run over their own number of steps",
    "backward not turned": "both directions run forwards",
    "layer 0 once": "the backward half of layer 0 is empty",
}
STATE_MISTAKES = {
    "stateless": "each batch begins anew",
    "state after the longest": "shorter rows go on over zeros before they hand their state on",
    "state of other rows": "rows hand their state to their neighbours",
}
MISTAKES = WORD_MISTAKES | STEP_MISTAKES | ROW_MISTAKES | STATE_MISTAKES
PADDING = 261


def read(path):
    """Every array of a weight file, float64, by its name."""
    import h5py

    found = {}

    def visit(name, item):
        if isinstance(item, h5py.Dataset):
            found[name] = np.asarray(item, np.float64)

    with h5py.File(path) as file:
        file.visititems(visit)
    return found


def cell_name(direction, layer):
    return f"RNN_{direction}/RNN/MultiRNNCell/Cell{layer}/LSTMCell"


def numbered(w, name):
    """0, 1, … as long as w has the name with that number."""
    number = 0
    while name.format(number) in w:
        yield number
        number += 1


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def relu(x):
    return np.where(x > 0, x, 0)


def clip(x, bound):
    return x if bound is None else np.minimum(np.maximum(x, -bound), bound)


ACTIVATIONS = {"relu": relu, "tanh": np.tanh}


def convolve(w, characters, activation, mistakes=()):
    """One word, [C] → [F]: filter by filter, place by place."""
    table = np.concatenate([np.zeros((1, w["char_embed"].shape[1])), w["char_embed"]])
    vectors = table[characters - 1 if "ids not shifted" in mistakes else characters]
    end = len(characters)
    if "padding not convolved" in mistakes:
        end = np.flatnonzero(characters != PADDING)[-1] + 1
    found = []
    for number in numbered(w, "CNN/W_cnn_{}"):
        kernel, bias = w[f"CNN/W_cnn_{number}"][0], w[f"CNN/b_cnn_{number}"]
        width, columns = len(kernel), kernel.reshape(-1, len(bias))
        places = range(max(end - width + 1, 1))
        found.append(np.max([vectors[at : at + width].ravel() @ columns + bias for at in places], axis=0))
    found = np.concatenate(found)
    if "no activation" in mistakes:
        return found
    return ACTIVATIONS["tanh" if "tanh" in mistakes else activation](found)


def highway(w, layer, x, mistakes=()):
    """y = g · relu(transform) + (1 - g) · x, where g is what the files call carry."""
    transform = relu(w[f"CNN_high_{layer}/W_transform"].T @ x + w[f"CNN_high_{layer}/b_transform"])
    gate = sigmoid(w[f"CNN_high_{layer}/W_carry"].T @ x + w[f"CNN_high_{layer}/b_carry"])
    if "highway gate swapped" in mistakes:
        gate = 1 - gate
    return gate * transform + (1 - gate) * x


def word_vector(w, characters, activation, mistakes=()):
    """One word, [C] → [P]."""
    x = convolve(w, characters.astype(int), activation, mistakes)
    for layer in numbered(w, "CNN_high_{}/W_carry"):
        x = highway(w, layer, x, mistakes)
    return w["CNN_proj/W_proj"].T @ x + w["CNN_proj/b_proj"]


def step(w, name, x, c, h, *, cell_clip, projection_clip, mistakes=()):
    """One word through one cell: its output, and the cell and hidden state after it."""
    i, j, f, o = np.split(np.concatenate([x, h]) @ w[f"{name}/W_0"] + w[f"{name}/B"], 4)
    if "gates i f j o" in mistakes:
        j, f = f, j
    forget_bias = 0.0 if "no forget bias" in mistakes else 1.0
    whole = sigmoid(f + forget_bias) * c + sigmoid(i) * np.tanh(j)
    c = whole if "no cell clip" in mistakes else clip(whole, cell_clip)
    h = (sigmoid(o) * np.tanh(whole if "cell clipped late" in mistakes else c)) @ w[f"{name}/W_P_0"]
    y = h if "no projection clip" in mistakes else clip(h, projection_clip)
    return y, c, h if "recurrent state not clipped" in mistakes else y


def zero_state(w, rows):
    """[direction][layer] → the rows' cells and hidden states."""
    layers = list(numbered(w, cell_name(0, "{}") + "/B"))
    shapes = [[w[f"{cell_name(direction, layer)}/W_P_0"].shape for layer in layers] for direction in (0, 1)]
    return [[(np.zeros((rows, d)), np.zeros((rows, p))) for d, p in one] for one in shapes]


def word_layer(w, char_ids, lengths, *, activation="relu", mistakes=()):
    """Vectors of the words of rows, [B, T, P], zero behind a row's length."""
    vectors = np.zeros((*char_ids.shape[:2], w["CNN_proj/b_proj"].size))
    known = {}
    for row, length in enumerate(lengths):
        for place in range(length):
            name = char_ids[row, place].tobytes()
            if name not in known:
                known[name] = word_vector(w, char_ids[row, place], activation, mistakes)
            vectors[row, place] = known[name]
    return vectors


def order_of(length, steps, direction, mistakes=()):
    """The places of a row that a direction reads, in its order."""
    first = 1 if "no ends" in mistakes else 0
    order = list(range(first, length - first))
    if direction and "backward not turned" not in mistakes:
        order = order[::-1]
        if "backward over padding" in mistakes:
            order = [*range(length, steps)[::-1], *order]
        if "backward turned whole" in mistakes:
            order = list(range(steps))[::-1][:length]
    return [*order, *range(length, steps)] if "state after the longest" in mistakes else order


def encode_vectors(
    w, vectors, lengths, state=None, *, cell_clip=3.0, projection_clip=3.0, skip=True, masks=None, mistakes=()
):
    """The LSTMs: all layers [L + 1, B, T, 2 P], zero behind a row's length, and the state after each row's last word.

    `masks`, [direction][layer] → [B, T, P], multiply what enters a layer: dropout.
    """
    rows, steps, width = vectors.shape
    if state is None or "stateless" in mistakes:
        state = zero_state(w, rows)
    if "state of other rows" in mistakes:
        state = [[(np.roll(c, 1, axis=0), np.roll(h, 1, axis=0)) for c, h in one] for one in state]
    layers = np.zeros((len(state[0]) + 1, rows, steps, 2 * width))
    after = [[(c.astype(np.float64), h.astype(np.float64)) for c, h in one] for one in state]
    for row, direction in np.ndindex(rows, 2):
        length, side = lengths[row], slice(direction * width, (direction + 1) * width)
        inputs = vectors[row].copy()
        if not (direction and "layer 0 once" in mistakes):
            layers[0, row, :length, side] = inputs[:length]
        for layer, (cells, hiddens) in enumerate(after[direction]):
            adds = skip and "no skip" not in mistakes and (layer > 0 or "skip from the first layer" in mistakes)
            if masks is not None:
                inputs = inputs * masks[direction][layer][row]
            c, h, outputs = cells[row], hiddens[row], np.zeros_like(inputs)
            for place in order_of(length, steps, direction, mistakes):
                x = inputs[place]
                y, c, h = step(
                    w,
                    cell_name(direction, layer),
                    x,
                    c,
                    h,
                    cell_clip=cell_clip,
                    projection_clip=projection_clip,
                    mistakes=mistakes,
                )
                outputs[place] = x + y if adds else y
                if adds and "skip inside the cell" in mistakes:
                    h = outputs[place]
            cells[row], hiddens[row] = c, h
            layers[layer + 1, row, :length, side] = outputs[:length]
            inputs = outputs
    return layers, after


def encode(w, char_ids, lengths, state=None, *, activation="relu", mistakes=(), **options):
    """Characters to all layers, and the state."""
    assert set(mistakes) <= set(MISTAKES)
    vectors = word_layer(w, char_ids, lengths, activation=activation, mistakes=mistakes)
    return encode_vectors(w, vectors, lengths, state, mistakes=mistakes, **options)


def original_names(params):
    """The tree of models/elmo.py as the arrays of a file, float64."""
    wide = lambda x: np.asarray(x, np.float64)
    words = params["words"]
    w = {"char_embed": wide(words["table"])}
    w |= {f"CNN/W_cnn_{i}": wide(kernel)[None] for i, kernel in words["kernels"].items()}
    w |= {f"CNN/b_cnn_{i}": wide(bias) for i, bias in words["biases"].items()}
    for i, layer in words.get("highway", {}).items():
        for which, name in enumerate(("transform", "carry")):
            w[f"CNN_high_{i}/W_{name}"] = wide(layer["kernel"])[:, which]
            w[f"CNN_high_{i}/b_{name}"] = wide(layer["bias"])[which]
    w |= {"CNN_proj/W_proj": wide(words["projection"]["kernel"]), "CNN_proj/b_proj": wide(words["projection"]["bias"])}
    for direction, name in enumerate(("forward", "backward")):
        for layer, cell in params[name].items():
            w |= cell_arrays(cell, cell_name(direction, layer))
    return w


def cell_arrays(cell, name):
    """One LSTM's leaves under the names of a file: TensorFlow has one matrix, the inputs' rows before the state's."""
    both = np.concatenate([np.asarray(cell[which], np.float64) for which in ("input_kernel", "recurrent_kernel")])
    arrays = {"W_0": both.reshape(len(both), -1), "B": np.ravel(cell["bias"]), "W_P_0": cell["projection"]}
    return {f"{name}/{key}": np.asarray(value, np.float64) for key, value in arrays.items()}


def random_params(shapes, seed, scale=1.0):
    """Every leaf random, biases too; at a scale of 1 gates are uneven and values are near one."""
    rng = np.random.default_rng(seed)

    def draw(tree, name=""):
        if isinstance(tree, dict):
            return {key: draw(leaf, key if not key.isdigit() else name) for key, leaf in tree.items()}
        values = rng.normal(size=tree.shape) * scale
        if name in ("kernels", "kernel", "input_kernel", "recurrent_kernel", "projection"):
            inputs = tree.shape[:2] if name == "kernels" else tree.shape[:1]
            return (values / np.sqrt(np.prod(inputs))).astype(np.float32)
        return (values if name == "table" else values * 0.3).astype(np.float32)

    return draw(shapes)
