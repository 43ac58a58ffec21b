"""POPE, CHAIR, GQA, VQAv2 and TextVQA, from small files in the official formats, with scores worked out by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from saccade.bench.fingerprint import plain
from saccade.core.errors import InputError
from saccade.evals.files import FileTask
from saccade.evals.official import Coco, Gqa, Pope, TextVqa, VqaV2, coco_chair


def scored(task: FileTask, said: Mapping[str, str]) -> dict[str, float]:
    """From rows as they are stored, each answered under its id."""
    samples = task.samples(99, seed=0)
    assert {sample.id for sample in samples} == {*said}
    rows = [(replace(sample, images=(), truth=plain(sample.truth)), said[sample.id]) for sample in samples]
    return {name: estimate.value for name, estimate in task.score(rows).items()}


def drawn(folder: Path, *names: str) -> Path:
    for name in names:
        Image.new("RGB", (2, 2)).save(folder / name)
    return folder


def written(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


# ---- POPE

POPE = [
    {"question_id": 1, "image": "a.jpg", "text": "Is there a cup in the image?", "label": "yes"},
    {"question_id": 2, "image": "a.jpg", "text": "Is there a dog in the image?", "label": "no"},
    {"question_id": 3, "image": "b.jpg", "text": "Is there a dog in the image?", "label": "yes"},
    {"question_id": 4, "image": "b.jpg", "text": "Is there a car in the image?", "label": "no"},
]


def pope(folder: Path, lines: Sequence[Mapping[str, Any]]) -> Pope:
    drawn(folder, "a.jpg", "b.jpg")
    return Pope(written(folder / "coco_pope_random.json", "\n".join(map(json.dumps, lines))), folder)


def test_pope(tmp_path: Path) -> None:
    """One hit, one false, one missed, one rejected; "NO" is no word that says no."""
    task = pope(tmp_path, POPE)
    found = scored(task, {"1": "Yes, it is.", "2": "NO", "3": "No.", "4": "There is not"})
    expected = {"accuracy": 0.5, "precision": 0.5, "recall": 0.5, "f1": 0.5, "yes": 0.5, "assumed": 0.25}
    assert found == pytest.approx(expected)
    assert task.name == "pope:coco_pope_random.json"
    one = task.samples(1, seed=0)
    assert [sample.picture for sample in one] == [one[0].picture] * 2 and len(one[0].images) == 1


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"label": "maybe"}, "line 2: 'label' is 'maybe', neither yes nor no"),
        ({"label": None}, "line 2: there is no 'label'"),
        ({"question_id": 1}, "line 2: 'question_id' 1 is that of line 1 too"),
        ({"image": "c.jpg"}, "line 2: there is no picture"),
    ],
)
def test_a_wrong_line_of_pope_is_refused(tmp_path: Path, changed: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError) as e:
        pope(tmp_path, [POPE[0], POPE[1] | changed]).samples(9, 0)
    assert f"coco_pope_random.json, {told}" in str(e.value)


# ---- CHAIR

SYNONYMS = "person, man, baby, passenger\ndog, puppy\ntoilet\nchair, seat\nairplane, jet\ntie\ncup\n"
INSTANCES = {
    "images": [{"id": 7, "file_name": "7.jpg"}, {"id": 8, "file_name": "8.jpg"}],
    "categories": [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}, {"id": 70, "name": "toilet"}],
    "annotations": [
        {"image_id": 7, "category_id": 1},
        {"image_id": 8, "category_id": 18},
        {"image_id": 7, "category_id": 70},
    ],
}
CAPTIONS = {
    "annotations": [
        {"image_id": 7, "caption": "A man with a cup."},
        {"image_id": 8, "caption": "A baby dog sits."},
    ]
}


def coco(folder: Path, instances: Mapping[str, Any] = INSTANCES) -> Coco:
    drawn(folder, "7.jpg", "8.jpg")
    return Coco(
        written(folder / "instances.json", instances),
        written(folder / "captions.json", CAPTIONS),
        written(folder / "synonyms.txt", SYNONYMS),
        folder,
    )


def test_chair_on_coco(tmp_path: Path) -> None:
    """7 shows a person and a toilet, and a cup for who captioned it; 8 a dog, and no person for its "baby"."""
    task = coco(tmp_path)
    assert {s.id: s.truth for s in task.samples(9, 0)} == {"7": {"person", "toilet", "cup"}, "8": {"dog"}}
    found = scored(task, {"7": "Two men, a dog.", "8": "A puppy and a dog on a cup"})
    # named: person, dog (invented); dog, dog, cup (invented). Met: the person of three, the dog.
    expected = {"chair_i": 2 / 5, "chair_s": 1.0, "recall": 2 / 4, "words": (4 + 8) / 2}
    assert found == pytest.approx(expected)
    assert [s.id for s in task.samples(1, 0)] in (["7"], ["8"])


@pytest.mark.parametrize(
    ("caption", "names"),
    [
        ("a baby dog and a baby", ["dog", "person"]),
        ("baby puppies", ["person", "dog"]),  # not among the animals of the rule
        ("a passenger jet, a passenger", ["airplane", "person"]),
        ("a bow tie", ["tie"]),
        ("a seat beside the toilet seat", ["toilet"]),
        ("a seat", ["chair"]),
        ("a baby bear", []),  # of no line
    ],
)
def test_pairs_of_words_are_read_as_the_official_rule_does(
    tmp_path: Path, caption: str, names: list[str]
) -> None:
    assert coco_chair(written(tmp_path / "synonyms.txt", SYNONYMS)).named(caption) == names


def test_a_wrong_file_of_coco_is_refused(tmp_path: Path) -> None:
    task = coco(tmp_path, INSTANCES | {"annotations": [{"image_id": 7, "category_id": 2}]})
    with pytest.raises(InputError, match=r"instances\.json, annotations\[0\]: there is no category 2"):
        task.samples(9, 0)
    categories = [{"id": 1, "name": "person"}, {"id": 18, "name": "zebra"}]
    with pytest.raises(InputError, match=r"categories\[1\]: .*synonyms\.txt has no line for 'zebra'"):
        coco(tmp_path, INSTANCES | {"categories": categories}).samples(9, 0)
    with pytest.raises(InputError, match=r"synonyms\.txt, object 2: 'dog, , puppy' has an empty word"):
        coco_chair(written(tmp_path / "synonyms.txt", "cup\n\ndog, , puppy"))


# ---- GQA

GQA = {
    str(number): {
        "question": "Where is it?",
        "imageId": "n1",
        "answer": answer,
        "isBalanced": balanced,
        "types": {"structural": kind, "semantic": "rel", "detailed": "x"},
    }
    for number, (answer, balanced, kind) in enumerate(
        [
            ("traffic light", True, "query"),
            ("left", True, "choose"),
            ("yes", True, "choose"),
            ("no", False, "verify"),
        ]
    )
}


def test_gqa(tmp_path: Path) -> None:
    """What is not balanced is not asked; "a left" is not the answer to the letter."""
    task = Gqa(written(tmp_path / "testdev.json", GQA), drawn(tmp_path, "n1.jpg"))
    found = scored(task, {"0": "Traffic light.", "1": "a left", "2": "yes"})
    assert found == pytest.approx({"accuracy": 2 / 3, "query": 1.0, "choose": 0.5})


def test_a_wrong_entry_of_gqa_is_refused(tmp_path: Path) -> None:
    drawn(tmp_path, "n1.jpg")
    path = written(tmp_path / "testdev.json", {"0": GQA["0"], "1": {**GQA["1"], "types": {}}})
    with pytest.raises(InputError, match=r"testdev\.json, entry '1', 'types': there is no 'structural'"):
        Gqa(path, tmp_path).samples(9, 0)
    with pytest.raises(InputError, match="has no balanced question"):
        Gqa(written(path, {"3": GQA["3"]}), tmp_path).samples(9, 0)


# ---- VQAv2

QUESTIONS = {
    "data_subtype": "val2014",
    "questions": [
        {"image_id": 42, "question": "How many?", "question_id": 420},
        {"image_id": 42, "question": "What colour?", "question_id": 421},
    ],
}


def annotation(number: int, kind: str, *people: str) -> dict[str, Any]:
    answers = [{"answer": answer, "answer_id": at} for at, answer in enumerate(people, 1)]
    return {"question_id": number, "image_id": 42, "answer_type": kind, "answers": answers}


ANNOTATIONS = {
    "annotations": [
        annotation(421, "other", *["red"] * 8, "dark red", "dark red"),
        annotation(420, "number", *["two"] * 10),
    ]
}


def vqav2(folder: Path, annotations: Any) -> VqaV2:
    return VqaV2(
        written(folder / "questions.json", QUESTIONS),
        written(folder / "annotations.json", annotations),
        drawn(folder, "COCO_val2014_000000000042.jpg"),
    )


def test_vqav2(tmp_path: Path) -> None:
    """Two of ten said "dark red": two see one other of three, eight see two, (2/3 + 16/3) / 10. All ten said "two",
    and then nothing is normalised."""
    task = vqav2(tmp_path, ANNOTATIONS)
    found = scored(task, {"420": "2", "421": "The dark red."})
    assert found == pytest.approx({"accuracy": 0.3, "number": 0.0, "other": 0.6})
    assert scored(task, {"420": "two", "421": "red"})["accuracy"] == 1


def test_wrong_annotations_of_vqav2_are_refused(tmp_path: Path) -> None:
    other, number = ANNOTATIONS["annotations"]
    with pytest.raises(InputError, match=r"questions\[0\]: .*annotations\.json has no answers"):
        vqav2(tmp_path, {"annotations": [other]}).samples(9, 0)
    few = number | {"answers": number["answers"][:9]}
    with pytest.raises(InputError, match=r"annotations\.json, annotations\[1\]: 9 people answered, not 10"):
        vqav2(tmp_path, {"annotations": [other, few]}).samples(9, 0)


# ---- TextVQA


def textvqa(folder: Path, *answers: Sequence[str]) -> TextVqa:
    data = [
        {"question_id": at, "image_id": "0f", "question": "What brand?", "answers": people}
        for at, people in enumerate(answers)
    ]
    return TextVqa(written(folder / "val.json", {"data": data}), drawn(folder, "0f.jpg"))


def test_textvqa(tmp_path: Path) -> None:
    """Here all is normalised, though all ten gave one answer; commas join, and 's is a word of its own."""
    task = textvqa(
        tmp_path, ["wendy's"] * 10, ["1,000"] * 9 + ["none"], ["two"] * 3 + ["cola"] * 7, ["x"] * 10
    )
    assert task.parse("Wendy's, 1,000?") == "wendy 's 1000"
    found = scored(task, {"0": "The Wendy 's", "1": "0", "2": "2", "3": "y"})
    assert found == pytest.approx({"accuracy": (1 + 0.3 + 0.9 + 0) / 4})


def test_wrong_answers_of_textvqa_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"val\.json, data\[1\]: 3 people answered, not 10"):
        textvqa(tmp_path, ["x"] * 10, ["x"] * 3).samples(9, 0)
