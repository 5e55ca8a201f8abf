"""Meta-training: a population of trained networks, what pruning does to them, and metanetworks that learn from it."""

from metaprune.metatrain.distortion import Distortions, Survey, measure_distortions
from metaprune.metatrain.evaluate import Curve, curve_of
from metaprune.metatrain.loop import MetaTraining, Trained, meta_train
from metaprune.metatrain.objectives import OBJECTIVES, Objective, Pass, Subject
from metaprune.metatrain.population import Member, Population
from metaprune.metatrain.recipe import MemberSpec, Recipe
from metaprune.metatrain.survey import survey_population

__all__ = [
    "OBJECTIVES",
    "Curve",
    "Distortions",
    "Member",
    "MemberSpec",
    "MetaTraining",
    "Objective",
    "Pass",
    "Population",
    "Recipe",
    "Subject",
    "Survey",
    "Trained",
    "curve_of",
    "measure_distortions",
    "meta_train",
    "survey_population",
]
