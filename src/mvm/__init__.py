"""mvm: fleets of multi-tenant microVMs that cost nothing while they sleep.

The sub-packages are trust zones: where code runs decides where it lives. See docs/architecture.md.
"""

__version__ = "0.1.0"
