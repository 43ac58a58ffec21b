"""What there is in the world: things, their colours, the places where they stand, and what goes with what."""

SIZE = 96  # pixels of a side
PATCH = 8
GRID = SIZE // PATCH

PARTNER = {
    "table": "cup",
    "car": "sign",
    "dog": "ball",
    "shelf": "book",
    "boat": "fish",
    "chair": "lamp",
    "tree": "bird",
    "house": "flower",
}
"""The small thing that goes with a large one, its anchor."""

CO_OCCURRENCE = {
    "table": 0.95,
    "car": 0.88,
    "dog": 0.8,
    "shelf": 0.72,
    "boat": 0.64,
    "chair": 0.56,
    "tree": 0.48,
    "house": 0.4,
}
"""P(partner is there | anchor is there): the prior that a model may take for sight."""

ANCHORS = tuple(PARTNER)
PARTNERS = tuple(PARTNER.values())
KINDS = ANCHORS + PARTNERS

COLOURS = {
    "red": (212, 38, 44),
    "orange": (242, 126, 26),
    "yellow": (246, 222, 56),
    "green": (44, 160, 62),
    "cyan": (72, 208, 222),
    "blue": (48, 80, 212),
    "purple": (148, 54, 188),
    "white": (246, 246, 246),
}

PLACES = {
    "kitchen": ("table", "chair", "shelf"),
    "office": ("shelf", "chair", "table"),
    "street": ("car", "house", "tree"),
    "park": ("tree", "dog", "house"),
    "beach": ("boat", "dog", "car"),
}
"""Every background, and the anchors that are usual there."""

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

CONSONANTS = "CHLMPRTY"
VOWELS = "AEIO"
LETTERS = "".join(sorted(CONSONANTS + VOWELS))
"""Of the words on signs: consonant, vowel, another consonant."""
