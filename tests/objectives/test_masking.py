"""Masks against Google's rule, as a slow loop over Python lists tells it, and against chi-square."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ctx_jax.arrays import Batch
from ctx_jax.errors import InputError
from ctx_jax.objectives.masking import Vocabulary, draw_masks, prediction_counts, slots_needed
from ctx_jax.sharding import make_mesh, put_batch

SPECIALS = (0, 1, 2, 3, 4)
PAD, UNK, CLS, SEP, MASK = SPECIALS
V = 1000


def vocabulary(rng=None, share=0.3):
    continues = np.zeros(V, bool) if rng is None else rng.random(V) < share
    continues[list(SPECIALS)] = False
    return Vocabulary(V, MASK, SPECIALS, continues)


def examples(rng, count, low=3, high=60):
    return [
        np.concatenate([[CLS], rng.integers(5, V, rng.integers(low - 2, high - 2)), [SEP]]).astype(np.int32)
        for _ in range(count)
    ]


def rows_of(texts, ids, length, per_row, epoch=0):
    """Packs texts in order, `per_row` at most; returns a Batch."""
    rows, row = [], []
    for text, i in zip(texts, ids, strict=True):
        if row and (len(row) == per_row or sum(len(t) for t, _ in row) + len(text) > length):
            rows.append(row)
            row = []
        row.append((text, i))
    rows.append(row)
    shape = (len(rows), length)
    out = {k: np.zeros(shape, np.int32) for k in ("input_ids", "segment_ids", "positions")}
    example_ids = np.zeros((len(rows), per_row), np.uint32)
    for r, row in enumerate(rows):
        at = 0
        for s, (text, i) in enumerate(row):
            place = slice(at, at + len(text))
            out["input_ids"][r, place] = text
            out["segment_ids"][r, place] = s + 1
            out["positions"][r, place] = np.arange(len(text))
            example_ids[r, s] = i
            at += len(text)
    return Batch(
        token_type_ids=np.zeros(shape, np.int32),
        example_ids=example_ids,
        epochs=np.full(len(rows), epoch, np.uint32),
        next_sentence=np.full((len(rows), per_row), -1, np.int32),
        **out,
    )


def draw(batch, seed, counts, words, *, slots, unit="token"):
    """draw_masks as it is used: jitted."""
    return _draw(batch, seed, counts, words, slots=slots, unit=unit)


_draw = jax.jit(draw_masks, static_argnames=("slots", "unit"))


def by_example(batch, masked):
    """{example id: [(position in example, target, input)]} and the used slots in order."""
    result = {}
    for r in range(batch.input_ids.shape[0]):
        for s, example in enumerate(batch.example_ids[r]):
            if (batch.segment_ids[r] == s + 1).any():
                result[int(example)] = []
        for p, target, weight in zip(masked.positions[r], masked.targets[r], masked.weights[r], strict=True):
            if weight:
                example = int(batch.example_ids[r, batch.segment_ids[r, p] - 1])
                result[example].append((int(batch.positions[r, p]), int(target), int(masked.input_ids[r, p])))
    return result


@pytest.mark.parametrize("rate", [0.15, 0.1, 0.4])
@pytest.mark.parametrize("limit", [None, 20])
def test_counts_are_googles(rate, limit):
    counts = prediction_counts(rate, 512, limit)
    for n in range(1, 513):
        assert counts[n] == min(limit or 512, max(1, int(round(n * rate))))  # noqa: RUF046  (the original's very words)
    assert counts[0] == 0
    if rate == 0.15 and limit is None:
        assert counts[190] == 28
        assert counts[30] == 4


def test_slots_are_enough_and_reached():
    counts = prediction_counts(0.15, 24)
    for per_row in (1, 2, 3):
        found = 0
        lengths = [range(3, 25)] * per_row
        for combination in np.array(np.meshgrid(*lengths)).reshape(per_row, -1).T:
            if combination.sum() <= 24:
                found = max(found, sum(counts[n] for n in combination))
        assert slots_needed(counts, per_row) >= found
    assert slots_needed(counts, 1) == counts[24] == 4


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1])
def test_impossible_rates_are_refused(rate):
    with pytest.raises(InputError, match="masking rate"):
        prediction_counts(rate, 128)


@pytest.mark.parametrize("per_row", [1, 5])
@pytest.mark.parametrize("limit", [None, 5])
def test_exact_count_on_every_row_and_only_there_changed(per_row, limit):
    rng = np.random.default_rng(per_row)
    texts = examples(rng, 60)
    texts[7][3] = UNK
    batch = rows_of(texts, range(100, 160), 64, per_row)
    counts = prediction_counts(0.15, 64, limit)
    masked = jax.tree.map(np.asarray, draw(batch, 3, counts, vocabulary(), slots=slots_needed(counts, per_row)))
    chosen = by_example(batch, masked)
    assert len(chosen) == 60
    for example, places in chosen.items():
        text = texts[example - 100]
        assert len(places) == min(limit or 99, max(1, round(len(text) * 0.15)))
        for position, target, _ in places:
            assert text[position] == target
            assert target not in SPECIALS
        assert len({p for p, _, _ in places}) == len(places)
    changed = masked.input_ids != batch.input_ids
    at = np.zeros_like(changed)
    for r in range(len(at)):
        at[r, masked.positions[r][masked.weights[r] > 0]] = True
    assert not (changed & ~at).any()
    assert not np.isin(masked.input_ids[changed], (PAD, UNK, CLS, SEP)).any()


def greedy_oracle(groups, scores, count):
    """create_masked_lm_predictions on (score, [positions]) groups: in order, passing over what does not fit."""
    taken = []
    for _, group in sorted(zip(scores, groups, strict=True)):
        if len(taken) >= count:
            break
        if len(taken) + len(group) <= count:
            taken += group
    return sorted(taken)


@pytest.mark.parametrize("per_row", [1, 4])
def test_whole_words_are_chosen_greedily_like_google(per_row):
    rng = np.random.default_rng(1)
    words = vocabulary(rng, share=0.6)
    texts = examples(rng, 80, low=5)
    batch = rows_of(texts, range(80), 64, per_row)
    counts = prediction_counts(0.15, 64)
    masked = jax.tree.map(np.asarray, draw(batch, 9, counts, words, slots=slots_needed(counts, per_row), unit="word"))
    fewer = 0
    for example, places in by_example(batch, masked).items():
        text = texts[example]
        groups = []
        for i, token in enumerate(text):
            if token in SPECIALS:
                continue
            if groups and words.continues_word[token]:
                groups[-1].append(i)
            else:
                groups.append([i])
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(9), 0), example)
        scores = [int(jax.random.key_data(jax.random.fold_in(key, g[0]))[0]) for g in groups]
        expected = greedy_oracle(groups, scores, counts[len(text)])
        assert [p for p, _, _ in places] == expected
        fewer += len(expected) < counts[len(text)]
    assert fewer < 80


def test_spans_are_runs_of_whole_words_of_geometric_length():
    rng = np.random.default_rng(2)
    words = vocabulary(rng)
    texts = examples(rng, 400, low=250, high=256)
    batch = rows_of(texts, range(400), 256, 1)
    counts = prediction_counts(0.15, 256)
    masked = jax.tree.map(np.asarray, draw(batch, 9, counts, words, slots=40, unit="span"))
    lengths, all_masked = [], 0
    for example, places in by_example(batch, masked).items():
        text, at = texts[example], [p for p, _, _ in places]
        assert counts[len(text)] - 10 <= len(at) <= counts[len(text)]
        for p in at:
            after = p + 1
            if words.continues_word[text[after]] and text[after] not in SPECIALS:
                assert after in at
        runs = np.split(at, np.flatnonzero(np.diff(at) != 1) + 1)
        lengths += [len(run) for run in runs]
        inputs = {p: i for p, _, i in places}
        all_masked += sum(len({inputs[p] == MASK for p in run}) == 1 for run in runs) / len(runs)
    assert 3 < np.mean(lengths) < 8
    assert all_masked / 400 > 0.85  # neighbouring spans may differ


@pytest.fixture(scope="module")
def million():
    """A million predictions of 512-token examples: (places in the row, targets, inputs)."""
    rng = np.random.default_rng(4)
    words = vocabulary()
    counts = prediction_counts(0.15, 512)
    step = jax.jit(lambda batch: draw_masks(batch, 5, counts, words, slots=77))
    found = []
    size = 1024
    for chunk in range(13):
        texts = [np.concatenate([[CLS], rng.integers(5, V, 510), [SEP]]).astype(np.int32) for _ in range(size)]
        batch = rows_of(texts, range(chunk * size, (chunk + 1) * size), 512, 1)
        masked = step(batch)
        assert float(masked.weights.sum()) == 77 * size
        inputs = np.take_along_axis(np.asarray(masked.input_ids), np.asarray(masked.positions), 1)
        found.append((np.asarray(masked.positions), np.asarray(masked.targets), inputs))
    places, targets, inputs = (np.concatenate(x).ravel() for x in zip(*found, strict=True))
    assert len(places) > 1_000_000
    return places, targets, inputs


def test_positions_are_uniform(million):
    places, _, _ = million
    observed = np.bincount(places, minlength=512)
    assert observed[0] == observed[511] == 0
    assert stats.chisquare(observed[1:511]).pvalue > 1e-3


def test_split_is_80_10_10(million):
    _, targets, inputs = million
    n = len(targets)
    same = int((inputs == targets).sum())
    mask = int((inputs == MASK).sum())
    # A random token equals the target once in V - 5 times.
    hit = 0.1 / (V - 5)
    p = stats.chisquare([mask, n - mask - same, same], [0.8 * n, (0.1 - hit) * n, (0.1 + hit) * n]).pvalue
    assert p > 1e-3


def test_random_tokens_are_uniform_over_ordinary_ids(million):
    _, targets, inputs = million
    drawn = inputs[(inputs != MASK) & (inputs != targets)]
    observed = np.bincount(drawn, minlength=V)
    assert observed[:5].sum() == 0
    assert stats.chisquare(observed[5:]).pvalue > 1e-3


def test_masks_belong_to_the_example_not_to_its_company():
    rng = np.random.default_rng(5)
    texts = examples(rng, 48)
    ids = rng.permutation(2**32 - 1 - np.arange(48, dtype=np.uint64)).astype(np.uint32)
    counts = prediction_counts(0.15, 64)

    def masks(order, per_row, length, unit, epoch=0, seed=11):
        batch = rows_of([texts[i] for i in order], ids[order], length, per_row, epoch)
        slots = slots_needed(counts, per_row)
        return by_example(batch, jax.tree.map(np.asarray, draw(batch, seed, counts, words, slots=slots, unit=unit)))

    words = vocabulary(rng)
    counts = prediction_counts(0.15, 200)
    for unit in ("token", "word", "span"):
        plain = masks(np.arange(48), 1, 64, unit)
        assert masks(rng.permutation(48), 1, 64, unit) == plain
        assert masks(rng.permutation(48), 6, 200, unit) == plain
        assert masks(np.arange(48), 1, 64, unit, epoch=1) != plain
        assert masks(np.arange(48), 1, 64, unit, seed=12) != plain


def test_rate_does_not_recompile():
    batch = rows_of(examples(np.random.default_rng(6), 8), range(8), 64, 1)
    step = jax.jit(lambda batch, counts: draw_masks(batch, 0, counts, vocabulary(), slots=26))
    sums = [float(step(batch, jnp.asarray(prediction_counts(r, 64))).weights.sum()) for r in (0.1, 0.15, 0.4)]
    assert sums[0] < sums[1] < sums[2]
    assert step._cache_size() == 1


def test_statistics_of_googles_own_instances(reference):
    """Counts of masked positions in the instances that create_pretraining_data made."""
    import json

    found = json.loads((reference / "bert_pretraining_data" / "instances.json").read_text())
    for name in ("default_seq128_seed12345", "default_seq32_seed7"):
        args = found[name]["args"]
        counts = prediction_counts(args["masked_lm_prob"], args["max_seq_length"], args["max_predictions_per_seq"])
        for instance in found[name]["instances"]:
            assert len(instance["positions"]) == counts[len(instance["tokens"])]


@pytest.mark.parametrize("count", [2, 4, 8])
def test_masks_are_the_same_on_any_number_of_devices(count):
    batch = rows_of(examples(np.random.default_rng(7), 60), range(60), 64, 3)
    batch = Batch(*(x[:16] for x in batch))
    words = vocabulary(np.random.default_rng(8))
    counts = prediction_counts(0.15, 64)
    slots = slots_needed(counts, 3)
    alone = draw(batch, 3, counts, words, slots=slots, unit="word")
    split = put_batch(batch, make_mesh(devices=jax.devices()[:count]))
    assert len(split.input_ids.sharding.device_set) == count
    for mine, theirs in zip(draw(split, 3, counts, words, slots=slots, unit="word"), alone, strict=True):
        np.testing.assert_array_equal(mine, theirs)
