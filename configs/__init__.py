"""Recipes that a user runs or copies; ``metaprune list configs`` shows them."""
