"""Sequences of unlabelled domains, each adapted to in turn by a whole fit: the loop, its measures, and CoDAG."""
