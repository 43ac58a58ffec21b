"""The catalogue, on houses of a few files written for each test; then once on the real one."""

import json
import subprocess
import sys
import textwrap

import pytest

from saccade import catalog
from saccade.catalog import CardError
from saccade.core.errors import OptionError, UnknownMethodError

CARD = {
    "kind": "method",
    "form": "method",
    "target": "vlm",
    "paper": "A Paper (Someone, 2025)",
    "summary": "One line.",
}


def source(slug, family="steering", class_name=None, doc="What it does.", body="", **card):
    fields = {"slug": slug, "name": slug.title(), "family": family, **CARD, **card}
    lines = "".join(f"        {key}={value!r},\n" for key, value in fields.items())
    return (
        f'"""{doc}"""\n\nfrom saccade.core.card import Card\n'
        "from saccade.core.method import Method, option\n\n\n"
        f"class {class_name or slug.title().replace('_', '')}(Method):\n"
        + textwrap.indent(body, "    ")
        + f"    card = Card(\n{lines}    )\n"
    )


@pytest.fixture
def house(tmp_path):
    def add(slug, family="steering", text=None, **given):
        folder = tmp_path / family
        folder.mkdir(exist_ok=True)
        (folder / f"{slug}.py").write_text(text or source(slug, family, **given))

    add.root = tmp_path
    return add


def slugs(cards):
    return [card.slug for card in cards]


def test_a_file_is_an_entry_and_is_not_imported(house):
    house(
        "dim", doc="Dim the sink.\n\n    a <- p a", text=source("dim", doc="Dim it.") + "\nraise SystemExit\n"
    )
    entry = catalog.entry("dim", house.root)
    assert (entry.class_name, entry.description) == ("Dim", "Dim it.")
    assert entry.module == f"{house.root.name}.steering.dim"
    assert entry.card.paper == "A Paper (Someone, 2025)"


def test_shared_files_and_other_folders_are_left_alone(house):
    house("_parts", text="not python at all (")
    house("notes", family="elsewhere", text="nor this (")
    house("dim")
    assert slugs(catalog.cards(house.root)) == ["dim"]


def test_reading_one_entry_does_not_read_the_others(house):
    house("dim")
    house("broken", text="def (")
    assert catalog.entry("dim", house.root).card.slug == "dim"
    with pytest.raises(CardError, match=r"broken\.py: no cards"):
        catalog.cards(house.root)


def test_cards_in_any_layout_are_read(house):
    one_line = f"slug='flat', name='F', family='steering', {', '.join(f'{k}={v!r}' for k, v in CARD.items())}"
    house("flat", text=f"class Flat:\n    card = Card({one_line})\n\n    def f(self):\n        g(\n    )\n")
    annotated = source("typed").replace("card = Card(", "card: ClassVar[Card] = Card(")
    house("typed", text=annotated)
    assert slugs(catalog.cards(house.root)) == ["flat", "typed"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (source("other"), "slug='other', but the file says 'dim'"),
        (source("dim", family="probes"), "family='probes', but the file says 'steering'"),
        (source("dim").replace("'One line.'", "SUMMARY"), "summary=SUMMARY is not a literal"),
        (source("dim").replace("'One line.'", "print('called')"), "is not a literal"),
        (source("dim").replace("summary=", "sumary="), "sumary"),
        (source("dim").replace("        summary='One line.',\n", ""), "summary"),
        (source("dim", tags="sink"), "tags='sink'"),
        (source("dim", trains="maybe"), "trains='maybe'"),
        (source("dim").replace("card = Card(", "card = make("), "no cards"),
        (source("dim") + source("dim", class_name="Two"), "2 cards"),
        ("if True:\n" + source("dim").split("\n\n\n")[1].split(":\n", 1)[1], "not in a class"),
        (source("dim").replace("class Dim(Method):", "class Dim(Method:"), "dim.py:7:"),
    ],
)
def test_a_card_that_is_not_right_names_its_file(house, text, said, capsys):
    house("dim", text=text)
    with pytest.raises(CardError) as error:
        catalog.entry("dim", house.root)
    assert "steering/dim.py" in str(error.value)
    assert said in str(error.value)
    assert capsys.readouterr().out == ""


def test_a_slug_or_a_class_belongs_to_one_file(house):
    house("dim")
    house("dim", family="probes")
    with pytest.raises(CardError, match=r"probes/dim\.py: the slug is taken by .*steering/dim\.py"):
        catalog.entry("dim", house.root)
    (house.root / "probes" / "dim.py").unlink()
    house("dimmer", class_name="Dim")
    with pytest.raises(CardError, match="the class Dim is also in"):
        catalog.entries(house.root)


def test_an_unknown_slug_offers_the_nearest(house):
    house("attention_rollout", family="probes")
    with pytest.raises(UnknownMethodError, match="did you mean attention_rollout"):
        catalog.entry("attention_rolout", house.root)
    with pytest.raises(UnknownMethodError, match="saccade methods"):
        catalog.entry("zzz", house.root)


