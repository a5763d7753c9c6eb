"""The page of an atlas: whole, alone, true to its record, the same each time."""

import dataclasses
import html.parser
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from oracles.atlases import two_models

from ctx_jax.atlas.report import summary, write_report
from ctx_jax.atlas.results import Atlas, ModelAtlas, Probe, Score, SenseMap, Task, read_atlas
from ctx_jax.errors import InputError

VOID = {"meta", "br", "hr", "img", "link", "input"}
SVG = "{http://www.w3.org/2000/svg}"
NASTY = "<script>alert(1)</script> \"quoted\" & 'so' $x^2$ \x1b 語"
CLEAN = NASTY.replace("\x1b", "\ufffd")


class Element:
    """Of a page: tag, attributes, children and text."""

    def __init__(self, tag, attributes=()):
        self.tag, self.attributes, self.children = tag, dict(attributes), []

    def all(self):
        yield self
        for child in self.children:
            if isinstance(child, Element):
                yield from child.all()

    def find(self, tag):
        return [element for element in self.all() if element.tag == tag]

    @property
    def text(self):
        return "".join(child.text if isinstance(child, Element) else child for child in self.children)


class Reader(html.parser.HTMLParser):
    """A parser that forgives nothing: every tag is closed, in order."""

    def __init__(self, page):
        super().__init__()
        self.root = Element("root")
        self.open = [self.root]
        self.feed(page)
        self.close()
        assert self.open == [self.root], [element.tag for element in self.open]

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names)), (tag, names)
        element = Element(tag, attributes)
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attributes):
        self.open[-1].children.append(Element(tag, attributes))

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag

    def handle_data(self, data):
        self.open[-1].children.append(data)


def read(folder):
    return Reader((folder / "index.html").read_text(encoding="utf-8")).root


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def tables(root, caption):
    """Rows of the tables with this caption, their header first."""
    found = [table for table in root.find("table") if table.find("caption")[0].text == caption]
    return [
        [[cell.text for cell in row.children if isinstance(cell, Element)] for row in table.find("tr")]
        for table in found
    ]


def small(**parts):
    """One model of one layer, with the given parts only."""
    model = ModelAtlas("tiny", "00", "BERT, 1 layer of 4", 1, 4, 100, [0.0, 10.0])
    return Atlas([dataclasses.replace(model, **parts)])


