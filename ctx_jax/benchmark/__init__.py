"""How fast a model is beside its peers: same weights, inputs and threads, each in a process of its own."""
