"""Decoding strategies: what to keep and how to reshape. Importing this imports torch, and no other heavy package."""

from decal.samplers import calibrated as calibrated
from decal.samplers import embedding as embedding
from decal.samplers import guided as guided
from decal.samplers import history as history
from decal.samplers import reshaping as reshaping
from decal.samplers import simplex as simplex
from decal.samplers import truncation as truncation
from decal.samplers import views as views
