"""Who is measured, a file each, and what each of them needs.

The files run in processes of their own, perhaps of another Python that has no ctx_jax: `worker.py` is started by its
path, and the files import nothing of ctx_jax but `ours.py`, which is us. Each defines

    load(folder, options) -> model      options: dtype, threads, device, batch, max_length, texts, static
    model.about                         {"device": "cpu" or "gpu", "versions": {name: version}}, more if it likes
    model.forward(ids, mask)            int64 [B, T] twice -> float32 [B, T, D], the last layer, on the host
    model.mean(ids, mask)               likewise -> float32 [B, D], the mean where the mask is 1, made on the device
    model.embed(texts)                  -> float32 [N, D], the mean of each text's tokens, on the host

or of the last three those it can. Who cannot make the mean on the device makes it on the host.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import NamedTuple

_HERE = pathlib.Path(__file__).resolve().parent
WORKER = _HERE / "worker.py"


class Peer(NamedTuple):
    """Somebody who can be measured.

    Attributes:
      name: on the command line and in tables.
      file: what runs.
      needs: modules that must be importable.
      unable: why it is left out of some work, by `ids`, `texts` or the name of a type.
    """

    name: str
    file: pathlib.Path
    needs: tuple[str, ...] = ()
    unable: Mapping[str, str] = {}


OURS = Peer("ctx_jax", _HERE / "ours.py")

PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("transformers", _HERE / "hugging_face.py", ("torch", "transformers")),
        Peer("torch-compile", _HERE / "torch_compiled.py", ("torch", "transformers")),
        Peer(
            "onnxruntime",
            _HERE / "onnx_runtime.py",
            ("onnxruntime", "torch", "transformers", "onnx", "onnxscript"),
            {"bfloat16": "has no bfloat16 on processors"},
        ),
        Peer("openvino", _HERE / "open_vino.py", ("openvino", "torch", "transformers")),
        Peer(
            "sentence-transformers",
            _HERE / "sentences.py",
            ("sentence_transformers", "torch", "transformers"),
            {"ids": "takes texts only, see --texts"},
        ),
    )
}
"""By name; each has its recommended loop over texts in its file."""
