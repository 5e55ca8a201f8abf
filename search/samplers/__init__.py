"""Samplers of Optuna for pruning, one file each."""
