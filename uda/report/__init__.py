"""One page on finished runs: what they learnt, what they reached, where they are wrong."""
