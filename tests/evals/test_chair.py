"""CHAIR on captions whose objects were found by hand, in words of COCO, and on random ones."""

from __future__ import annotations

import random

import pytest

from saccade.evals.chair import Chair
from saccade.evals.task import Row, Sample

NAMES = {
    "person": ["man", "woman", "child", "boy", "girl", "people", "rider"],
    "dog": ["puppy", "hound"],
    "bird": ["goose", "gull", "baby bird"],
    "mouse": [],
    "sheep": ["lamb"],
    "cow": ["ox", "calf"],
    "cup": ["mug"],
    "knife": [],
    "bus": ["minibus"],
    "couch": ["sofa"],
    "chair": ["seat", "stool"],
    "dining table": ["table", "desk"],
    "wine glass": [],
    "hot dog": [],
    "motorcycle": ["motorbike", "motor bike"],
    "traffic light": ["street light", "stoplight"],
    "toilet": ["toilet seat"],
    "train": ["locomotive"],
    "sports ball": ["ball"],
    "teddy bear": [],
    "bear": ["panda"],
    "skis": ["ski"],
    "scissors": [],
    "broccoli": [],
    "tv": [],
}
SYNONYMS = {word: name for name, words in NAMES.items() for word in [name, *words]} | {"train track": ""}
CHAIR = Chair(SYNONYMS, {"seat": "toilet"})

# caption | the objects that it names, each as often as it is named
CASES = r"""
a cup | cup
A Cup. | cup
A CUP | cup
two cups | cup
a mug | cup
Mugs! | cup
a cup and a cup | cup cup
a cup, a mug and cups | cup cup cup
there is no cup | cup
there is not a single dog | dog
no dogs, no cups | dog cup
nothing is here |
 |
. |
an empty room |
cupboard |
the cup's handle | cup
the dogs' bowl | dog
a dog-like thing |
a hotdog |
a hot dog | hot_dog
hot dogs | hot_dog
a hot, dog | dog
the dog is hot. dog | dog dog
a hot and tired dog | dog
hot hot dog | hot_dog
hot dog dog | hot_dog dog
a man | person
two men | person
women | person
a woman and her children | person person
people | person
a person with people | person person
children and child | person person
a puppy | dog
puppies | dog
hounds | dog
geese | bird
a goose | bird
gulls and geese | bird bird
mice | mouse
a mouse and mice | mouse mouse
sheep | sheep
lambs | sheep
oxen | cow
an ox | cow
calves | cow
a calf | cow
knives | knife
a knife | knife
buses | bus
a bus | bus
minibuses | bus
sofas | couch
a couch with a dog | couch dog
a table | dining_table
tables | dining_table
a dining table | dining_table
two dining tables | dining_table
dining at a table | dining_table
a desk, a stool | dining_table chair
a seat | chair
the seat of the toilet | toilet
seats beside a toilet | toilet
a toilet seat | toilet
toilet seats | toilet
a toilet seat and a seat | toilet
a toilet and a chair | toilet chair
a wine glass | wine_glass
wine glasses | wine_glass
a glass of wine |
glasses |
wine |
a motor bike | motorcycle
motor bikes | motorcycle
a motorbike | motorcycle
motorcycles | motorcycle
a motor |
a traffic light | traffic_light
traffic lights | traffic_light
a street light | traffic_light
stoplights | traffic_light
a light in the street |
a traffic jam under a light |
a train | train
trains | train
a train track |
train tracks |
a train on a train track | train
a train on the track | train
a track for trains | train
a ball | sports_ball
sports balls | sports_ball
a sports ball | sports_ball
a teddy bear | teddy_bear
teddy bears | teddy_bear
a bear | bear
a bear with a teddy bear | bear teddy_bear
pandas | bear
a baby bird | bird
baby birds | bird
a baby dog | dog
a baby |
skis | skis
a ski | skis
scissors | scissors
broccoli | broccoli
tvs | tv
a TV | tv
the man's dog sits on the sofa with a mug. | person dog couch cup
one\ttwo\ncups | cup
cups;cups/cups | cup cup cup
(cup) [dog] "bus" | cup dog bus
dog . dog . dog | dog dog dog
""".strip("\n").split("\n")
TABLE = [
    (caption.strip().replace(r"\t", "\t").replace(r"\n", "\n"), [n.replace("_", " ") for n in names.split()])
    for caption, _, names in (case.rpartition("|") for case in CASES)
]
assert len(TABLE) >= 100


@pytest.mark.parametrize(("caption", "names"), TABLE)
def test_a_caption_names_what_was_found_by_hand(caption: str, names: list[str]) -> None:
    assert CHAIR.named(caption) == names


@pytest.mark.parametrize("seed", range(10))
def test_scores_of_all_cases_agree_with_a_plain_scorer(seed: int) -> None:
    """From the names that were found by hand, against pictures of random objects, some with several captions."""
    draw = random.Random(seed)
    there = [set(draw.sample(sorted(NAMES), draw.randrange(8))) for _ in range(60)]
    rows: list[Row] = []
    wrong = named = captions_wrong = met = present = 0
    for number, (caption, names) in enumerate(TABLE):
        objects = there[number % 60]
        rows.append((Sample(str(number), (), "", frozenset(objects), picture=str(number % 60)), caption))
        bad = 0
        for name in names:
            bad += name not in objects
        wrong, named = wrong + bad, named + len(names)
        captions_wrong += bad > 0
        for name in objects:
            met += name in names
        present += len(objects)
    found = CHAIR.score(rows)
    assert found["chair_i"].value == pytest.approx(wrong / named) and found["chair_i"].count == named
    assert found["chair_s"].value == pytest.approx(captions_wrong / len(TABLE))
    assert found["recall"].value == pytest.approx(met / present) and found["recall"].count == present
    assert all(found[name].low < found[name].value < found[name].high for name in found)


def test_scores_of_four_captions_counted_by_hand() -> None:
    captions = {
        "Two cups, a dog and a dog.": {"cup"},  # two of three are invented; seven words
        "A sofa.": {"couch", "cup"},  # one of two is met; two words
        "": {"cup"},
        "The woman has a mug.": {"cup", "person"},  # five words
    }
    rows = [(Sample(caption, (), "", truth), caption) for caption, truth in captions.items()]
    found = {name: estimate.value for name, estimate in CHAIR.score(rows).items()}
    assert found == pytest.approx({"chair_i": 2 / 6, "chair_s": 1 / 4, "recall": 4 / 6, "words": 14 / 4})
