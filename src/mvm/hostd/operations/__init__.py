"""What hostd does to an instance, one verb a file.

Runs as: root, in hostd (or in the command, in development mode). Talks to: resources, drivers, the guest. May never:
start before the record says so, or end without the record saying how.

Each takes the instance's `Context` with its lock held and nothing pending, and follows one pattern: persist the intent,
act, persist the commit point the moment it is passed, release, persist the end. Killed anywhere, `recovery` settles it.
"""
