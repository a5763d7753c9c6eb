"""The weights of a bilm-tf or AllenNLP file as our tree, and the configuration of its options.json."""

import json

import numpy as np

from ctx_jax.models.elmo import ElmoConfig


def read_config(folder, **given):
    options = json.loads((folder / "options.json").read_text())
    cnn, lstm = options["char_cnn"], options["lstm"]
    assert cnn["n_characters"] == 262
    return ElmoConfig(
        filters=tuple(map(tuple, cnn["filters"])),
        character_dim=cnn["embedding"]["dim"],
        max_characters=cnn["max_characters_per_token"],
        num_highway=cnn["n_highway"],
        activation=cnn["activation"],
        lstm_dim=lstm["dim"],
        projection_dim=lstm["projection_dim"],
        num_layers=lstm["n_layers"],
        cell_clip=lstm["cell_clip"],
        projection_clip=lstm["proj_clip"],
        skip_connections=lstm["use_skip_connections"],
        **given,
    )


def read_params(path, config):
    import h5py

    with h5py.File(path) as file:
        read = lambda name: np.asarray(file[name], np.float32)
        words = {
            "table": read("char_embed"),
            "kernels": {str(i): read(f"CNN/W_cnn_{i}")[0] for i in range(len(config.filters))},
            "biases": {str(i): read(f"CNN/b_cnn_{i}") for i in range(len(config.filters))},
            "highway": {
                str(i): {
                    "kernel": np.stack([read(f"CNN_high_{i}/W_{which}") for which in ("transform", "carry")], axis=1),
                    "bias": np.stack([read(f"CNN_high_{i}/b_{which}") for which in ("transform", "carry")]),
                }
                for i in range(config.num_highway)
            },
            "projection": {"kernel": read("CNN_proj/W_proj"), "bias": read("CNN_proj/b_proj")},
        }

        def lstm(direction, layer):
            at = f"RNN_{direction}/RNN/MultiRNNCell/Cell{layer}/LSTMCell"
            both = read(f"{at}/W_0").reshape(2 * config.projection_dim, 4, -1)
            return {
                "input_kernel": both[: config.projection_dim],
                "recurrent_kernel": both[config.projection_dim :],
                "bias": read(f"{at}/B").reshape(4, -1),
                "projection": read(f"{at}/W_P_0"),
            }

        stacks = [{str(i): lstm(direction, i) for i in range(config.num_layers)} for direction in (0, 1)]
    return {"words": words, "forward": stacks[0], "backward": stacks[1]}
