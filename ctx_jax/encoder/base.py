"""What every trained model in use can do, and how it is loaded."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Int
from tqdm import tqdm

from ctx_jax.arrays import Representations
from ctx_jax.encoder.batches import BATCH_TOKENS
from ctx_jax.encoder.repair import Affine, chosen_fits, find_repairs, stacked
from ctx_jax.errors import InputError
from ctx_jax.interop.load import load
from ctx_jax.interop.pretrained import KINDS, Pooling, Pretrained, Repair, Repairs
from ctx_jax.interop.programs.forward import WHOLE, Layers, ProgramOptions, chosen_layers
from ctx_jax.interop.run_folder import Weights
from ctx_jax.models.elmo import ElmoConfig
from ctx_jax.nn.parameters import Params, flat_paths, nested
from ctx_jax.text.tokenizer import Tokenizer

# What only writing a model needs takes a tenth of a second to import: whoever encodes does without.
if TYPE_CHECKING:
    from ctx_jax.interop.certificate import Check

Text = str | Sequence[str]
Pool = Literal["mean", "max", "cls"]
OnTooLong = Literal["error", "truncate", "split"]
Dtype = Literal["float32", "bfloat16"]
MATRICES = re.compile(r"(kernel|kernels/\d+|projection)$")
"""What products alone read, cast to the computation's type before them. Tables are summed in float32."""
WINDOW = 4096
"""Texts that are sorted by length together, where vectors are pooled."""


class Ask(NamedTuple):
    """What a caller wants.

    Attributes:
      chosen: numbers of the layers, from 0.
      layers: how they were asked for.
      pool: see `Encoder.encode`, like the others.
      batch_tokens: see there.
      on_too_long: see there.
      stride: see there.
      repair: of the chosen layers, on the devices; None is none.
      width: of the vectors that come out.
    """

    chosen: tuple[int, ...]
    layers: Layers
    pool: Pool | None
    batch_tokens: int
    on_too_long: OnTooLong
    stride: int
    repair: Affine | None
    width: int

    @property
    def single(self) -> bool:
        """One layer, and no axis for it."""
        return self.layers == "last"


@contextlib.contextmanager
def progress(total: int | None, show: bool) -> Iterator[Callable[[int], object]]:
    """A function that counts texts, and shows them if asked."""
    with tqdm(total=total, disable=not show, unit="text", unit_scale=True) as bar:
        yield bar.update


class Candidate(NamedTuple):
    """What may stand at a [MASK].

    Attributes:
      token: as the vocabulary spells it.
      probability: of the token among all tokens.
    """

    token: str
    probability: float


