"""Looking at this host without changing it: what it is, whether it is fit, which guarantees hold right now.

Runs as: root sees all of it; anybody else sees less, and is told what. Talks to: /proc, /sys, the files of the state
root, programs asked only for their version, a list or a dry run, and a daemon asked only who it is. May never: write,
recover or signal anything, hold up a command, or report a guess: what could not be read is said to be unknown. The one
exception is the boot probe, which runs on request and keeps its answer.

Reading (`host`, `tools`, `process`, `scene`) is apart from judging (`doctor`, `guarantees`), which is pure.

    text       parsers of what the kernel prints        doctor      the production-host checklist
    host       facts about the machine                  process     facts about one running VMM
    tools      programs, versions, nft's dry run        scene       everything `posture` looks at
    node       what `mvm node info` shows               guarantees  one judge for each guarantee
"""
