"""Making this host run mvm-hostd as a service: `mvm bootstrap`.

    units     the files that are shipped and where each belongs
    needs     which rows of the doctor's checklist a mode demands: pure
    plan      what has to be done, from what is wanted and what was found: pure values, each says what it is
    observe   what is there now; changes nothing
    apply     doing a plan's steps, in order; each is complete or not done, and doing them again changes nothing
    verify    what holds afterwards, by asking the daemon and the kernel

Runs as: root, in the command line. It sets up the mvm that is in /usr/bin (packaging/mvm-install.sh) and no other, and
replaces only files that carry `units.MARK`: what an administrator wrote is refused, not lost. May never: start a daemon
in a mode that the host cannot keep, or change anything before every prerequisite was looked at.
"""
