"""The notation of stacks: what it reads, what it refuses and where its errors point."""

import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saccade.core.errors import OptionError, SaccadeError, StackError, UnknownMethodError
from saccade.core.method import EVENTS
from saccade.stack import Stack, load

METHODS = {
    "fastervlm": """
        keep: float = option(0.5, "share of tokens kept", low=0.0, high=1.0)
        sites: Sites = option("vision.-2.self", "where")
    """,
    "var": """
        p: float = option(0.6, "share kept", low=0.0, high=1.0)
        layers: int = option(2, "layers left alone")
        hard: bool = option(False, "all or nothing")
        mode: Literal["paper", "code"] = "paper"
        text: str = ""
        scale: float | None = None
        either: int | str = 0
        share: float | int = 0.5
        pairs: tuple[tuple[int, float], ...] = ()
        span: tuple[int, int] = (0, 1)
        names: list[str] = field(default_factory=list)
        table: Mapping[str, float] = field(default_factory=dict)
        by_layer: dict[int, tuple[int, ...]] = field(default_factory=dict)
        detector: Detector | None = None
        tool: object = None
        derived: int = field(init=False, default=0)

        def __post_init__(self):
            super().__post_init__()
            if self.hard and self.p == 0:
                raise OptionError("hard at p=0 leaves nothing.", "Choose one.")
    """,
    "demanding": """
        need: int = field(kw_only=True)
    """,
    "plain_layer": "",
}

