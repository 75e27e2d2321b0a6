"""mvm on one machine, without daemons: what the command line's verbs do, composed from builder and hostd.

Runs as: root, in the command's own process. Talks to: the state root, the builder, and the privileged side
through `mvm.wire.executor.Executor`. May never: print, ask, or read arguments (the command line does), or
start a thread (a VM's keeper is forked from this process).
"""
