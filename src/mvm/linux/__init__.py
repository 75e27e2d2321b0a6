"""Mechanism anyone on the host may use: processes, files, sockets, locked memory. No policy.

Runs as: whoever imports it. Talks to: the kernel, and the programs its callers name. May never: decide what
a tenant is allowed, know the state layout, or import any zone but `mvm.core`. Modules here stay cheap to
import, because every command line start pays for them: anything over a millisecond is imported inside the
function that needs it.
"""
