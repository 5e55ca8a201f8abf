"""Meta-training: a population of trained networks, what pruning does to them, and metanetworks that learn from it."""
