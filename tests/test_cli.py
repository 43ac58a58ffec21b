"""The command line: what it prints, what it returns, what it imports."""

import json
import os
import shlex
import struct
import subprocess
import sys
import zlib
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from PIL import Image

from saccade import catalog, cli, stack
from saccade.core.errors import SaccadeError
from saccade.core.question import Answer
from saccade.stack import load

DIM = '''"""Dim the sink, over a line that is so long that it has to be folded on a terminal.

    a <- p a     for the first token; this line stays although it is longer than eighty

Someone (2025).
"""

from dataclasses import dataclass

from saccade.core.card import Card
from saccade.core.method import Method, option


@dataclass(eq=False)
class Dim(Method):
    finder: object = option(len, "finds the sink")
    p: float = option(0.5, "share that is kept", low=0.0, high=1.0)
    sites: str = option("text.*.self", "where")

    card = Card(
        slug="dim",
        name="DIM",
        kind="method",
        family="steering",
        form="method",
        target="vlm",
        paper="Dim It (Someone, 2025)",
        summary="Take attention from the sink, so that the image of a cup and a table is seen again.",
        neutral={"p": 1.0},
        choices=("The paper says 0.4 and the code 0.5: the code wins.",),
        tags=("sink",),
    )
'''


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli") / "cli_house"
    (root / "steering").mkdir(parents=True)
    (root / "steering" / "dim.py").write_text(DIM)
    (root / "probes").mkdir()
    rollout = DIM.replace('"dim"', '"rollout"').replace("steering", "probes").replace("Dim(", "Rollout(")
    (root / "probes" / "rollout.py").write_text(rollout.replace("sink", "flow"))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(root.parent)
        for module, names in (
            (catalog, ("entries", "cards", "entry", "load_class", "load_named", "methods")),
            (stack, ("load",)),
        ):
            for name in names:
                function = getattr(module, name)
                defaults = (*function.__defaults__[:-1], root)
                patch.setattr(function, "__defaults__", defaults)
        yield root


