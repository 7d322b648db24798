"""A look at a shift before training: how far apart two domains are, in what way, and what that asks for."""
