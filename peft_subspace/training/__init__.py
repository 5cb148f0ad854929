"""Objectives, and what is done with a model before and while it learns: pure functions on tensors and thin loops on models."""