@pytest.fixture
def run(house, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")

    def run(*argv):
        code = cli.main(list(argv))
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_methods_fit_in_eighty_columns(run):
    code, out, _ = run("methods")
    assert code == 0
    assert out.startswith("dim      steering  Take attention from the sink,")
    assert max(map(len, out.splitlines())) <= 80
    assert "\033" not in out


def test_methods_searches_and_narrows(run):
    assert [line.split()[0] for line in run("methods", "sinks")[1].splitlines() if line[0] != " "] == ["dim"]
    assert run("methods", "--family", "probes")[1].startswith("rollout  probes")
    code, out, err = run("methods", "rolloot")
    assert (code, out) == (1, "")
    assert "did you mean rollout?" in err


def test_methods_as_json_are_whole_cards(run):
    (card,) = json.loads(run("methods", "sink", "--json")[1])
    assert card["slug"] == "dim" and card["neutral"] == {"p": 1.0} and card["tags"] == ["sink"]


def test_show_tells_all(run):
    code, out, _ = run("show", "dim")
    assert code == 0
    lines = out.splitlines()
    for told in (
        "DIM  dim",
        "  paper     Dim It (Someone, 2025)",
        "  neutral   p=1.0",
        "  choice    The paper says 0.4 and the code 0.5: the code wins.",
        "    a <- p a     for the first token; this line stays although it is longer than eighty",
        "  p: float = 0.5; 0.0 to 1.0",
        "      share that is kept",
        "  rows: str | int = 'all'",
        "  sc.attach(model, sc.load('dim(p=0.5)'))",
    ):
        assert told in lines
    assert out.index("  p: float") < out.index("Options of every method") < out.index("  rows: str")
    assert out.count("  sites: ") == 1
    assert all(len(line) <= 80 for line in lines if "a <- p a" not in line)


def test_the_stack_that_show_offers_parses(run):
    out = run("show", "dim")[1]
    (method,) = load(out.split("--with '")[1].split("'")[0])
    assert method.p == 0.5


def test_errors_are_told_without_a_traceback(run):
    code, out, err = run("show", "dimm")
    assert (code, out) == (2, "")
    assert err == "saccade: No method is called 'dimm'.\n  → did you mean dim?\n"
    with pytest.raises(SaccadeError):
        run("show", "dimm", "--debug")


@pytest.mark.parametrize("command", ["methods", "show", "look", "ask", "doctor", "demo"])
def test_the_help_of_every_command_has_an_example(command, run, capsys):
    with pytest.raises(SystemExit) as leaving:
        cli.main([command, "--help"])
    assert leaving.value.code == 0
    out = capsys.readouterr().out
    assert f"example:\n  saccade {command}" in out
    example = next(line for line in out.splitlines() if line.startswith(f"  saccade {command}"))
    assert cli._parser().parse_args(shlex.split(example)[1:]).run


@pytest.mark.parametrize("argv", [[], ["metods"], ["look", "x.png"], ["methods", "--family", "none"]])
def test_wrong_usage_leaves_with_two(argv, capsys):
    with pytest.raises(SystemExit) as leaving:
        cli.main(argv)
    assert leaving.value.code == 2
    assert "usage: saccade" in capsys.readouterr().err


@dataclass
class Found:
    """What a probe tells."""

    layers: int


@pytest.fixture
def looking(monkeypatch, tmp_path):
    """Stands in for what runs a model, and keeps what it was asked."""
    asked = []

    def answer(model, processor, image, question, stack=None, max_new_tokens=64):
        asked.append((model, image.size, image.mode, question, str(stack)))
        said = Answer("A cup." if stack else "A cat and a table.")
        said.found = {"boxes": [1, 2], "flow": Found(3)}
        return said

    recording = SimpleNamespace(
        plain=lambda word=None, width=0, colour=False: f"[picture {width} of {word or 'all'}]",
        answer=lambda: "A cat and a table.",
        save=lambda path: asked.append(("save", path)),
        overlay=lambda word: SimpleNamespace(save=lambda path: asked.append((f"overlay of {word}", path))),
        page=lambda beside, word: f"<page of {word}{' beside another' if beside else ''}>",
        sharpest=lambda: 2,
    )

    def look(model, processor, images, question, stack=None, rows="generated"):
        asked.append((len(images), rows))
        answer(model, processor, images[0], question, stack)
        return recording

    def weigh(model, processor, images, seen, word, stack):
        asked.append((len(images), word, str(stack)))
        if word == "dog":
            raise SaccadeError("No word is 'dog'.", "see recording.words")

    fake = SimpleNamespace(
        ask=answer,
        look=look,
        weigh=weigh,
        load_model=lambda name, **flags: ((name, *flags.values()), "processor"),
        asked=asked,
    )
    monkeypatch.setitem(sys.modules, "saccade.looking", fake)
    monkeypatch.setattr(sys.modules["saccade"], "looking", fake, raising=False)
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    Image.new("L", (6, 4)).save(tmp_path / "cup.jpg", exif=exif)
    monkeypatch.chdir(tmp_path)
    return fake


def test_ask(run, looking):
    assert run("ask", "cup.jpg", "What?")[1] == "A cat and a table.\n\nFound(layers=3)\n"
    flags = ("--model", "m", "--dtype", "bfloat16", "--device", "cpu", "--trust-remote-code")
    assert run("ask", "cup.jpg", "What?", "--with", "dim(p=0.4)", *flags)[1].startswith("A cup.\n")
    assert looking.asked == [
        (("world/vlm", None, None, False), (4, 6), "RGB", "What?", "None"),
        (("m", "bfloat16", "cpu", True), (4, 6), "RGB", "What?", "dim(p=0.4)"),
    ]


def test_ask_compares(run, looking):
    out = run("ask", "cup.jpg", "What?", "--with", "dim", "--compare")[1]
    assert out == "without\n  A cat and a table.\nwith dim\n  A cup.\n"
    code, _, err = run("ask", "cup.jpg", "What?", "--compare")
    assert code == 2 and "nothing to compare with" in err


def test_look_draws_or_writes(run, looking):
    assert run("look", "cup.jpg", "--ask", "What?")[1] == "[picture 80 of all]\n"
    said = run("look", "cup.jpg", "--ask", "What?", "--word", "cat", "-o", "seen.png")[1]
    assert said == "A cat and a table.\n"
    drawn = run("look", "cup.jpg", "--ask", "What?", "--plain", "-o", "r.safetensors")[1]
    assert drawn == "[picture 80 of all]\n"
    assert [a for a in looking.asked if len(a) == 2] == [
        (1, "generated"),
        (1, "generated"),
        ("overlay of cat", "seen.png"),
        (1, "generated"),
        ("save", "r.safetensors"),
    ]


def test_look_writes_a_page(run, looking, tmp_path):
    page = tmp_path / "look.html"
    said = run("look", "cup.jpg", "cup.jpg", "--ask", "What?", "--word", "cat", "-o", "look.html")[1]
    assert said == "A cat and a table.\n" and page.read_text() == "<page of cat>"
    assert looking.asked[0] == (2, "after_image")
    run("look", "cup.jpg", "--ask", "What?", "--with", "dim", "-o", "look.html")
    assert page.read_text() == "<page of None beside another>"
    assert [a[-1] for a in looking.asked if len(a) == 5] == ["None", "dim", "None"]
    assert run("look", "cup.jpg", "--ask", "What?", "-o", "no/look.html")[0] == 2


def test_look_measures_what_it_shows(run, looking):
    weighed = [("cat",), (None,), (None, 2), (None, 2)]
    asked = ("--word cat", "", "-o look.html", "-o look.html --with dim")
    for given, words in zip(asked, weighed, strict=True):
        looking.asked.clear()
        assert run("look", "cup.jpg", "--ask", "What?", *given.split())[2] == ""
        stacks = ("dim", "None") if "dim" in given else ("None",)
        assert [a for a in looking.asked if len(a) == 3] == [(1, w, s) for s in stacks for w in words]
    code, _, err = run("look", "cup.jpg", "--ask", "What?", "--word", "dog")
    assert code == 0 and "was not measured: No word is 'dog'" in err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("ask", "none.jpg", "What?"), "none.jpg"),
        (("ask", "text.jpg", "What?"), "cannot be read"),
        (("ask", "half.png", "What?"), "cannot be read"),
        (("look", "huge.png", "--ask", "What?"), "huge.png is too large a picture"),
        (("look", "cup.jpg", "none.jpg", "--ask", "What?"), "none.jpg"),
        (("ask", "cup.jpg", "What?", "--with", "dimm"), "did you mean dim?"),
        (("ask", "cup.jpg", "What?", "--with", ""), "the stack ends"),
        (("look", "cup.jpg", "--ask", "What?", "-o", "seen.xyz"), "seen.xyz"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(run, looking, tmp_path, argv, said):
    (tmp_path / "text.jpg").write_text("not a picture")
    Image.effect_noise((64, 64), 50).save(tmp_path / "half.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "half.png").read_bytes()[:500])
    huge = bytearray((tmp_path / "half.png").read_bytes())
    huge[16:24] = struct.pack(">II", 10_000, 9_000)  # of 90 megapixels, says its head
    huge[29:33] = struct.pack(">I", zlib.crc32(huge[12:29]))
    (tmp_path / "huge.png").write_bytes(huge)
    looking.load_model = None
    code, _, err = run(*argv)
    assert code == 2
    assert said in err


def test_demo(run, monkeypatch):
    monkeypatch.setattr("saccade.demonstration.demo", lambda: print("the demo"))
    assert run("demo")[:2] == (0, "the demo\n")


def test_bold_only_on_a_terminal_that_wants_it(monkeypatch):
    assert cli._bold("x") == "x"
    monkeypatch.setattr(cli.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert cli._bold("x") == "\033[1mx\033[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert cli._bold("x") == "x"


def test_the_module_runs_as_a_process_without_torch():
    argv = [sys.executable, "-X", "importtime", "-m", "saccade", "methods"]
    done = subprocess.run(argv, capture_output=True, text=True, env=os.environ | {"COLUMNS": "80"})
    assert done.returncode in (0, 1)
    modules = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "saccade.catalog" in modules
    assert not modules & {"torch", "transformers", "numpy", "PIL"}


def test_a_closed_pipe_is_no_error():
    code = (
        "from saccade import catalog, cli; catalog.methods = lambda *_: [1]; "
        "catalog.table = lambda *_: 'x' * 10**6; raise SystemExit(cli.main(['methods']))"
    )
    line = f'{sys.executable} -c "{code}" | head -c 1'
    done = subprocess.run(line, shell=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("x", "")