def probed(layers, title="a task", **rest):
    probe = Probe("linear", "accuracy", [Score(mean, mean - 0.01, mean + 0.01) for mean in layers], **rest)
    return Task("corpus/task", title, 10, 10, 2, {"majority": 0.5}, [probe], 1, 1.0)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """One report with all parts, and its atlas."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("report") / "atlas"
    atlas = two_models()
    write_report(atlas, folder)
    return folder, atlas


@pytest.fixture
def drawing():
    pytest.importorskip("matplotlib")


def test_summary_says_what_the_record_says():
    lines = summary(two_models())
    assert len(lines) == 10
    assert lines[0] == (
        "minilm: BERT, 6 layers of 384, 22.7 M parameters. Best layers of 0 to 6: part of speech 2, "
        "dependency trees 4, semantic roles 4, senses of SemCor to ALL 6, senses of CoarseWSD-20 6."
    )
    assert lines[6] == (
        "elmo: anisotropy, the mean cosine of two random words: 0.070 at layer 0, 0.470 at layer 2, where it is "
        "highest, 0.470 at the last."
    )
    # of the trees: 0.31 + 0.42 (1 − (4/6 − 0.6)² / 0.6²) at layer 4, 0.31 + 0.42 (1 − 0.4² / 0.6²) at layer 6
    assert lines[2].endswith("most on dependency trees, 18.1 less than layer 4.")
    assert lines[4] == "minilm: best sentence vectors: layer all, pooling max, repair none; Spearman 84.0 on STS-B."


def test_summary_leaves_out_what_is_missing():
    assert summary(small()) == ["tiny: BERT, 1 layer of 4, 100 parameters."]
    nothing = float("nan")
    assert summary(small(tasks=[probed([nothing, nothing])]))[0].endswith("Best layers of 0 to 1: a task –.")


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else find(name, *a))
    with pytest.raises(InputError, match=re.escape("pip install 'ctx-jax[atlas]'")):
        write_report(two_models(), tmp_path / "atlas")
    assert not (tmp_path / "atlas").exists()


def test_importing_the_report_loads_no_matplotlib():
    code = "import sys, ctx_jax.atlas.report; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_an_atlas_of_nothing_or_of_the_wrong_length_is_refused(tmp_path, drawing):
    with pytest.raises(InputError, match="found no model"):
        write_report(Atlas([]), tmp_path)
    with pytest.raises(InputError, match="found 3 values, expected 2"):
        write_report(small(tasks=[probed([0.1, 0.2, 0.3])]), tmp_path)


def test_a_folder_that_cannot_be_is_refused(tmp_path, drawing):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="expected a writable folder"):
        write_report(small(), tmp_path / "file")


def test_sections_stand_in_order_with_nothing_empty(written):
    root = read(written[0])
    assert [section.attributes["id"] for section in root.find("section")] == [
        "tasks", "heat", "geometry", "senses", "sentences", "advice", "meaning", "made",
    ]  # fmt: skip
    assert [item.text for item in root.find("ol")[0].find("li")] == summary(written[1])
    for element in root.all():
        if element.tag in {"h1", "h2", "h3", "figure", "table", "section", "figcaption", "ul", "ol", "dl"}:
            assert element.text.strip(), element.tag


def test_the_page_loads_nothing(written):
    root = read(written[0])
    assert not root.find("script")
    assert not root.find("img")
    assert not root.find("link")
    for element in root.all():
        for name, value in element.attributes.items():
            if name in {"src", "href", "xlink:href", "data", "poster"}:
                assert value.startswith("#") or element.tag == "a", (element.tag, name, value)
            assert not name.startswith("on")
            assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", value or ""))
    for style in root.find("style"):
        assert "url(" not in style.text
        assert "@import" not in style.text


def test_ids_are_unique_and_references_lead_somewhere(written):
    root = read(written[0])
    ids = [element.attributes["id"] for element in root.all() if "id" in element.attributes]
    assert len(ids) == len(set(ids))
    for svg in root.find("svg"):
        own = {element.attributes.get("id") for element in svg.all()}
        values = [value for element in svg.all() for value in element.attributes.values()]
        used = re.findall(r"url\(#([^)]*)\)", " ".join(values))
        used += [element.attributes["href"][1:] for element in svg.find("use")]
        assert used
        assert set(used) <= own


def test_plots_are_files_too(written):
    folder, _ = written
    root = read(folder)
    names = sorted(path.stem for path in (folder / "plots").glob("*.svg"))
    assert names == sorted(path.stem for path in (folder / "plots").glob("*.png"))
    assert len(names) == len(root.find("svg")) == len(root.find("figure"))
    for name in names:
        svg = ElementTree.parse(folder / "plots" / f"{name}.svg").getroot()
        assert svg.tag == f"{SVG}svg"
        assert svg.attrib["role"] == "img"
        assert len(svg.attrib["aria-label"]) > 20
        assert list(svg.iter(f"{SVG}text"))  # text is text
        assert (folder / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_tables_name_their_rows_and_columns(written):
    for table in read(written[0]).find("table"):
        assert {cell.attributes.get("scope") for cell in table.find("th")} == {"col", "row"}
        lengths = {sum(isinstance(cell, Element) for cell in row.children) for row in table.find("tr")}
        assert len(lengths) == 1
        assert len(table.find("caption")) == 1


def test_heat_maps_show_the_records_numbers(written):
    folder, atlas = written
    root = read(folder)
    for number, model in enumerate(atlas.models, 1):
        expected = [
            [f"{100 * score.mean:.1f}" for score in probe.layers] for task in model.tasks for probe in task.probes
        ]
        (table,) = tables(root, f"{model.name}: tasks by layers")
        assert [row[1:] for row in table[1:]] == expected
        svg = ElementTree.parse(folder / "plots" / f"heat-{number}-{model.name}.svg").getroot()
        drawn = ["".join(text.itertext()) for text in svg.iter(f"{SVG}text")]
        cells = [text for text in drawn if re.fullmatch(r"\d+\.\d", text)]
        assert cells == [cell for row in expected for cell in row]
    geometry = atlas.models[0].geometry[0]
    (table,) = tables(root, "minilm: CKA of its layers")
    assert [row[1:] for row in table[1:]] == [[f"{value:.2f}" for value in row] for row in geometry.cka]
    (table,) = tables(root, "elmo: STS-B")
    scores = {(s.pooling, s.repair, s.layer): f"{s.spearman:.1f}" for s in atlas.models[1].sentences}
    shown = {
        (*row[0].split(", "), layer): cell
        for row in table[1:]
        for layer, cell in zip(table[0][1:], row[1:], strict=True)
    }
    assert shown == scores


def test_curves_show_the_records_numbers(written):
    folder, atlas = written
    root = read(folder)
    (rows,) = tables(root, "Self-similarity: mean cosine")
    for model in atlas.models:
        geometry = model.geometry[0]
        pairs = zip(geometry.self_similarity, geometry.anisotropy, strict=True)
        empty = [""] * (6 - model.num_layers)
        assert [f"{model.name}, raw", *(f"{value:.3f}" for value in geometry.self_similarity), *empty] in rows
        assert [f"{model.name}, adjusted", *(f"{value - other:.3f}" for value, other in pairs), *empty] in rows
    (rows,) = tables(root, "part of speech: accuracy, × 100")
    probe = atlas.models[0].tasks[0].probes[0]
    differences = [one.mean - other.mean for one, other in zip(probe.layers, probe.control, strict=True)]
    assert ["minilm, selectivity", *(f"{100 * difference:.1f}" for difference in differences)] == rows[-2][:8]
    (rows,) = tables(root, "part of speech: mixes of layers: accuracy, × 100")
    cumulative, weights = ([f"{100 * value:.1f}" for value in values] for values in
                           ([score.mean for score in probe.cumulative], probe.mix_weights))  # fmt: skip
    assert ["minilm, layers 0 to l", *cumulative] in [row[:8] for row in rows]
    assert ["minilm, share in the mix of all", *weights] in [row[:8] for row in rows]
    (rows,) = tables(root, "Senses: CoarseWSD-20: accuracy, × 100")
    task = atlas.models[1].senses[1]
    assert ["elmo, 1-NN", *(f"{100 * value:.1f}" for value in task.one_nn), *[""] * 4] in rows


def test_tables_show_the_records_numbers(written):
    folder, _ = written
    root = read(folder)
    # of layer 4: dimensions 124 to 129, z from 7.5 to 12.5
    (rows,) = tables(root, "minilm: outlier dimensions of 384, those farthest out first")
    assert rows[5] == [
        "4", "6", "129 (z 12.5), 128 (z 11.5), 127 (z 10.5), 126 (z 9.5), 125 (z 8.5) and 1 more",
    ]  # fmt: skip
    # of the trees: layer 3 has 0.31 + 0.42 (1 − 0.1² / 0.6²) = 0.718, less than a point below layer 4
    (rows,) = tables(root, "minilm: scores × 100")
    assert rows[2][:9] == ["dependency trees", "UUAS", "4", "72.5", "54.3", "73.6", "3", "71.8", "50"]
    (rows,) = tables(root, "Of each task; bits at the layer with the fewest. Seconds are of all of a task's probes.")
    # 3 − 0.725 bits of 4
    assert rows[3] == ["dependency trees, distance, UUAS", "minilm", "4", "72.5", "73.6", "1.25", "1.75",
                       "2.275 (layer 4)", "1.8", "321.5"]  # fmt: skip
    (rows,) = tables(root, "Run")
    assert [row[1] for row in rows[3:]] == ["2026-01-02T03:04:05", "1234.5 s", "2.35 GB"]


def test_plots_name_their_lines_and_axes(written):
    texts = {}
    for path in (written[0] / "plots").glob("*.svg"):
        texts[path.stem] = ["".join(text.itertext()) for text in ElementTree.parse(path).iter(f"{SVG}text")]
    task = texts["task-1-en-ewt-ud-pos-linear"]
    for text in ("minilm", "elmo", "word type 86.0", "majority 17.1, below the axis", "minilm, mix of layers 96.0",
                 "elmo, selectivity", "BERT-base (not confirmed)", "relative depth l/L", "mix"):  # fmt: skip
        assert text in task, text
    frequency = texts["senses-frequency-1-minilm-semcor-to-all"]
    assert "layer" in frequency
    assert "relative depth l/L" not in frequency
    assert [text for text in frequency if "training" in text] == [
        "1-4 in training",
        "5-19 in training",
        "20+ in training",
    ]
    assert "BERT-base, 1-NN (not confirmed)" in texts["senses-1-semcor-to-all"]
    assert "BERT-base, 1-NN (not confirmed)" not in texts["senses-2-coarsewsd-20"]


def test_a_baseline_of_one_metric_stands_beside_that_metric_alone(tmp_path, drawing):
    task = probed([0.5, 0.7], "a tree")
    probes = [dataclasses.replace(task.probes[0], metric=metric) for metric in ("UUAS", "UAS")]
    task = dataclasses.replace(task, probes=probes, baselines={"near (UUAS)": 0.6, "before (UAS)": 0.55, "any": 0.65})
    write_report(small(tasks=[task]), tmp_path)
    drawn = [path.read_text() for path in sorted((tmp_path / "plots").glob("task-*.svg"))]
    shown = [{name for name in task.baselines if name in text} for text in drawn]
    assert shown == [{"near (UUAS)", "any"}, {"before (UAS)", "any"}]


def test_models_differ_in_marker_and_colour(written):
    """A print in grey tells them apart as well: of the two lines of norms."""
    svg = ElementTree.parse(written[0] / "plots" / "geometry-1-5-norm.svg").getroot()
    lines = [
        group
        for group in svg.iter(f"{SVG}g")
        if "line2d" in group.attrib.get("id", "") and len(list(group.iter(f"{SVG}use"))) > 2
    ]
    assert len(lines) == 2
    shapes = {line.find(f".//{SVG}defs/{SVG}path").attrib["d"] for line in lines}
    colours = {re.search(r"stroke: (#\w+)", line.find(f"{SVG}path").attrib["style"])[1] for line in lines}
    assert len(shapes) == len(colours) == 2


def test_published_curves_are_named_with_their_source(written):
    root = read(written[0])
    (rows,) = tables(root, "Anisotropy: mean cosine")
    assert ["ELMo", "0.008", "0.157", "0.136", *[""] * 10] in rows
    assert ["BERT-base-cased", "0.105", *[""] * 10, "0.675", "0.477"] in rows
    sources = root.find("ul")[-1].text
    for author in ("Ethayarajh", "Tenney", "Loureiro", "Kornblith", "Hewitt"):
        assert author in sources


def test_points_of_a_map_tell_their_contexts(written):
    folder, atlas = written
    found = atlas.models[0].maps[0]
    svg = ElementTree.parse(folder / "plots" / "map-1-minilm-bank-0.svg").getroot()
    titles = [use.findtext(f"{SVG}title") for use in svg.iter(f"{SVG}use") if use.find(f"{SVG}title") is not None]
    assert sorted(titles) == sorted(
        f"{found.senses[sense]}: {context}" for sense, context in zip(found.sense, found.contexts, strict=True)
    )


def test_the_json_makes_the_same_report_again(tmp_path, drawing):
    """In another process, whose hashes are seeded otherwise."""
    atlas = two_models()
    models = [
        dataclasses.replace(model, tasks=model.tasks[:1], geometry=[], senses=[], maps=model.maps[style:])
        for style, model in enumerate(atlas.models)
    ]
    models = [dataclasses.replace(model, sentences=model.sentences[:3]) for model in models]
    atlas = dataclasses.replace(atlas, models=models)
    write_report(atlas, tmp_path / "first")
    assert read_atlas(tmp_path / "first" / "atlas.json") == atlas
    code = (
        "import sys; from ctx_jax.atlas.report import write_report; from ctx_jax.atlas.results import read_atlas; "
        "write_report(read_atlas(sys.argv[1]), sys.argv[2])"
    )
    arguments = [str(tmp_path / "first" / "atlas.json"), str(tmp_path / "second")]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    assert files(tmp_path / "first") == files(tmp_path / "second")


def test_missing_parts_leave_their_sections_out(tmp_path, drawing):
    write_report(small(), tmp_path)
    root = read(tmp_path)
    assert [section.attributes["id"] for section in root.find("section")] == ["meaning", "made"]
    assert not root.find("figure")
    assert "Anisotropy" not in root.text

    write_report(small(tasks=[probed([0.5, 0.6])]), tmp_path)
    root = read(tmp_path)
    assert [section.attributes["id"] for section in root.find("section")] == ["tasks", "heat", "meaning", "made"]
    assert "relative depth l/L." not in root.find("section")[0].text


def test_missing_numbers_are_dashes(tmp_path, drawing):
    nothing = float("nan")
    tasks = [probed([nothing, 0.625], "half"), probed([nothing, nothing], "none")]
    tasks[1] = dataclasses.replace(tasks[1], name="corpus/none", baselines={"majority": nothing})
    write_report(small(tasks=tasks), tmp_path)
    root = read(tmp_path)
    (table,) = tables(root, "tiny: tasks by layers")
    assert table[1:] == [["half", "–", "62.5"], ["none", "–", "–"]]
    svg = ElementTree.parse(tmp_path / "plots" / "heat-1-tiny.svg").getroot()
    assert ["".join(text.itertext()) for text in svg.iter(f"{SVG}text")].count("–") == 3
    assert "nan" not in root.text.lower()


def test_whatever_a_text_holds_it_stays_a_text(tmp_path, drawing):
    """Of names, titles, contexts, commands: markup, quotes, mathematics, control characters, other scripts."""
    points = [(0.0, 1.0), (1.0, 0.0), (2.0, 2.0)]
    found = SenseMap(NASTY, NASTY, [NASTY, "_hidden"], [0, 1, 1], [NASTY] * 3, {NASTY: points})
    task = dataclasses.replace(probed([0.5, 0.7], NASTY), name=NASTY, baselines={NASTY: 0.6, "_b": 0.55})
    atlas = small(name=NASTY, architecture=NASTY, fingerprint=NASTY, tasks=[task], maps=[found])
    write_report(dataclasses.replace(atlas, command=NASTY, machine=NASTY, date=NASTY), tmp_path)
    root = read(tmp_path)
    assert not root.find("script")
    assert root.find("h1")[0].text == f"Layer atlas: {CLEAN}"
    assert root.find("li")[0].text.startswith(f"{CLEAN}: {CLEAN}, 100 parameters.")
    assert ["command", CLEAN] in tables(root, "Run")[0]
    assert f"{CLEAN}: {CLEAN}" in [title.text for title in root.find("title")]
    drawn = " ".join(text.text for text in root.find("text"))
    assert "<script>alert(1)</script>" in drawn
    assert "$x^2$" in drawn
    assert "_hidden (2)" in drawn
    assert "_b 55.0" in drawn
    for path in (tmp_path / "plots").glob("*.svg"):
        ElementTree.parse(path)
        assert re.fullmatch(r"[a-z0-9-]+", path.stem)


@pytest.mark.slow
def test_a_telephone_shows_it_without_moving_it_sideways(written, tmp_path):
    """Chromium lays it out 360 px wide: nothing sticks out, but for what scrolls within its own box."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium")
    (tmp_path / "index.html").write_bytes((written[0] / "index.html").read_bytes())
    (tmp_path / "frame.html").write_text(
        "<iframe id=page src=index.html style='width:360px;height:800px;border:0'></iframe><script>"
        "page.onload = () => { const found = page.contentDocument; const wide = [...found.querySelectorAll('body *')]"
        ".filter(e => !e.closest('.scroll') && e.getBoundingClientRect().right > 360.5).map(e => e.tagName);"
        "document.title = found.documentElement.scrollWidth + ' ' + found.querySelectorAll('svg').length + wide }"
        "</script>"
    )
    options = [
        "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files",
        "--virtual-time-budget=20000", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
    ]  # fmt: skip
    command = [chromium, *options, (tmp_path / "frame.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    plots = len(list((written[0] / "plots").glob("*.svg")))
    assert f"<title>360 {plots}</title>" in done.stdout
