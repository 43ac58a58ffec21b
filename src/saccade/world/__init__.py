"""A world small enough to ship: scenes of which everything is known, and what can be asked about them."""

from saccade.world.captions import caption, mentioned
from saccade.world.embedded import load
from saccade.world.illustrate import illustrate
from saccade.world.questions import Question, ask, ask_pair, questions
from saccade.world.scenes import SPLITS, Scene, Thing, scene, scenes

__all__ = [
    "SPLITS",
    "Question",
    "Scene",
    "Thing",
    "ask",
    "ask_pair",
    "caption",
    "illustrate",
    "load",
    "mentioned",
    "questions",
    "scene",
    "scenes",
]
