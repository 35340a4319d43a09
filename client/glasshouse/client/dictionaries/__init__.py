"""Dictionaries of features: their names and values, each call, and the handle a model gives."""
