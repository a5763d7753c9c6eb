"""STS: quotes are text, pairs without a score are none, and the sets have their published counts."""

import collections

import pytest

from ctx_jax.atlas.formats import sts
from ctx_jax.errors import InputError

START = "main-news\theadlines\t2015\t0001\t"


def test_quotes_of_the_benchmark_are_text(write):
    path = write("sts.csv", f'{START}5.000\t"A, b\tc"d"\n{START}0\tx\t\'y"\tsource\tother\n')
    pairs = sts.benchmark(path)
    assert (pairs.first, pairs.second) == (('"A, b', "x"), ('c"d"', "'y\""))
    assert (pairs.scores.tolist(), pairs.sets) == ([5.0, 0.0], ("headlines", "headlines"))


def test_a_year_is_its_sets_one_after_another(write):
    one = write("2015/belief.test.tsv", '2.5\ta\tb\n\tnot\tscored\n0\t"c\td\n')
    two = write("2015/an.x.tsv", "1\te\tf\n")
    pairs = sts.semeval([one, two])
    assert (pairs.first, pairs.second) == (("a", '"c', "e"), ("b", "d", "f"))
    assert (pairs.scores.tolist(), pairs.sets) == ([2.5, 0.0, 1.0], ("belief", "belief", "an"))
    assert sts.semeval([]).scores.shape == (0,)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"{START}1\ta", "6 columns in"),
        (f"{START}x\ta\tb", "score 'x'; expected a number from 0 to 5"),
        (f"{START}\ta\tb", "score ''"),
        (f"{START}5.1\ta\tb", "score '5.1'"),
        (f"{START}nan\ta\tb", "score 'nan'"),
    ],
)
def test_what_is_wrong_with_the_benchmark_is_said(line, message, write):
    path = write("sts.csv", f"{START}1\ta\tb\n\n{line}\n")
    with pytest.raises(InputError) as error:
        sts.benchmark(path)
    assert str(error.value).startswith(f"{path}, line 3: {message}")


@pytest.mark.parametrize(
    ("line", "message"), [("1\ta", "2 columns in"), ("1\ta\tb\tc", "4 columns in"), ("-1\ta\tb", "score '-1'")]
)
def test_what_is_wrong_with_a_year_is_said(line, message, write):
    path = write("x.tsv", f"1\ta\tb\n{line}\n")
    with pytest.raises(InputError) as error:
        sts.semeval([path])
    assert str(error.value).startswith(f"{path}, line 2: {message}")


@pytest.mark.parametrize(("split", "count"), [("train", 5749), ("dev", 1500), ("test", 1379)])
def test_the_benchmark_has_its_published_counts(split, count, data):
    pairs = sts.benchmark(data / "sts" / "stsbenchmark" / f"sts-{split}.csv.xz")
    assert len(pairs.first) == len(pairs.second) == len(pairs.scores) == len(pairs.sets) == count


@pytest.mark.parametrize(
    ("year", "split", "counts"),
    [
        (2012, "train", {"MSRpar": 750, "MSRvid": 750, "SMTeuroparl": 734}),
        (2012, "test", {"MSRpar": 750, "MSRvid": 750, "SMTeuroparl": 459, "OnWN": 750, "SMTnews": 399}),
        (2013, "test", {"headlines": 750, "OnWN": 561, "FNWN": 189}),
        (2014, "test", 3750),
        (2015, "test", 3000),
        (2016, "test", 1186),
    ],
)
def test_semeval_has_its_published_counts(year, split, counts, data):
    pairs = sts.semeval(sorted((data / "sts" / "semeval" / str(year)).glob(f"*.{split}.tsv.xz")))
    sets = collections.Counter(pairs.sets)
    assert (sets.total() if isinstance(counts, int) else sets) == counts
