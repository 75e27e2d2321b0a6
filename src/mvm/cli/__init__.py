"""The command line: one file per noun.

Runs as: whoever typed it; what touches state needs root. Talks to: the terminal, and `mvm.standalone`. May
never: start a thread (a VM's keeper is forked from this process), or change state except through the facade.
"""
