"""Looking at this host without changing it: what it is, whether it is fit, which guarantees hold right now.

Runs as: root sees all of it; anybody else sees less, and is told what. Talks to: /proc, /sys, the files of the state
root, and programs asked only for their version or for a dry run. May never: write, lock, recover or signal anything,
nor report a guess: what could not be read is said to be unknown.

Reading (`host`, `tools`, `process`, `scene`) is apart from judging (`doctor`, `guarantees`), which is pure.

    text       parsers of what the kernel prints        doctor      the production-host checklist
    host       facts about the machine                  process     facts about one running VMM
    tools      programs, versions, nft's dry run        scene       everything `posture` looks at
    node       what `mvm node info` shows               guarantees  one judge for each guarantee
"""