class Encoder(abc.ABC):
    """A model with its weights and its tokenizer.

    Attributes:
      config: sizes.
      params: nested dict of arrays.
      tokenizer: None when the folder holds none.
      pooling: how a sentence encoder makes a text's vector; None of others.
      about: what the folder says of how the model was made.
      repairs: of layers' spaces, by layer from 0 and by kind; see `fit_repairs`.
      mesh: the devices among which the rows of a batch are divided.
      batch_tokens: tokens on a device at once where the caller does not say.
    """

    about: Mapping[str, Any] = MappingProxyType({})
    repairs: Repairs = MappingProxyType({})

    def __init__(
        self,
        config: Any,
        params: Params,
        tokenizer: Tokenizer | None,
        pooling: Pooling | None,
        devices: Sequence[jax.Device],
        batch_tokens: int = BATCH_TOKENS,
    ):
        self.config = config
        self.params = params
        self.tokenizer = tokenizer
        self.pooling = pooling
        self.mesh = Mesh(np.array(devices), ("data",))
        self.batch_tokens = batch_tokens
        self._placed: tuple[Params, Params] | None = None
        self._placed_repairs: tuple[tuple[Repair, ...], Affine] | None = None

    @staticmethod
    def from_pretrained(
        path: str | os.PathLike[str], *, dtype: Dtype | None = None, weights: Weights = "final"
    ) -> Encoder:
        """Loads a folder, whatever wrote it: a run directory (its final weights, or those of its newest good
        checkpoint), an import, or another library's, see `interop.load.SUPPORTED`; and the repairs.npz in it.

        Args:
          path: the folder.
          dtype: type of the computation, "float32" or "bfloat16"; None is what the folder says, else float32.
          weights: of a run directory, `best` are those of the checkpoint with the lowest held-out loss.

        Raises:
          InputError: nothing in the folder is known, or what is there is broken or does not fit.
        """
        if dtype not in (None, "float32", "bfloat16"):
            raise InputError(f"dtype: found {dtype!r}, expected 'float32' or 'bfloat16', or None")
        found = load(path, weights=weights)
        config = found.config if dtype is None else dataclasses.replace(found.config, dtype=dtype)
        return _encoder(dataclasses.replace(found, config=config))

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        format: str | None = None,
        options: ProgramOptions = WHOLE,
        *,
        overwrite: bool = False,
    ) -> list[Check]:
        """Writes the model as a folder of another library's, with a card and a certificate; whole or not at all.

        Repairs lie beside the weights as repairs.npz, which other libraries do not read and no program applies.

        Args:
          folder: where; it must not exist, or be empty, unless `overwrite`.
          format: a name of `interop.save.FORMATS` or PROGRAMS; None is `hugging-face`, for an ELMo `bilm`.
          options: of a program.
          overwrite: replace what is there.

        Returns:
          What those who could read the folder got back; it stands in its certificate.json too.

        Raises:
          InputError: the format cannot hold the model, or the folder cannot be written.
        """
        from ctx_jax.encoder.card import model_card
        from ctx_jax.interop.save import save

        format = format or ("bilm" if isinstance(self.config, ElmoConfig) else "hugging-face")
        pretrained = self._pretrained()
        return save(pretrained, folder, format, options, overwrite=overwrite, card=model_card(pretrained))

    def truncate(self, layers: int, *, name: str | None = None) -> Encoder:
        """The model of the first layers, without heads and pooler, which read the last; see `truncation.truncate`.

        Args:
          layers: how many, from 1 to all.
          name: of this model, which the other's card says it comes from.

        Raises:
          InputError: the model has not as many.
        """
        from ctx_jax.encoder.truncation import truncate

        return _encoder(truncate(self._pretrained(), layers, name))

    def fit_repairs(
        self,
        texts: Sequence[Text],
        kinds: str | Sequence[str] = KINDS,
        *,
        layers: Layers = "all",
        pool: Pool | None = "mean",
        k: int | None = None,
        **options: Any,
    ) -> None:
        """Fits repairs of layers' spaces on the vectors of texts; `repairs` has them then, beside those it had.

        Args:
          texts: some thousands that are like those to come; a repair knows as many directions as there are texts.
          kinds: one or several of `encoder.repair.FITS`.
          layers: as in `encode`.
          pool: which vectors are to be repaired: pooled ones, or with None those of tokens.
          k: dimensions that whitening keeps; None is as many as a layer's vectors spread in.
          options: others of `encode`.

        Raises:
          InputError: there is no such kind, a layer's vectors do not spread enough for one, or as `encode`; then
            `repairs` is what it was.
        """
        fits = chosen_fits(kinds, k)
        numbers = chosen_layers(layers, self.config.num_layers + 1) or [self.config.num_layers]
        encoded = self.encode(texts, layers=numbers, pool=pool, **options)
        vectors = encoded.layers[:, encoded.mask] if pool is None else encoded
        fitted = {layer: dict(of_layer) for layer, of_layer in self.repairs.items()}
        for layer, of_layer in zip(numbers, vectors, strict=True):
            for kind, fit in fits.items():
                try:
                    fitted.setdefault(layer, {})[kind] = fit(of_layer)
                except InputError as error:
                    raise InputError(f"layer {layer}: {kind}: {error}") from error
        self.repairs = fitted

    def encode(
        self,
        texts: Text | Sequence[Text],
        *,
        layers: Layers | None = None,
        pool: Pool | None = None,
        repair: str | Repair | None = None,
        batch_tokens: int | None = None,
        on_too_long: OnTooLong = "error",
        stride: int = 0,
        show_progress: bool = False,
    ) -> Representations | Float[np.ndarray, "*K B D"]:
        """Vectors of texts. A text has the same vectors whatever stands beside it, to 1e-5 in float32.

        Args:
          texts: strings, or lists of words; a single string is a list of one.
          layers: "all", "last", or numbers from 0, what enters the first layer; negative ones count from the last. None
            is "all", with `pool` "last". Only these leave the device.
          pool: one vector a text: the mean or the maximum over its tokens, special ones included, or the first token's;
            taken on the device. None keeps every token.
          repair: a kind of `repairs` that each of the layers has, or for one layer a Repair; applied on the device to
            pooled vectors, or to those of all tokens. `whiten` may make D smaller, as much in all of the layers.
          batch_tokens: tokens on a device at once, padding counted; None is 32,768, for a BERT on a processor 1,024.
          on_too_long: a text longer than the model takes is an error, or is truncated, or split into several rows that
            overlap by `stride` tokens; these cannot be pooled.
          stride: see above.
          show_progress: a bar on standard error, with the rate and the time left.

        Returns:
          float32 arrays on the host: `Representations`, as long as the longest text, zero at padding; with `pool`
          [B, D], or [K, B, D] where `layers` is "all" or a list.

        Raises:
          InputError: a text is no text or too long, there is none, no such layer or repair, or no tokenizer.
        """
        texts = [texts] if isinstance(texts, str) else list(_many(texts))
        if not texts:
            raise InputError("texts: found none, expected at least one")
        ask = self._ask(layers, pool, batch_tokens, on_too_long, stride, repair)
        if pool is None:
            with progress(len(texts), show_progress) as done:
                return self._encode(self._prepare(texts, ask), ask, done)
        parts = [
            self._pooled(window, ask, done) for window, done in self._windows(texts, ask, len(texts), show_progress)
        ]
        found = np.concatenate(parts, axis=1)
        return found[0] if ask.single else found

    def encode_stream(
        self,
        texts: Iterable[Text],
        *,
        layers: Layers = "last",
        pool: Pool = "mean",
        repair: str | Repair | None = None,
        batch_tokens: int | None = None,
        on_too_long: Literal["error", "truncate"] = "error",
        show_progress: bool = False,
    ) -> Iterator[Float[np.ndarray, "*K D"]]:
        """A vector for each text of more than fit into memory, in their order; arguments as for `encode`.

        Texts are taken a few thousand at a time, and the next ones are split into pieces while the device computes.
        """
        ask = self._ask(layers, pool, batch_tokens, on_too_long, 0, repair)
        for window, done in self._windows(_many(texts), ask, None, show_progress):
            found = self._pooled(window, ask, done)
            yield from found[0] if ask.single else np.moveaxis(found, 1, 0)

    def embed(self, texts: Text | Sequence[Text], **options: Any) -> Float[np.ndarray, "B D"]:
        """A vector for each text, pooled as the model's folder says; else the mean of the last layer's.

        Options are those of `encode`.

        Raises:
          InputError: as `encode`.
        """
        pooling = self.pooling or Pooling()
        found = self.encode(texts, pool=pooling.pool, **options)
        if not pooling.normalize:
            return found
        return found / np.maximum(np.linalg.norm(found, axis=-1, keepdims=True), 1e-12)

    def _ask(
        self,
        layers: Layers | None,
        pool: Pool | None,
        batch_tokens: int | None = None,
        on_too_long: OnTooLong = "error",
        stride: int = 0,
        repair: str | Repair | None = None,
    ) -> Ask:
        if pool not in (None, "mean", "max", "cls"):
            raise InputError(f"pool: found {pool!r}, expected 'mean', 'cls' or 'max', or None")
        if pool and on_too_long == "split":
            raise InputError("pool: a text that is split has no one vector; expected on_too_long 'error' or 'truncate'")
        batch_tokens = self.batch_tokens if batch_tokens is None else batch_tokens
        if not isinstance(batch_tokens, int) or batch_tokens < 1:
            raise InputError(f"batch_tokens: found {batch_tokens!r}, expected at least 1")
        layers = layers if layers is not None else "last" if pool else "all"
        chosen = tuple(chosen_layers(layers, self.config.num_layers + 1) or (self.config.num_layers,))
        affine = None if repair is None else self._affine(find_repairs(repair, self.repairs, chosen, self.width))
        width = self.width if affine is None or affine.matrix is None else affine.matrix.shape[-1]
        return Ask(chosen, layers, pool, batch_tokens, on_too_long, stride, affine, width)

    def _windows(
        self, texts: Iterable[Text], ask: Ask, total: int | None, show_progress: bool
    ) -> Iterator[tuple[Any, Callable[[int], object]]]:
        """Prepared texts, WINDOW at a time; the next ones are prepared while the caller works."""
        texts, start = iter(texts), 0

        def prepare(group: list[Text], start: int) -> Any:
            try:
                return self._prepare(group, ask)
            except InputError as error:
                raise InputError(f"{error}; counted from texts[{start}]" if start else str(error)) from error

        with progress(total, show_progress) as done, ThreadPoolExecutor(1) as ahead:
            future = None
            while group := list(itertools.islice(texts, WINDOW)):
                following = ahead.submit(prepare, group, start)
                start += len(group)
                if future is not None:
                    yield future.result(), done
                future = following
            if future is not None:
                yield future.result(), done

    @property
    @abc.abstractmethod
    def width(self) -> int:
        """D of the vectors."""

    @abc.abstractmethod
    def lengths(self, texts: Sequence[Text]) -> Int[np.ndarray, "N"]:
        """Of each text, in what the model reads it in, special ones counted, whether it takes so many or not."""

    @abc.abstractmethod
    def _prepare(self, texts: Sequence[Text], ask: Ask) -> Any:
        """What the host does: text to rows."""

    @abc.abstractmethod
    def _encode(self, prepared: Any, ask: Ask, done: Callable[[int], object]) -> Representations:
        """Vectors of all tokens; tells `done` how many texts were done."""

    @abc.abstractmethod
    def _pooled(self, prepared: Any, ask: Ask, done: Callable[[int], object]) -> Float[np.ndarray, "K B D"]:
        """A vector of each text."""

    def fill_mask(self, text: str, *, top: int = 5) -> list[list[Candidate]]:
        """The likeliest tokens for each mask of a text.

        Raises:
          InputError: this kind of model fills none.
        """
        del text, top
        raise InputError(f"fill_mask: {type(self.config).__name__} is no masked language model")

    def _weights(self) -> Params:
        """The parameters on every device, matrices in the computation's type; made anew when `params` is another."""
        placed = self._placed
        if placed is None or placed[0] is not self.params:
            cast = {
                path: leaf.astype(self.config.dtype) if MATRICES.search(path) else leaf
                for path, leaf in flat_paths(self.params).items()
            }
            everywhere = NamedSharding(self.mesh, PartitionSpec())
            placed = self._placed = self.params, jax.device_put(self._laid_out(nested(cast)), everywhere)
        return placed[1]

    def _affine(self, repairs: tuple[Repair, ...]) -> Affine:
        """Repairs on every device; made anew where others were asked for before."""
        placed = self._placed_repairs
        if placed is None or tuple(map(id, placed[0])) != tuple(map(id, repairs)):
            everywhere = NamedSharding(self.mesh, PartitionSpec())
            placed = self._placed_repairs = repairs, jax.device_put(stacked(repairs), everywhere)
        return placed[1]

    def _pretrained(self) -> Pretrained:
        return Pretrained(self.config, self.params, self.tokenizer, self.pooling, self.about, self.repairs)

    def _laid_out(self, params: Params) -> Params:
        """As the compiled functions take them."""
        return params

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise InputError("the folder holds no tokenizer: use encode_ids, or put the tokenizer's files into it")
        return self.tokenizer


def _encoder(pretrained: Pretrained) -> Encoder:
    from ctx_jax.encoder.bert import BertEncoder
    from ctx_jax.encoder.elmo import ElmoEncoder

    kind = ElmoEncoder if isinstance(pretrained.config, ElmoConfig) else BertEncoder
    encoder = kind(pretrained.config, pretrained.params, pretrained.tokenizer, pretrained.pooling)
    encoder.about, encoder.repairs = pretrained.about, pretrained.repairs
    return encoder


def _many(texts: Iterable[Text]) -> Iterable[Text]:
    if isinstance(texts, (str, bytes)) or not isinstance(texts, Iterable):
        raise InputError(f"texts: found {texts!r:.40}, expected several: a list, or what gives them one by one")
    return texts


def cosine(a: Float[np.ndarray, "*batch D"], b: Float[np.ndarray, "*batch D"]) -> Float[np.ndarray, "*batch"]:
    """Cosine of the angle between vectors."""
    return (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))
