"""One module per resource an instance holds. In each, what to do is rendered from a model, what is there is
parsed into the same model, and only `apply`-like functions touch the machine.
"""
