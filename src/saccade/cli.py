"""The command line. Listing imports nothing heavy; what runs a model imports it inside its handler."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import os
import shutil
import sys
import textwrap
import warnings
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saccade import catalog
from saccade.core.errors import InputError, SaccadeError, nearest, plainly

if TYPE_CHECKING:
    from PIL.Image import Image

    from saccade.catalog import Entry, Option
    from saccade.core.question import Answer
    from saccade.core.record import Recording
    from saccade.stack import Stack

WIDEST = 100
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
BENCH = {
    "model": (),
    "with": (),
    "task": (),
    "out": "",
    "limit": None,
    "seed": 0,
    "batch": 32,
    "jobs": 1,
    "timing": False,
    "dtype": None,
    "device": None,
}
KINDS = {
    "limit": int,
    "seed": int,
    "batch": int,
    "jobs": int,
    "timing": bool,
}  # of these, the others are words


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        code: int = (args.run if args.debug else plainly(args.run))(args)
        sys.stdout.flush()  # a closed pipe shows here, not while the interpreter leaves
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="saccade",
        description="See, steer and reduce attention in any transformer.",
        epilog="Start with `saccade demo`; `saccade COMMAND --help` shows an example of each command.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(
        name: str, run: Any, about: str, example: str, among: Any = commands
    ) -> argparse.ArgumentParser:
        sub = among.add_parser(
            name,
            help=about,
            description=about,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        sub.set_defaults(run=run)
        return sub

    listing = command(
        "methods", _methods, "List or search the catalogue.", "saccade methods object hallucination"
    )
    listing.add_argument("words", nargs="*", metavar="WORDS", help="what to search for; nothing lists all")
    listing.add_argument("--family", choices=catalog.FAMILIES, metavar="F", help=", ".join(catalog.FAMILIES))
    listing.add_argument("--json", action="store_true", help="the cards as JSON")

    show = command("show", _show, "Explain one method: its card, equation and options.", "saccade show var")
    show.add_argument("slug", metavar="SLUG")

    look = command(
        "look",
        _look,
        "Show where a model looks while it answers.",
        'saccade look table.jpg --ask "What is on the table?" --with var -o look.html',
    )
    look.add_argument("images", nargs="+", metavar="IMAGE")
    look.add_argument("--ask", required=True, metavar="QUESTION", dest="question")
    look.add_argument(
        "--word", metavar="W", help="for this word of the answer or question (default: the answer)"
    )
    look.add_argument("--plain", action="store_true", help="draw in the terminal (also when there is no -o)")
    look.add_argument(
        "-o",
        "--out",
        metavar="FILE",
        help="page to look around in (.html; with a stack both runs), overlay (.png, .jpg) or recording (.safetensors)",
    )

    ask = command(
        "ask",
        _ask,
        "Ask about an image.",
        'saccade ask table.jpg "Is there a cup?" --with "var(p=0.4)" --compare',
    )
    ask.add_argument("image", metavar="IMAGE")
    ask.add_argument("question", metavar="QUESTION")
    ask.add_argument("--compare", action="store_true", help="answer without the stack too")

    experiment = command(
        "run", _run, "Run an experiment of the catalogue.", 'saccade run "attention_iou(correlation=0.9)"'
    )
    experiment.add_argument("stack", metavar="EXPERIMENT", help="its slug, with options in brackets")

    doctor = command(
        "doctor",
        _doctor,
        "Say what is reachable in a model, and what each method would miss.",
        "saccade doctor llava-hf/llava-1.5-7b-hf --dtype bfloat16",
    )
    doctor.add_argument("model", metavar="MODEL", help="embedded, folder or hub id")
    doctor.add_argument("--json", action="store_true", help="the diagnosis as JSON")
    doctor.add_argument("--no-pass", action="store_true", help="do not run the model")

    bench = command(
        "bench",
        _bench,
        "Ask models under stacks, and bare, what tasks ask; the same command goes on where it was cut off.",
        "saccade bench --model world/vlm --with var 'fastervlm(keep=0.25)' --task world/questions --out runs",
    )
    bench.add_argument("--model", action="extend", nargs="+", metavar="M", help="embedded, folder or hub id")
    bench.add_argument(
        "--with", action="extend", nargs="+", metavar="STACK", help='joined by "+", or a .stack file'
    )
    bench.add_argument("--task", action="extend", nargs="+", metavar="T", help="such as world/questions")
    bench.add_argument("--out", metavar="DIR", help="where rows are kept")
    bench.add_argument("--limit", type=int, metavar="N", help="pictures, or texts (500)")
    bench.add_argument("--seed", type=int, metavar="N", help="of what is asked (0)")
    bench.add_argument("--batch", type=int, metavar="N", help="questions at a time (32)")
    bench.add_argument("--jobs", type=int, metavar="N", help="processes, each with the model (1)")
    bench.add_argument(
        "--timing", action="store_true", default=None, help="time a few samples, in turn with the bare model"
    )
    bench.add_argument(
        "--config", metavar="FILE", help="YAML with these options by name; the line's own go first"
    )
    bench.add_argument("--json", action="store_true", help="the results as JSON")

    results = command(
        "results",
        _results,
        "Tell what a folder's rows came to, beside the bare model.",
        "saccade results runs --markdown",
    )
    results.add_argument("out", metavar="DIR", help="that `saccade bench` wrote")
    forms = results.add_mutually_exclusive_group()
    for form in ("markdown", "csv", "json"):
        forms.add_argument(f"--{form}", dest="form", action="store_const", const=form, default="plain")
    forms.add_argument("--html", metavar="FILE", help="a page with plots, which needs no network")

    calibrate = command(
        "calibrate",
        _calibrate,
        "Choose a constant of a method, on calibration pictures, which no result is told of.",
        "saccade calibrate vhr --task world/captions --option alpha --values 1.5 2 3",
    )
    calibrate.add_argument("stack", metavar="STACK", help='methods joined by "+", or a .stack file')
    calibrate.add_argument("--task", required=True, metavar="T", help="asked on its calibration split")
    calibrate.add_argument("--option", metavar="NAME", help="(default: the method's strength)")
    calibrate.add_argument("--values", nargs="+", metavar="V", help="(default: a grid within its bounds)")
    calibrate.add_argument("--score", metavar="NAME", help="to choose by (default: the task's first)")
    calibrate.add_argument(
        "--out", default="calibration", metavar="DIR", help="for rows, choice and curve (%(default)s)"
    )
    calibrate.add_argument("--limit", type=int, default=200, metavar="N", help="pictures (%(default)s)")
    calibrate.add_argument("--seed", type=int, default=0, metavar="N", help="of what is asked (%(default)s)")
    calibrate.add_argument(
        "--batch", type=int, default=32, metavar="N", help="questions at a time (%(default)s)"
    )

    about = "The embedded world: drawn scenes, and what is true of them."
    parts = commands.add_parser("world", help=about, description=about)
    sheet = command(
        "sheet",
        _world_sheet,
        "Draw a page of scenes with their boxes, captions, questions and answers.",
        "saccade world sheet -o sheet.png --split broken",
        parts.add_subparsers(metavar="COMMAND", required=True),
    )
    sheet.add_argument("-o", "--out", required=True, metavar="FILE", help=f"picture ({', '.join(PICTURES)})")
    sheet.add_argument("--seed", type=int, default=0, metavar="N", help="of the first scene (%(default)s)")
    sheet.add_argument("--count", type=int, default=12, metavar="N", help="scenes (%(default)s)")
    sheet.add_argument(
        "--split", default="test", metavar="S", help="train, calibration, test, broken (%(default)s)"
    )

    for sub in (look, ask, doctor, bench, calibrate):
        model = sub.add_argument_group("model").add_argument
        if sub in (look, ask):
            sub.add_argument("--with", dest="stack", metavar="STACK", help='joined by "+", or a .stack file')
        if sub in (look, ask, calibrate):
            model(
                "--model", default="world/vlm", metavar="M", help="embedded, folder or hub id (%(default)s)"
            )
        model(
            "--dtype",
            metavar="T",
            help="float32, bfloat16, float16 (default: the model's own; no float16 on a CPU)",
        )
        model("--device", metavar="D", help="cpu, cuda, cuda:1, mps (default: what there is)")
        model("--trust-remote-code", action="store_true", help="run code that comes with the model")

    command("demo", _demo, "See it work on the embedded model, in a minute.", "saccade demo")
    return parser


# ---- commands


def _methods(args: argparse.Namespace) -> int:
    words = " ".join(args.words)
    found = catalog.methods(words, args.family)
    if args.json:
        print(json.dumps([dataclasses.asdict(card) for card in found], indent=2, ensure_ascii=False))
    elif found:
        print(catalog.table(found, _width(), _bold))
    else:
        near = nearest(words.lower(), (card.slug for card in catalog.cards()))
        asked = " in ".join(filter(None, [words, args.family])) or "everything"
        print(f"No method is found for {asked}{f': {near}' if near else '.'}", file=sys.stderr)
    return 0 if found else 1


def _show(args: argparse.Namespace) -> int:
    entry = catalog.entry(args.slug)
    card = entry.card
    facts = {
        "kind": f"{card.kind}, {card.family}" + (f", {card.form}" if card.form != card.kind else ""),
        "for": card.target,
        "needs": ", ".join(card.needs),
        "trains": card.trains,
        "neutral": ", ".join(f"{key}={value!r}" for key, value in card.neutral.items()),
        "paper": card.paper,
        "code": card.code,
        "headline": card.headline,
        "sure": {"known": "as published", "abstract": "part of it is a reconstruction"}[card.sure],
        "tags": ", ".join(card.tags),
    }
    print(f"{_bold(card.name)}  {card.slug}\n{_filled(card.summary)}\n")
    for name, fact in facts.items():
        if fact:
            print(_filled(f"{name:<10}{fact}", "  ", " " * 12))
    for choice in card.choices:
        print(_filled(f"{'choice':<10}{choice}", "  ", " " * 12))
    print("\n" + "\n\n".join(map(_paragraph, entry.description.split("\n\n"))))
    own = [option for option in entry.options if option.owner != "Method"]
    for title, options in (
        ("Options", own),
        ("Options of every method", [option for option in entry.options if option.owner == "Method"]),
    ):
        if options:
            print(f"\n{_bold(title)}")
            for option in options:
                print(_described(option))
    print(f"\n{_bold('Use')}\n  {_use(entry, own)}")
    if measured := _measured(card.slug):
        print(f"\n{_bold('Measured')}\n{measured}")
    return 0


def _measured(slug: str) -> str:
    """The published figures, a block for every setting and task."""
    from saccade.bench import figures

    lines: list[str] = []
    for (model, stack, task), rows in groupby(figures.of(slug), lambda row: row[:3]):
        lines += [f"  {stack} on {model}, {task}", *(f"    {'  '.join(row[3:])}".rstrip() for row in rows)]
    return "\n".join(lines)


def _described(option: Option) -> str:
    default = f" = {option.default}" if option.default else ""
    limits = f"; {option.limits}" if option.limits else ""
    head = _filled(f"{option.name}: {option.annotation}{default}{limits}", "  ", " " * 6)
    return f"{head}\n{_filled(option.doc, '      ', '      ')}" if option.doc else head


def _use(entry: Entry, options: list[Option]) -> str:
    """A stack with the first option that the notation can write."""
    from saccade.stack import written_value

    stack = entry.card.slug
    for option in options:
        try:
            value = written_value(ast.literal_eval(option.default))
        except (ValueError, SyntaxError):
            continue
        stack += f"({option.name}={value})"
        break
    ask = f"saccade ask IMAGE \"...\" --with '{stack}'\n  "
    return {
        "method": f"{ask}sc.attach(model, sc.load({stack!r}))",
        "driver": f"{ask}sc.ask(model, processor, image, question, stack={stack!r})",
        "experiment": f"saccade run '{stack}'\n  sc.{entry.class_name}().run()",
    }[entry.card.kind]


def _look(args: argparse.Namespace) -> int:
    suffix = _suffix(args.out, *PICTURES, ".safetensors", ".html") if args.out else ""
    images, stack = [_image(path) for path in args.images], _stack(args.stack)
    from saccade import looking

    model, processor = _model(args)
    rows = "after_image" if suffix == ".html" else "generated"  # a page shows the words of the question too

    def look(stack: Stack | None) -> Recording:
        seen = looking.look(model, processor, images, args.question, stack=stack, rows=rows)
        opened = seen.sharpest() if suffix == ".html" else None  # where a page opens
        for word in [args.word] if args.word else dict.fromkeys((None, opened)):
            try:
                looking.weigh(model, processor, images, seen, word, stack)
            except SaccadeError as e:
                print(f"How faithful the map is was not measured: {e}", file=sys.stderr)
        return seen

    recording = look(stack)
    if args.plain or not args.out:
        print(recording.plain(args.word, _width(), colour=_colour()))
    else:
        print(recording.answer())
    if suffix == ".safetensors":
        recording.save(args.out)
    elif suffix == ".html":
        bare, beside = (look(None), recording) if stack else (recording, None)
        _write(bare.page(beside, args.word), args.out)
    elif args.out:
        _write(recording.overlay(args.word), args.out)
    return 0


def _suffix(path: str, *known: str) -> str:
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in known:
        raise InputError(
            f"{path}: this kind of file cannot be written.",
            f"Use {', '.join(known[:-1])} or {known[-1]}.",
        )
    return suffix


def _write(made: Image | str, path: str) -> None:
    try:
        if isinstance(made, str):
            Path(path).write_text(made, "utf-8")
        else:
            made.save(path)
    except OSError as e:
        problem = f"{path} cannot be written: {e.strerror or e}."
        raise InputError(problem, "Give a path in a folder of yours.") from e


def _ask(args: argparse.Namespace) -> int:
    image, stack = _image(args.image), _stack(args.stack)
    if args.compare and not stack:
        raise InputError("There is nothing to compare with.", 'Give a stack, as in: --compare --with "var"')
    from saccade import looking

    model, processor = _model(args)

    def answer(stack: Stack | None) -> Answer:
        return looking.ask(model, processor, image, args.question, stack=stack)

    if not args.compare:
        said = answer(stack)
        print(said.strip())
        for found in said.found.values():
            if dataclasses.is_dataclass(found):  # what a probe tells, beside a driver's tensors and boxes
                print(f"\n{found!r}")
        return 0
    for title, chosen in (("without", None), (f"with {stack}", stack)):
        print(f"{_bold(title)}\n{_filled(answer(chosen).strip(), '  ', '  ')}")
    return 0


def _run(args: argparse.Namespace) -> int:
    from saccade.core.driver import Experiment
    from saccade.stack import load

    (part, *_) = load(args.stack)
    if not isinstance(part, Experiment):
        remedy = f"Ask with it: saccade ask IMAGE QUESTION --with '{args.stack}'."
        raise InputError(f"{args.stack} is no experiment.", remedy)
    print(repr(part.run()))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from saccade import loading
    from saccade.examining.examination import doctor

    model, processor = loading.load_model(
        args.model, args.dtype, args.device, args.trust_remote_code, any_kind=True
    )
    diagnosis = doctor(model, processor, run=not args.no_pass)
    print(diagnosis.json() if args.json else diagnosis.plain(_width()))
    return 0 if diagnosis.healthy else 1


def _bench(args: argparse.Namespace) -> int:
    given = {name: value for name in BENCH if (value := vars(args)[name]) is not None}
    options = BENCH | (_config(args.config) if args.config else {}) | given
    for name in ("model", "task", "out"):
        if not options[name]:
            raise InputError(f"There is no {name}.", f"give --{name}, or {name} in --config")
    from saccade.bench.runner import bench

    models, stacks, tasks, out = (options.pop(name) for name in ("model", "with", "task", "out"))
    found = bench(models, stacks, tasks, out, trust_remote_code=args.trust_remote_code, **options)
    print(found.json() if args.json else found.plain(_width()))
    return 0


def _config(path: str) -> dict[str, Any]:
    import yaml

    try:
        found = yaml.safe_load(Path(path).read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise InputError(f"{path} cannot be read: {e}.", "give a YAML file") from e
    if not isinstance(found, dict):
        raise InputError(f"{path} has no options by name.", "as in: `model: world/vlm`")
    for name, value in found.items():
        if name not in BENCH:
            near = nearest(str(name), BENCH) or f"use {', '.join(BENCH)}"
            raise InputError(f"{path}: there is no option {name!r}.", near)
        kinds: Any = KINDS.get(name, str)
        several = isinstance(value, list) and BENCH[name] == ()
        if not all(isinstance(one, kinds) for one in (value if several else [value])):
            raise InputError(f"{path}: {name} is {value!r}.", f"give {kinds.__name__} there")
    return found


def _results(args: argparse.Namespace) -> int:
    from saccade.bench.results import Results

    found = Results.read(Path(args.out))
    if not found:
        print(f"There are no rows in {args.out}.", file=sys.stderr)
        return 1
    if args.html:
        from saccade.bench.page import page

        _write(page(found), args.html)
        return 0
    made = found.plain(_width()) if args.form == "plain" else getattr(found, args.form)()
    print(made.rstrip("\n"))
    return 0


def _calibrate(args: argparse.Namespace) -> int:
    from saccade.bench.calibrate import calibrate

    names = ("stack", "model", "task", "option", "values", "score", "out", "limit", "seed", "batch")
    model = {name: vars(args)[name] for name in ("dtype", "device", "trust_remote_code")}
    choice = calibrate(**{name: vars(args)[name] for name in names}, **model)
    name = Path(args.out) / f"{choice.slug}-{choice.option}"
    print(f"{choice!r}\n\nUse it: --with '{choice.stack}', or --with {name}.stack\nThe curve: {name}.svg")
    return 0


def _demo(args: argparse.Namespace) -> int:
    from saccade import demonstration

    demonstration.demo()
    return 0


def _world_sheet(args: argparse.Namespace) -> int:
    _suffix(args.out, *PICTURES)
    from saccade.world.sheet import sheet

    _write(sheet(args.count, args.split, args.seed), args.out)
    return 0


def _model(args: argparse.Namespace) -> tuple[Any, Any]:
    from saccade import looking

    return looking.load_model(
        args.model, dtype=args.dtype, device=args.device, trust_remote_code=args.trust_remote_code
    )


def _stack(text: str | None) -> Stack | None:
    from saccade.stack import load

    return load(text) if text is not None else None


def _image(path: str) -> Image:
    from PIL import Image, ImageOps

    huge = (Image.DecompressionBombError, Image.DecompressionBombWarning)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return ImageOps.exif_transpose(image).convert("RGB")
    except huge as e:
        raise InputError(f"{path} is too large a picture: {e}", "Make it smaller.") from e
    except (OSError, ValueError) as e:
        raise InputError(f"The image cannot be read: {e}.", "Give the path of a picture file.") from e


# ---- print


def _width() -> int:
    return min(WIDEST, shutil.get_terminal_size().columns)


def _bold(text: str) -> str:
    return f"\033[1m{text}\033[0m" if _colour() else text


def _colour() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def _filled(text: str, first: str = "", rest: str = "") -> str:
    """Links and names stay whole."""
    return textwrap.fill(
        text,
        _width(),
        initial_indent=first,
        subsequent_indent=rest,
        break_on_hyphens=False,
        break_long_words=False,
    )


def _paragraph(text: str) -> str:
    """Prose is filled; what is indented, an equation or a table, stays as it was written."""
    return text if any(line.startswith(" ") for line in text.splitlines()) else _filled(text)