HEAD = """
from __future__ import annotations
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal
from saccade.core.card import Card
from saccade.core.errors import OptionError
from saccade.core.method import Method, Sites, option
if TYPE_CHECKING:
    from nowhere import Detector
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    package = tmp_path_factory.mktemp("stacks") / "stack_house"
    (package / "steering").mkdir(parents=True)
    for slug, body in METHODS.items():
        base = "" if slug == "plain_layer" else "(Method)"
        card = (
            f"    card = Card(slug={slug!r}, name={slug!r}, kind='method', family='steering', form='method', "
            "target='vlm', paper='', summary='')\n"
        )
        text = HEAD + f"@dataclass(eq=False)\nclass {slug.title()}{base}:\n"
        text += textwrap.indent(textwrap.dedent(body), "    ") + card
        (package / "steering" / f"{slug}.py").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(package.parent)
        yield package


def one(text, root):
    (method,) = load(text, root)
    return method


def test_methods_in_order_with_their_options(root):
    stack = load(" fastervlm ( keep = 0.25 )+var", root)
    assert isinstance(stack, Stack) and isinstance(stack, tuple)
    assert [m.card.slug for m in stack] == ["fastervlm", "var"]
    assert (stack[0].keep, stack[1].p) == (0.25, 0.6)


@pytest.mark.parametrize(
    ("written", "name", "value"),
    [
        ("p=1", "p", 1.0),
        ("p=1e-4", "p", 0.0001),
        ("p=.5", "p", 0.5),
        ("scale=-1e+300", "scale", -1e300),
        ("scale=inf", "scale", float("inf")),
        ("scale=3", "scale", 3.0),
        ("scale=none", "scale", None),
        ("layers=-3", "layers", -3),
        ("hard=true", "hard", True),
        ("hard=False", "hard", False),
        ("mode=code", "mode", "code"),
        (
            "text=text.25%:75%.self|vision.-2.self|text.*.self",
            "text",
            "text.25%:75%.self|vision.-2.self|text.*.self",
        ),
        ("text=8:24", "text", "8:24"),
        ("text='a+b, \"c\" \\'d\\' # e'", "text", "a+b, \"c\" 'd' # e"),
        ('text="two\\nlines \\\\ n"', "text", "two\nlines \\ n"),
        ('text="true"', "text", "true"),
        ("either=last", "either", "last"),
        ("either=7", "either", 7),
        ("share=7", "share", 7),  # a count stays a count
        ("heads=[0, 3]", "heads", (0, 3)),
        ("heads=[]", "heads", ()),
        ("pairs=[[1, 2], [3, .5]]", "pairs", ((1, 2.0), (3, 0.5))),
        ("span=[4,5]", "span", (4, 5)),
        ("names=[a, 'b c']", "names", ["a", "b c"]),
        ("table={a: 1, 'b.c': 2}", "table", {"a": 1.0, "b.c": 2.0}),
        ("by_layer={3: [0, 1], 12: []}", "by_layer", {3: (0, 1), 12: ()}),
        (
            "sites={observe: vision.-2.self, weights:text.8:24.self}",
            "sites",
            {"observe": "vision.-2.self", "weights": "text.8:24.self"},
        ),
        ("sites=[text.1.self, text.2.self]", "sites", ("text.1.self", "text.2.self")),
        ("detector=[1, x]", "detector", (1, "x")),  # the annotation is for type checkers only
    ],
)
def test_values(root, written, name, value):
    found = getattr(one(f"var({written})", root), name)
    assert found == value
    assert type(found) is type(value)


def pointed(error):
    """What the caret underlines."""
    lines = str(error.value).splitlines()
    at = next(i for i, line in enumerate(lines) if line.strip() and not line.strip("\t ^"))
    start, width = lines[at].index("^"), lines[at].count("^")
    return lines[at - 1][start : start + width]


@pytest.mark.parametrize(
    ("text", "kind", "under", "said"),
    [
        ("fastrvlm(keep=0.25)+var", UnknownMethodError, "fastrvlm", "did you mean fastervlm?"),
        ("fastervlm+VAR", UnknownMethodError, "VAR", "did you mean var?"),
        (
            "fastervlm(kep=0.25)",
            OptionError,
            "kep",
            "did you mean keep? The options of fastervlm are sites, rows",
        ),
        ("var(derived=1)", OptionError, "derived", "no option"),
        ("var(p=high)", OptionError, "high", "high is not what p takes: float"),
        ("var(p=true)", OptionError, "true", "is not what p takes"),
        ("var(layers=2.5)", OptionError, "2.5", "int"),
        ("var(layers=true)", OptionError, "true", "int"),
        ("var(hard=1)", OptionError, "1", "bool"),
        ("var(mode=other)", OptionError, "other", "mode takes"),
        ("var(text=3)", OptionError, "3", "str"),
        ("var(span=[1, 2, 3])", OptionError, "[1, 2, 3]", "span"),
        ("var(heads=3)", OptionError, "3", "heads"),
        ("var(table={a: b})", OptionError, "{a: b}", "table"),
        ("fastervlm(keep=1.5)", OptionError, "1.5", "0.0 to 1.0 is allowed"),
        ("var + var(hard=true, p=0)", OptionError, "var", "leaves nothing"),
        ("demanding", OptionError, "demanding", "needs need"),
        ("plain_layer", StackError, "plain_layer", "Plain_Layer"),
        ("var(p=0.5, p=0.6)", StackError, "p", "given twice"),
        ("var(table={a: 1, a: 2})", StackError, "a", "given twice"),
        ("var(p=0.5 hard=true)", StackError, "h", "')' or ',' is wanted here"),
        ("var(0.5)", StackError, "0", "The name of an option"),
        ("var(p:1)", StackError, ":", "'=' is wanted"),
        ("var(p=1+2)", StackError, "+", "wanted"),
        ("var(p=__import__('os'))", StackError, "(", "wanted"),
        ("var(table={b.c: 2})", StackError, ".", "':' is wanted"),
        ("var fastervlm", StackError, "f", "'+' is wanted"),
        ("var++var", StackError, "+", "name of a method"),
        ("(var)", StackError, "(", "name of a method"),
        ("var(text='abc)", StackError, "'", "does not end"),
        ("var(p=<Tool>)", StackError, "<", "A value is wanted"),
        ("var(pairs=[[[[[[[[[[[1]]]]]]]]]]])", StackError, "[", "nested too deeply"),
    ],
)
def test_errors_point_at_the_place(root, text, kind, under, said):
    with pytest.raises(kind) as error:
        load(text, root)
    assert type(error.value) is kind
    assert pointed(error) == under
    assert said in str(error.value)


@pytest.mark.parametrize(
    "text", ["", "  ", "# nothing", "var+", "var(", "var(p", "var(p=", "var(p=1", "var(heads=[1,"]
)
def test_a_stack_that_ends_too_soon_is_pointed_at_its_end(root, text):
    with pytest.raises(StackError, match="but the stack ends") as error:
        load(text, root)
    _, line, carets = str(error.value).splitlines()[:3]
    assert carets.index("^") == len(line)


def test_the_caret_stands_right_in_a_later_line(root):
    with pytest.raises(OptionError) as error:
        load("fastervlm\n\tvar(p=9)  # too much", root)
    assert "    \tvar(p=9)  # too much\n    \t      ^\n" in str(error.value)


def test_the_notation_leaves_defaults_out(root):
    text = "fastervlm + var( p = 0.6, layers=3, text='a b', hard=true ) + var"
    assert str(load(text, root)) == 'fastervlm+var(layers=3, hard=true, text="a b")+var'


def test_equality_is_by_options(root):
    assert load("var(p=0.5)+var", root) == load("var( p=.5 ) + var(p=0.6)", root)
    assert hash(load("var(p=0.5)", root)) == hash(load("var(p=.5)", root))
    assert load("var", root) != load("var+var", root)
    assert load("var", root) != load("var(p=0.5)", root)
    assert load("var", root) != tuple(load("var", root))


def test_files_may_have_lines_and_comments(root, tmp_path):
    path = tmp_path / "mine.stack"
    path.write_text(
        "# first\nfastervlm(\n  keep=0.25,  # a quarter\n  rows='#'\n)\n\n+ var\nvar(p=0.5)+var # last\n"
    )
    for where in (path, str(path)):
        stack = load(where, root)
        assert str(stack) == 'fastervlm(rows="#", keep=0.25)+var+var(p=0.5)+var'


def test_a_saved_stack_comes_back(root, tmp_path):
    stack = load("fastervlm(keep=0.25)+var(text='a # b', by_layer={3: [0]})", root)
    stack.save(tmp_path / "mine.txt", root)
    assert load(tmp_path / "mine.txt", root) == stack
    assert len((tmp_path / "mine.txt").read_text().splitlines()) == 2


def test_what_would_not_come_back_is_not_saved(root, tmp_path):
    var = type(one("var", root))
    for method, said in ((var(tool=object()), "tool=<object>"), (var(text=3), "text"), (var(tool=[1]), "")):
        with pytest.raises(SaccadeError, match="cannot be saved") as error:
            Stack([method]).save(tmp_path / "no.stack", root)
        assert said in str(error.value)
    assert not (tmp_path / "no.stack").exists()


def test_files_that_cannot_be_read(root, tmp_path):
    with pytest.raises(StackError, match=r"missing\.stack"):
        load("missing.stack", root)
    (tmp_path / "bytes.stack").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(StackError, match="text file"):
        load(tmp_path / "bytes.stack", root)
    (tmp_path / "bad.stack").write_text("var\nvar(p=x)\n")
    with pytest.raises(OptionError, match=r"bad\.stack, line 2: var: x is not"):
        load(Path(tmp_path / "bad.stack"), root)


texts = st.text(max_size=12) | st.sampled_from(
    ["true", "none", "inf", "1e5", "-2", "text.8:24.self", "a|b", "[", "'"]
)
numbers = st.floats(allow_nan=False)
options = st.fixed_dictionaries(
    {},
    optional={
        "p": st.floats(0, 1),
        "layers": st.integers(-(10**30), 10**30),
        "hard": st.booleans(),
        "mode": st.sampled_from(["paper", "code"]),
        "text": texts,
        "scale": st.none() | numbers,
        "either": st.integers() | texts,
        "pairs": st.lists(st.tuples(st.integers(), numbers), max_size=3).map(tuple),
        "names": st.lists(texts, max_size=3),
        "table": st.dictionaries(texts, numbers, max_size=3),
        "by_layer": st.dictionaries(
            st.integers(), st.lists(st.integers(), max_size=2).map(tuple), max_size=3
        ),
        "sites": texts
        | st.lists(texts, max_size=3).map(tuple)
        | st.dictionaries(st.sampled_from(EVENTS), texts, max_size=3),
        "heads": st.none() | st.lists(st.integers(), max_size=3).map(tuple),
    },
)


@given(st.lists(options, min_size=1, max_size=3))
def test_every_stack_reads_back_as_itself(root, given_options):
    var = type(one("var", root))
    stack = Stack(var(**o) for o in given_options if not (o.get("hard") and o.get("p") == 0)) or load(
        "var", root
    )
    again = load(str(stack), root)
    assert again == stack
    assert str(again) == str(stack)


@given(st.text(alphabet="var(p=0.5,heads[1])+{}:'\"\\# \n|%-", max_size=40))
def test_no_text_does_worse_than_an_error_of_ours(root, text):
    try:
        stack = load(text, root)
    except SaccadeError as error:
        assert "^" in str(error)
    else:
        assert load(str(stack), root) == stack
