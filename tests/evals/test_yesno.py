"""Yes or no, on answers that were judged by hand by the rule of POPE, and on random ones."""

from __future__ import annotations

import math
import random

import pytest

from saccade.core.errors import InputError
from saccade.evals import yesno
from saccade.evals.task import Row, Sample

# Judged by hand: is one of the words no, No and not in the first sentence, by itself between spaces?
NO = """
no
No
no.
No.
No, there is no cup.
No, it is not.
no , it is red
There is no cup
There is no cup in the image.
there is not a cup here
It is not there.
I do not see a cup
I can not see any. Yes, perhaps.
No cups
no cup, no table
Yes and no
Yes, there is no doubt
yes, no question
Yes, but not a red one.
not
Not a cup, not a mug
certainly not
absolutely not, sir
The answer is no.
The answer is no, as far as I see
the answer is "yes", not more
I am not sure
Maybe, maybe not
There are two cups, no more
two cups and no table
No visible cup
no,
no, no, no
,no
n,o
Oh no
  no
no   yes
No one is there
no.5
Not really, no
Is it there? no
I have no idea
there is no  cup
Unfortunately no
yes, not no
it is not, I think.
No; not one
Yes! No.
no cup : none
assistant : no
""".strip("\n").split("\n")

YES = """
yes
Yes
YES
yes.
Yes.
Yes, there is.
Yes, there is a cup.
yes , it is red
(Yes)
yes!
Yes. No.
Yes. There is no doubt.
Yes. It is not a mug
A cup is on the table, yes
of course yes
yes, yes, yes
Yes, nothing is missing
Yes, it is known
Yes, and a notebook
YES, NO DOUBT
Yes, none but one
I say yes
yes\tindeed, yes
The answer is yes.
yes nos.
Yes: no-one
yes "no"
Yes, it isn't hidden
.no, yes
yes or no?
yes-no yes
""".strip("\n").split("\n")

# Yes by the rule, though they do not say so.
ASSUMED = """
There is a cup
There are two cups.
I see a cup and a table
a notebook, nothing else

.
,
...
. No.
cup
a cup
maybe
It isn't there
I don't think so
There isn't one. No.
nope
none
nothing
No!
"no"
no?
(no)
no-one
nobody is there
It cannot be seen
neither
never
1
0
false
yep
Yeah, sure
""".strip("\n").split("\n")

CASES = (
    [(t, "no", False) for t in NO] + [(t, "yes", False) for t in YES] + [(t, "yes", True) for t in ASSUMED]
)
assert len(CASES) >= 110


@pytest.mark.parametrize(("text", "answer", "assumed"), CASES)
def test_an_answer_is_read_by_the_official_rule(text: str, answer: str, assumed: bool) -> None:
    assert yesno.parse(text) == answer
    assert bool(yesno.scores([_row(text, "yes", 0)])["assumed"].value) == assumed


@pytest.mark.parametrize(("text", "answer"), [("NO", "yes"), ("no\n", "yes"), ("No.\nYes", "no")])
def test_what_the_rule_does_not_see(text: str, answer: str) -> None:
    """Capitals and lines are not split off by it."""
    assert yesno.parse(text) == answer


def test_scores_of_ten_answers_counted_by_hand() -> None:
    rows = [_row(*case, picture) for picture, case in enumerate(
        [("Yes", "yes"), ("Yes, there is no doubt", "yes"), ("", "yes"), ("A cup.", "yes"),
         ("no", "no"), ("There is not.", "no"), ("", "no"), ("Yes", "no"), ("No", "yes"), ("no , no", "no")]
    )]  # fmt: skip
    found = yesno.scores(rows)  # 3 hits, 2 false, 2 missed, 3 rejected; 3 are assumed
    assert {name: estimate.value for name, estimate in found.items()} == pytest.approx(
        {"accuracy": 0.6, "precision": 0.6, "recall": 0.6, "f1": 0.6, "yes": 0.5, "assumed": 0.3}
    )
    assert [found[name].count for name in ("accuracy", "precision", "recall", "f1", "assumed")] == [
        10,
        5,
        5,
        10,
        10,
    ]


@pytest.mark.parametrize("seed", range(20))
def test_random_answers_agree_with_a_plain_scorer(seed: int) -> None:
    draw = random.Random(seed)
    words = ["yes", "no", "No", "Yes", "not", "cup,", "no,", "is.", ".", "NO", "nothing", ""]
    pairs = [
        (" ".join(draw.choices(words, k=draw.randrange(6))), draw.choice(["yes", "no"])) for _ in range(200)
    ]
    found = yesno.scores([_row(text, truth, i // 6) for i, (text, truth) in enumerate(pairs)])
    for name, value in _plainly(pairs).items():
        assert found[name].value == pytest.approx(value)
        assert found[name].low <= value <= found[name].high


def _plainly(pairs: list[tuple[str, str]]) -> dict[str, float]:
    """Counted one by one, with sentences cut by hand."""
    said = []
    for text, _ in pairs:
        first = ""
        for letter in text:
            if letter == ".":
                break
            first += "" if letter == "," else letter
        tokens = first.split(" ")
        said.append(not any(token in tokens for token in ("No", "not", "no")))
    truths = [truth == "yes" for _, truth in pairs]
    tp = sum(1 for a, b in zip(said, truths) if a and b)
    precision, recall = tp / said.count(True), tp / truths.count(True)
    return {
        "accuracy": sum(1 for a, b in zip(said, truths) if a == b) / len(pairs),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall),
        "yes": said.count(True) / len(said),
    }


def test_without_a_yes_there_is_no_precision() -> None:
    found = yesno.scores([_row("no", "yes", 0), _row("no", "no", 1)])
    assert math.isnan(found["precision"].value) and found["f1"].value == 0
    assert found["recall"].value == 0 and found["accuracy"].value == 0.5


def test_no_answers_are_refused() -> None:
    with pytest.raises(InputError, match="no answers"):
        yesno.scores([])


def _row(text: str, truth: str, picture: int) -> Row:
    return Sample("0", (), "is there a cup ?", truth, picture=str(picture)), text
