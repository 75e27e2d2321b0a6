"""What the trust zones say to each other, without I/O: bytes in, typed values out, and back.

Runs as: whoever imports it. Talks to: nobody. May never: open a descriptor, read a clock, draw a random number.
Everything that arrives is hostile until it is a value of a type defined here; what is not raises a typed error.
"""