def test_options_follow_the_bases(house):
    (house.root / "steering").mkdir()
    (house.root / "steering" / "_base.py").write_text(
        'class Base(Mixin):\n    alpha: float = option(1.0, "strength " "of it", low=0, high=2)\n'
        "    note: ClassVar[str] = 'not an option'\n    window: int\n"
    )
    body = (
        'alpha: float = option(0.5, doc="weaker", low=0)\n'
        'mode: str = option(default="a", doc="how", choices=("a", "b"))\n'
        "extra: dict[str, int] = field(default_factory=dict)\n\n"
    )
    text = source("dim", body=body).replace("(Method)", "(Base)")
    text = text.replace("\n\n\n", f"\nfrom {house.root.name}.steering._base import Base\n\n\n", 1)
    house("dim", text=text)
    options = catalog.entry("dim", house.root).options
    assert [(o.name, o.annotation, o.default, o.doc, o.limits, o.owner) for o in options] == [
        ("window", "int", "", "", "", "Base"),
        ("alpha", "float", "0.5", "weaker", "at least 0", "Dim"),
        ("mode", "str", "'a'", "how", "one of 'a', 'b'", "Dim"),
        ("extra", "dict[str, int]", "dict()", "", "", "Dim"),
    ]


def test_options_of_every_method_come_from_its_class(house):
    house("dim")
    options = {o.name: o for o in catalog.entry("dim", house.root).options}
    assert options["sites"].owner == "Method"
    assert options["rows"].default == "'all'"


@pytest.fixture
def library(house):
    house(
        "var", summary="Take attention from sinks and give it to the image.", tags=("hallucination", "sink")
    )
    house("vista", summary="Steer hidden states.", paper="Reducing Object Hallucinations (Li, 2025)")
    house("damro", doc="Subtracts outlier tokens so that objects are not hallucinated.")
    house("oat", family="gaze", summary="A scanpath over objects.", target="webcam")
    house("fastervlm", family="reduction", summary="Prune visual tokens by the class token.")
    house("attention_rollout", family="probes", summary="Multiply the maps of all layers.")
    house("variance", family="probes", summary="Spread of the maps.")
    for i in range(6):
        house(f"filler_{i}", family="layers", summary="A layer.")
    return house.root


@pytest.mark.parametrize(
    ("words", "first"),
    [
        ("object hallucination", ["vista", "damro"]),
        ("hallucinate", ["var"]),
        ("rollo", ["attention_rollout"]),
        ("attention rollout", ["attention_rollout"]),
        ("ATTENTION_ROLLOUT", ["attention_rollout"]),
        ("token pruning", ["fastervlm"]),
        ("sinks", ["var"]),
        ("var", ["var", "variance"]),
        ("scanpaths", ["oat"]),
        ("webcam", ["oat"]),
        ("someone 2025", None),
    ],
)
def test_search_finds_what_it_should_first(library, words, first):
    found = slugs(catalog.methods(words, root=library))
    if first is None:
        assert len(found) == 12  # every card but the one of another paper
    else:
        assert found[: len(first)] == first


def test_who_answers_to_one_word_of_two_is_below_the_line(library):
    assert "oat" in slugs(catalog.methods("object", root=library))
    assert "oat" not in slugs(catalog.methods("object hallucination", root=library))


def test_search_without_words_or_in_one_family(library):
    assert len(catalog.methods(root=library)) == 13
    assert slugs(catalog.methods(family="gaze", root=library)) == ["oat"]
    assert slugs(catalog.methods("maps", family="probes", root=library)) == ["attention_rollout", "variance"]
    assert slugs(catalog.methods("maps", family="gaze", root=library)) == []
    assert slugs(catalog.methods("qqq", root=library)) == []
    with pytest.raises(OptionError, match="did you mean steering"):
        catalog.methods(family="stering", root=library)


def test_a_list_of_cards_reads_as_a_table(library, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    found = catalog.methods("attention image", root=library)
    assert "var  " in repr(found)
    assert all(len(line) <= 60 for line in repr(catalog.methods(root=library)).splitlines())
    assert repr(catalog.methods("qqq", root=library)) == "no method"
    found[0] = catalog.Card(**{**vars(found[0]), "summary": "<script>"})
    assert "&lt;script&gt;" in found._repr_html_() and "<script>" not in found._repr_html_()


def test_classes_come_by_slug_and_by_name(house, monkeypatch):
    package = house.root / "named_house"
    (package / "steering").mkdir(parents=True)
    (package / "steering" / "dim.py").write_text(source("dim", class_name="DIM"))
    monkeypatch.syspath_prepend(house.root)
    assert catalog.load_class("dim", package).__name__ == "DIM"
    assert catalog.load_named("DIM", package) is catalog.load_class("dim", package)
    with pytest.raises(AttributeError, match="did you mean DIM"):
        catalog.load_named("DIMM", package)


def test_every_card_of_ours_is_right_and_stands_for_its_class():
    for entry in catalog.entries():
        cls = catalog.load_class(entry.card.slug)
        assert cls.card == entry.card
        assert set(entry.card.neutral) <= {option.name for option in entry.options}


def python(code):
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


def test_importing_saccade_is_light():
    loaded, names, found = python(
        "import json, sys, saccade\n"
        "loaded = [m for m in ('torch', 'transformers', 'numpy') if m in sys.modules]\n"
        "saccade.Card, saccade.option, saccade.load, saccade.methods()\n"
        "loaded += [m for m in ('torch', 'transformers') if m in sys.modules]\n"
        "found = hasattr(saccade, 'Nothing') or hasattr(saccade, 'nothing')\n"
        "print(json.dumps([loaded, dir(saccade), found]))"
    )
    assert loaded == []
    assert not found
    assert {"attach", "load", "methods", *(entry.class_name for entry in catalog.entries())} <= set(names)


def test_the_public_names_are_declared_once():
    import saccade

    assert set(saccade.__all__) == {*saccade._HOMES, "bench", "world"}
    for name in saccade._HOMES:
        assert getattr(saccade, name).__name__ == name
    assert saccade.world.__name__ == "saccade.world" and callable(saccade.bench)
