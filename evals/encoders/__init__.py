"""Encoders to evaluate: teachers from a cache or live, students, and models of other libraries.

All share one interface: an `Encoder` gives summaries of images; a `LiveEncoder`, whose model runs, gives maps too.
"""

from evals.encoders.base import OWN, Block, Encoder, Kind, LiveEncoder, OnImages, Outputs
from evals.encoders.cached_teacher import CachedTeacherEncoder
from evals.encoders.named import FORMS, ModelName, load_model, load_runs, parse_models
from evals.encoders.network import NetworkEncoder, live_teacher, recorded_teacher
from evals.encoders.student import StudentEncoder

__all__ = [
    "FORMS",
    "OWN",
    "Block",
    "CachedTeacherEncoder",
    "Encoder",
    "Kind",
    "LiveEncoder",
    "ModelName",
    "NetworkEncoder",
    "OnImages",
    "Outputs",
    "StudentEncoder",
    "live_teacher",
    "load_model",
    "load_runs",
    "parse_models",
    "recorded_teacher",
]
