"""The domain model: pure values and rules.

Runs as: anyone. Talks to: nothing. May never: do I/O, read the clock, draw random numbers, or import another zone.
"""
